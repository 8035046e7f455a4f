"""Branches of the Triton kernels that no case of the operations' own tests reaches, under Triton's interpreter.

Run with TRITON_INTERPRET=1 in the environment; without it all skip.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from support import attention
from support.backends import Place, assert_agrees, check
from support.checkpoints import CONFIGS, make_model, oracle_logprobs
from support.groups import random_group, wanted
from support.logprobs import TOLERANCES, fp64, problem, run
from torch import Tensor

from psykern.engine.engine import Engine
from psykern.engine.plan import plan
from psykern.kernels.compute import Compute
from psykern.models.model import Model

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")
TRITON = Place("triton", torch.device("cpu"))


def descriptors(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The matrices that an operation describes for TMA from now on."""
    found: list[Tensor] = []
    describe = module.descriptor
    monkeypatch.setattr(module, "descriptor", lambda x, *block: found.append(x) or describe(x, *block))
    return found


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize(
    ("rows", "vocabulary", "size"),
    [(130, 512, 64), (130, 515, 72), (17, 300, 64), (3, 127, 40)],
    ids=["even-tiles", "odd-tiles", "64-rows", "16-rows"],
)
def test_tiles_that_tma_fetches(
    rows: int, vocabulary: int, size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("psykern.kernels.triton.option_logprobs")
    monkeypatch.setattr(module, "is_hopper", lambda device: True)
    fetched = descriptors(module, monkeypatch)
    hidden, weight, *wanted = problem(rows, vocabulary, size, dtype)
    inputs = (hidden.to(dtype), weight, *wanted)
    check(TRITON, lambda p: run(p, *inputs), fp64(*inputs), TOLERANCES[dtype])
    assert len(fetched) == 2


def test_rows_that_do_not_begin_at_multiples_of_16_bytes_are_not_for_tma(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = importlib.import_module("psykern.kernels.triton.option_logprobs")
    monkeypatch.setattr(module, "is_hopper", lambda device: True)
    x = torch.zeros(4, 72, dtype=torch.float16)
    assert module.uses_tma(x, x)
    assert not module.uses_tma(x[:, 1:], x[:, 1:])
    assert not module.uses_tma(torch.zeros(4, 71, dtype=torch.float16), x)
    assert not module.uses_tma(x, x.bfloat16())
    assert not module.uses_tma(x.float(), x.float())


@pytest.mark.parametrize("window", [None, 40], ids=["full", "window-40"])
@pytest.mark.parametrize(("heads", "size"), [((8, 2), 64), ((2, 1), 128)], ids=["Dh-64", "Dh-128"])
@pytest.mark.parametrize("layout", ["long-on-two-ranges", "branches", "deep-ancestors"])
def test_keys_that_tma_fetches(
    layout: str, heads: tuple[int, int], size: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of the store that no segment names are NaN: a block that all queries see holds none of them."""
    module = importlib.import_module("psykern.kernels.triton.prefix_attention")
    monkeypatch.setattr(module, "is_hopper", lambda device: True)
    fetched = descriptors(module, monkeypatch)
    chosen = attention.LONG[layout]
    q, k, v, segments = attention.problem(chosen, heads, size, torch.float16)
    named = torch.zeros(len(k), dtype=torch.bool)
    for s in range(len(chosen.segments)):
        named[chosen.path(s)] = True
    truth = attention.fp64(chosen, q, k, v, window)
    k[~named], v[~named] = np.nan, np.nan
    check(
        TRITON, lambda p: [attention.run(p, q, k, v, segments, window=window)], [truth], attention.TOLERANCES[q.dtype]
    )
    assert len(fetched) == 4


UNUSED = attention.Layout(  # rows of no segment before, between and behind the ranges, and around the tails
    (
        (range(70), [(40, 110)]),
        (range(70, 101), [(40, 110), (150, 181)]),
        *((range(60, 62), [(40, 100), (row, row + 2)]) for row in (220, 222, 224)),
    )
)


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("window", [None, 40], ids=["full", "window-40"])
@pytest.mark.parametrize("size", [64, 128, 256], ids=["Dh-64", "Dh-128", "Dh-256"])
def test_what_tma_fetches_of_unused_rows_reaches_no_output(
    size: int, window: int | None, garbage: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store's memory is not initialised, and TMA fetches whole blocks: 0 times NaN would be NaN."""
    module = importlib.import_module("psykern.kernels.triton.prefix_attention")
    monkeypatch.setattr(module, "is_hopper", lambda device: True)
    q, k, v, segments = attention.problem(UNUSED, (2, 1), size, torch.float16)
    k, v = (torch.cat([x, x[:100]]) for x in (k, v))
    assert (segments.tiles(64, k.device).table[:, 5] > 0).any()  # END_TAIL: some tile has tails
    truth = attention.fp64(UNUSED, q, k, v, window)
    unused = torch.ones(len(k), dtype=torch.bool)
    for s in range(len(UNUSED.segments)):
        unused[UNUSED.path(s)] = False
    k[unused], v[unused] = garbage, garbage
    got = attention.run(TRITON, q, k, v, segments, window=window)
    torch.testing.assert_close(got.double(), truth, rtol=0, atol=attention.TOLERANCES[q.dtype])


def test_keys_that_no_query_of_a_tile_sees_are_not_read() -> None:
    """One tile: a value that was read would spoil the sum, NaN times a weight of 0."""
    layout = attention.Layout(((range(100, 132), [(0, 300)]),))
    q, k, v, segments = attention.problem(layout, (1, 1))
    truth = attention.fp64(layout, q, k, v, window=40)
    v[:61], v[132:] = np.nan, np.nan
    got = attention.run(TRITON, q, k, v, segments, window=40)
    torch.testing.assert_close(got.double(), truth, rtol=0, atol=attention.TOLERANCES[q.dtype])


def test_heads_that_are_not_for_tma(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("psykern.kernels.triton.prefix_attention")
    x = torch.zeros(4, 2, 64, dtype=torch.float16)
    assert not module.uses_tma(x, x)  # no Hopper GPU
    monkeypatch.setattr(module, "is_hopper", lambda device: True)
    assert module.uses_tma(x, x)
    assert not module.uses_tma(x.float(), x.float())
    assert not module.uses_tma(x[..., :48], x[..., :48])  # 48 numbers: a block would hold those of the next head
    unaligned = torch.zeros(4, 2 * 64 + 1, dtype=torch.float16)[:, 1:].view(4, 2, 64)
    assert not module.uses_tma(x, unaligned) and not module.uses_tma(unaligned, x)


@pytest.mark.parametrize("limit", ["_PARTIAL_BYTES", "_HIDDEN_BYTES"])
def test_rows_in_several_launches_score_as_in_one(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """150 rows of 64 a launch: 64, 64 and 22."""
    module = importlib.import_module("psykern.kernels.triton.option_logprobs")
    inputs = problem(150, 192, 32)
    whole = run(TRITON, *inputs)
    monkeypatch.setattr(module, limit, 1)
    assert module.rows_of_launch(150, 32 * 4, 3, 64) == 64
    for one, other in zip(run(TRITON, *inputs), whole, strict=True):
        assert_agrees(TRITON, one, other, TOLERANCES[torch.float32])


@pytest.mark.parametrize(
    ("name", "wave_tokens"),
    [("qwen3", 48), ("qwen2-window", 48), ("olmo3", 48), ("qwen2-window", 4096)],  # norm of heads, none, of projections
    ids=["qwen3-carried", "qwen2-window-carried", "olmo3-carried", "qwen2-window-one-wave"],
)
def test_the_engine_scores_as_with_the_reference(name: str, wave_tokens: int, tmp_path: Path) -> None:
    """Transcripts that share prefixes, with answer options of several tokens: 2 layers, of which Qwen2 windows one."""
    oracle = make_model(tmp_path, **CONFIGS[name] | {"num_hidden_layers": 2})
    group = random_group(np.random.default_rng(5), 3, 320, 2)
    planned = plan(group, wave_tokens=wave_tokens, batch_tokens=32, min_share=4)
    assert (planned.max_carried_rows > 0) == (wave_tokens == 48)
    places = (Compute.resolve("cpu", backend=backend) for backend in ("triton", "reference"))
    got, expected = (Engine(Model(tmp_path, place)).run(planned) for place in places)
    assert len(got.logprob) >= 20
    assert np.abs(got.logprob - expected.logprob).max() <= 1e-5
    assert np.abs(got.entropy - expected.entropy).max() <= 1e-5
    tops = np.array([oracle_logprobs(oracle, np.array(context))[-1].topk(2).values for context, _ in wanted(group)])
    assert (tops[:, 0] - tops[:, 1]).min() > 1e-4  # no rounding can choose another
    assert np.array_equal(got.is_argmax, expected.is_argmax)
