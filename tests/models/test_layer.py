"""One layer alone, and layers of different kinds in one model, against transformers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.checkpoints import CONFIGS, LAYERS, make_model
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP

from psykern.kernels import Backend, Segments
from psykern.kernels.compute import Compute
from psykern.models import families
from psykern.models.batch import Batch, LayerState
from psykern.models.families import llama
from psykern.models.fields import Fields
from psykern.models.mlp import Mlp
from psykern.models.model import Model
from psykern.models.spec import ModelSpec


def one_transcript(length: int, rows: Tensor | None = None, store_row: int = 0) -> Batch:
    """A batch of one transcript; ``rows``: those that need an output."""
    positions = torch.arange(length, dtype=torch.int32)
    queries = positions if rows is None else positions[rows]
    segments = Segments(
        positions=queries,
        query_offsets=torch.tensor([0, len(queries)], dtype=torch.int32),
        range_offsets=torch.tensor([0, 1], dtype=torch.int32),
        key_ranges=torch.tensor([[store_row, store_row + length]], dtype=torch.int32),
    )
    return Batch(positions=positions, store_row=store_row, query_rows=rows, query_positions=queries, segments=segments)


def states_around(oracle: PreTrainedModel, layer: int, length: int) -> tuple[Tensor, Tensor]:
    """Hidden states [T, D] before and after a layer, of random tokens."""
    states: list[Tensor] = []
    oracle.model.layers[layer].register_forward_hook(lambda _, given, gives: states.extend((given[0], gives)))
    oracle(torch.randint(320, (1, length), generator=torch.Generator().manual_seed(0)), use_cache=False)
    return states[0][0], states[1][0]


@torch.inference_mode()
@pytest.mark.parametrize("num_slots", [None, 2], ids=["apart", "fused"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", LAYERS)
def test_one_layer_equals_transformers_for_all_rows_and_for_some(
    name: str, backend: Backend, num_slots: int | None, tmp_path: Path
) -> None:
    """Layer 1 on one transcript of 40 tokens that stands behind 3 rows of the store which it does not see."""
    oracle = make_model(tmp_path, **CONFIGS[name])
    model = Model(tmp_path, Compute.resolve("cpu", backend=backend), num_slots=num_slots)
    hidden, expected = states_around(oracle, 1, 40)
    for rows in (None, torch.tensor([0, 7, 8, 30, 39]), torch.tensor([39])):
        keys, values = torch.full((2, 43, *model.spec.layers[1].mixer.kv_shape), torch.nan)
        given = hidden.clone()
        out = given if rows is None else torch.full((len(rows), 64), torch.nan)
        layer = model.layer(1, 40)
        assert (layer.mixer.fused is None) == (num_slots is None)
        if isinstance(layer.ffn, Mlp):
            assert (layer.ffn.gate_up is None) == (num_slots is None)
        else:
            assert isinstance(layer.ffn.gates, list) == (num_slots is None)
        layer(given, out, LayerState(keys, values), one_transcript(40, rows, 3), model.scratch(40))
        torch.testing.assert_close(out, expected if rows is None else expected[rows], rtol=1e-4, atol=1e-4)
        assert rows is None or torch.equal(given, hidden)
        assert keys[:3].isnan().all() and keys[3:].isfinite().all() and values[3:].isfinite().all()


@torch.inference_mode()
@pytest.mark.parametrize("num_slots", [None, 2], ids=["apart", "fused"])
@pytest.mark.parametrize("some", [False, True], ids=["all-rows", "some-rows"])
@pytest.mark.parametrize("name", ["llama", "olmo3", "qwen2"])
def test_a_layer_allocates_no_array_of_its_rows(name: str, some: bool, num_slots: int | None, tmp_path: Path) -> None:
    """Of 2,000 rows with 64 hidden floats each; what is allocated are scalars of the checks of arguments."""
    make_model(tmp_path, **CONFIGS[name])
    model = Model(tmp_path, Compute.resolve("cpu"), num_slots=num_slots)
    rows = 2000
    layer, scratch, hidden = model.layer(0, rows), model.scratch(rows), torch.randn(rows, 64)
    batch = one_transcript(rows, torch.arange(0, rows, 2) if some else None)
    out = torch.empty(rows // 2, 64) if some else hidden
    keys, values = torch.empty(2, rows, *model.spec.layers[0].mixer.kv_shape)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        layer(hidden, out, LayerState(keys, values), batch, scratch)
    allocated = {event.name: event.cpu_memory_usage for event in profile.events() if event.cpu_memory_usage > 4 * rows}
    assert out.isfinite().all() and not allocated


def mixed(c: Fields) -> ModelSpec:
    """A family like Llama, but that layer 1 has a wider feed-forward part, with biases."""
    spec = llama(c)
    first, second, third = spec.layers
    wide = replace(second.ffn, intermediate_size=144, has_bias=True)
    return replace(spec, layers=(first, replace(second, ffn=wide), third))


@torch.inference_mode()
@pytest.mark.parametrize("num_slots", [None, 1, 2, 3])
def test_layers_of_two_kinds_equal_transformers(
    num_slots: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model of transformers whose layer 1 was exchanged; a family of one's own reads it."""
    oracle = make_model(tmp_path, **CONFIGS["llama"])
    assert isinstance(oracle.config, LlamaConfig)
    sizes = oracle.config.to_dict() | {"intermediate_size": 144, "mlp_bias": True}
    torch.manual_seed(1)
    oracle.model.layers[1].mlp = LlamaMLP(LlamaConfig(**sizes))
    oracle.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "mixed"}))
    monkeypatch.setitem(families.FAMILIES, "mixed", mixed)

    model = Model(tmp_path, Compute.resolve("cpu"), num_slots=num_slots)
    ids = torch.randint(320, (20,), generator=torch.Generator().manual_seed(0))
    scratch, batch, hidden = model.scratch(20), one_transcript(20), model.embed(ids.int())
    assert len(scratch.ffn) == 20 * 2 * 144
    for _ in range(2):  # again from the first layer on, as in a further wave
        out = hidden.clone()
        for i in range(model.num_layers):
            keys, values = torch.empty(2, 20, *model.spec.layers[i].mixer.kv_shape)
            model.layer(i, 20)(out, out, LayerState(keys, values), batch, scratch)
        expected = oracle.model(ids[None], use_cache=False).last_hidden_state[0]
        torch.testing.assert_close(model.final_norm(out), expected, rtol=1e-4, atol=1e-4)
