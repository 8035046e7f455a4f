"""A wave with a store of its own: ``run_wave`` asks of a store no more than ``Store`` says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.checkpoints import CONFIGS, make_model
from support.groups import random_group

from psykern.engine.plan import Plan, Wave, plan
from psykern.engine.store import OneLayer, Store
from psykern.engine.watch import Watch
from psykern.engine.wave import Launched, run_wave
from psykern.kernels.compute import Compute
from psykern.models.batch import LayerState
from psykern.models.model import Model


@pytest.fixture(params=["qwen3", "olmo3"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Model:
    make_model(tmp_path, **CONFIGS[request.param])
    return Model(tmp_path, Compute.resolve("cpu"))


@pytest.fixture(scope="module")
def planned() -> Plan:
    """Waves that carry prefixes, of several batches."""
    group = random_group(np.random.default_rng(5), 10, 320, 3)
    made = plan(group, wave_tokens=40, batch_tokens=16, min_share=4)
    assert made.num_waves > 5 and made.max_carried_rows > 0
    return made


def quiet() -> Watch:
    return Watch(torch.device("cpu"), lambda share: None)


def run(model: Model, planned: Plan, store: Store) -> list[Launched]:
    scratch = model.scratch(planned.batch_tokens)
    with torch.inference_mode():
        return [run_wave(model, wave, store, scratch, quiet()) for wave in planned.waves()]


class EveryLayer:
    """Rows of all layers stay where they are, and what a wave carries is taken when it begins: as pages would have it,
    of a session that goes on. What a wave has no right to read is not a number."""

    def __init__(self, model: Model, *, forgets: bool = False) -> None:
        self._heads, self._num_layers = model.spec.layers[0].mixer.kv_shape, model.num_layers
        self._rows = torch.empty((self._num_layers, 2, 0, *self._heads))
        self._keep = torch.empty(0, dtype=torch.int64)
        self._forgets = forgets  # the fault: what is carried is lost

    def enter(self, layer: int, wave: Wave) -> LayerState:
        if layer == 0:
            own = torch.full((self._num_layers, 2, len(wave.token_ids), *self._heads), torch.nan)
            carried = self._rows[:, :, self._keep]
            self._rows = torch.cat((carried * torch.nan if self._forgets else carried, own), dim=2)
        return LayerState(*self._rows[layer])

    def leave(self, layer: int, wave: Wave) -> None:
        assert self._rows[layer].isfinite().all() or self._forgets, "a row of the wave was not written"
        self._keep = torch.from_numpy(wave.keep_rows)


def test_a_store_that_keeps_all_layers_gives_the_bytes_of_one_that_keeps_one(model: Model, planned: Plan) -> None:
    for one, every in zip(run(model, planned, OneLayer(model)), run(model, planned, EveryLayer(model)), strict=True):
        for field in ("logprob", "is_argmax", "entropy", "sums"):
            assert getattr(one, field).numpy().tobytes() == getattr(every, field).numpy().tobytes(), field


def test_what_a_store_loses_is_missed(model: Model, planned: Plan) -> None:
    """So the test above can fail: carried rows are read."""
    lost = run(model, planned, EveryLayer(model, forgets=True))
    assert not all(launched.logprob.isfinite().all() for launched in lost)


def test_every_layer_is_entered_and_left_once_in_order(model: Model, planned: Plan) -> None:
    calls: list[tuple[str, int, int]] = []

    class Noted(OneLayer):
        def enter(self, layer: int, wave: Wave) -> LayerState:
            calls.append(("enter", wave.index, layer))
            return super().enter(layer, wave)

        def leave(self, layer: int, wave: Wave) -> None:
            calls.append(("leave", wave.index, layer))
            super().leave(layer, wave)

    run(model, planned, Noted(model))
    assert calls == [
        (what, wave, layer)
        for wave in range(planned.num_waves)
        for layer in range(model.num_layers)
        for what in ("enter", "leave")
    ]


def test_a_watch_is_told_after_each_layer(model: Model, planned: Plan) -> None:
    shares: list[float] = []
    with torch.inference_mode():
        launched = run_wave(
            model,
            planned.wave(0),
            OneLayer(model),
            model.scratch(planned.batch_tokens),
            Watch(torch.device("cpu"), shares.append),
        )
    assert shares == [(i + 1) / model.num_layers for i in range(model.num_layers)]
    assert launched.spans == [] and launched.arrived is None  # a CPU is not timed
