"""Triton's products of a mixture of experts under its interpreter: edges of tiles, TMA, and what must not spread.

Run with TRITON_INTERPRET=1 in the environment; without it all skip.
"""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Callable

import pytest
import torch
from support.backends import Place, check
from support.ops import with_gaps
from torch import Tensor
from torch.nn import functional

from psykern import kernels
from psykern.kernels.routes import Routes

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")
TRITON = Place("triton", torch.device("cpu"))
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # of numbers of about 1, rounded once
K, F = 88, 72  # neither is a multiple of a tile's side; each row begins at a multiple of 16 bytes

Fetch = Callable[[str], list[Tensor]]


@pytest.fixture
def fetch(monkeypatch: pytest.MonkeyPatch) -> Fetch:
    """How tiles come: by "loads", by "tma", or by TMA with the rows "ahead", as where Triton sets no fence. Gives the
    matrices that are described for TMA from then on."""

    def choose(how: str) -> list[Tensor]:
        module, found = importlib.import_module("psykern.kernels.triton.experts"), []
        describe = module.descriptor
        monkeypatch.setattr(module, "descriptor", lambda x, *block: found.append(x) or describe(x, *block))
        monkeypatch.setattr(module, "is_hopper", lambda device: how != "loads")
        monkeypatch.setattr(module, "_HAS_FENCE", how != "ahead")
        return found

    return choose


def routed(counts: list[int], top_k: int) -> Routes:
    """Of experts with so many rows, in a random order of slots."""
    ids = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))]
    return Routes.of(ids.view(-1, top_k), len(counts))


def normal(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Rows whose products are of about 1."""
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) / math.sqrt(shape[-1])).to(dtype)


def both(place: Place, x: Tensor, weights: list[Tensor], routes: Routes) -> list[Tensor]:
    """The two products, each of an input of its own, so that neither has the other's error."""
    gates, ups, downs = weights
    inner = x[:, :F].repeat_interleave(routes.top_k, 0)
    return [
        kernels.expert_swiglu(x, gates, ups, routes, backend=place.backend),
        kernels.expert_linear(inner, downs, routes, backend=place.backend),
    ]


def truth(x: Tensor, weights: list[Tensor], routes: Routes) -> list[Tensor]:
    """In fp64, slot by slot."""
    slots, ends = routes.slots.tolist(), routes.offsets.tolist()
    experts = [sum(end <= i for end in ends[1:]) for i in range(len(slots))]
    gates, ups, downs = (w.double() for w in weights)
    gated, linear = torch.empty(len(slots), F).double(), torch.empty(len(slots), K).double()
    for i, (slot, e) in enumerate(zip(slots, experts, strict=True)):
        row = x[slot // routes.top_k].double()
        gated[i] = functional.silu(gates[e] @ row) * (ups[e] @ row)
        linear[slot] = downs[e] @ x[i // routes.top_k, :F].double()
    return [gated, linear]


@pytest.mark.parametrize(
    ("how", "dtype", "counts"),
    [
        ("loads", torch.float32, [65, 0, 1]),  # a tile and a row, none, one
        ("loads", torch.bfloat16, [0, 130]),  # tiles of 128 rows
        ("tma", torch.float16, [65, 0, 1]),
        ("tma", torch.bfloat16, [0, 130]),
        ("ahead", torch.float16, [65, 0, 1]),
    ],
    ids=lambda v: str(v).removeprefix("torch.").replace(", ", "-"),
)
def test_ragged_experts(how: str, dtype: torch.dtype, counts: list[int], fetch: Fetch) -> None:
    """With NaN in everything that is not asked for: rows of the weights of an expert without rows, and what stands
    behind the rows of inputs and weights, which are parts of larger arrays."""
    routes, fetched = routed(counts, 2), fetch(how)
    x = with_gaps(normal(routes.num_rows, K, dtype=dtype, seed=1))
    weights = [normal(len(counts), m, k, dtype=dtype, seed=m + k) for m, k in ((F, K), (F, K), (K, F))]
    expected = truth(x, weights, routes)
    wide = [w.new_full((len(w), w.shape[1] + 5, w.shape[2] + 8), math.nan) for w in weights]
    apart = [w[:, : one.shape[1], : one.shape[2]].copy_(one) for w, one in zip(wide, weights, strict=True)]
    for weight in apart:
        weight[counts.index(0)] = math.nan
    got = check(TRITON, lambda place: both(place, x, apart, routes), expected, TOLERANCES[dtype])
    assert len(fetched) == (0 if how == "loads" else 4)
    x[4] = math.nan
    of_row = [routes.slots // 2 == 4, torch.isin(torch.arange(sum(counts)), routes.slots[8:10])]
    for before, after, spoiled in zip(got, both(TRITON, x, apart, routes), of_row, strict=True):
        assert after[spoiled].isnan().all() and spoiled.sum() == 2
        assert torch.equal(after[~spoiled], before[~spoiled])


def test_weights_are_one_tensor_or_views_of_one_in_order(fetch: Fetch) -> None:
    """Gate and up may stand in one tensor, as fused checkpoints have them: experts are then farther apart."""
    fetch("tma")
    routes, fused = routed([3, 2], 1), normal(2, 2 * F, K, dtype=torch.float16, seed=1)
    x = normal(5, K, dtype=torch.float16, seed=2)
    gates, ups = fused[:, :F], fused[:, F:]
    expected = kernels.expert_swiglu(x, gates.contiguous(), ups.contiguous(), routes, backend="triton")
    assert torch.equal(kernels.expert_swiglu(x, gates, ups, routes, backend="triton"), expected)
    assert torch.equal(kernels.expert_swiglu(x, gates.unbind(), ups.unbind(), routes, backend="triton"), expected)
    for apart in ([gates[0], gates[1].clone()], [gates[1], gates[0]]):
        with pytest.raises(ValueError, match=r"^gates: expected one tensor \[2, 72, 88\] or views of one in the order"):
            kernels.expert_swiglu(x, apart, ups, routes, backend="triton")


@pytest.mark.parametrize("counts", [[65, 0, 1, 64], [0, 0, 1000], [0] * 20 + [3], [1] * 9], ids=str)
def test_every_row_is_in_one_tile_of_its_expert(counts: list[int]) -> None:
    module = importlib.import_module("psykern.kernels.triton.experts")
    table = module.tile_table(routed(counts, 1), 64).tolist()
    found = [(e, row) for e, first, end in table for row in range(first, min(first + 64, end))]
    ids = [e for e, count in enumerate(counts) for _ in range(count)]
    assert found == list(zip(ids, range(sum(counts)), strict=True))
    assert len(table) % 8 == 0 and len(table) <= sum(counts) // 64 + len(counts) + 8


def test_a_weighted_sum_is_rounded_once() -> None:
    """In bf16 256 + 0.5 is 256, eight times; and the sum of all is 260. Two programs a row."""
    total = torch.full((2, 1030), 256.0, dtype=torch.bfloat16)
    x, weights = torch.full((16, 1030), 2.0, dtype=torch.bfloat16), torch.full((2, 8), 0.25)
    x[8:16, 1029] = math.nan
    got = kernels.add_weighted(with_gaps(x), weights, with_gaps(total), backend="triton")
    expected = torch.full((2, 1030), 260.0, dtype=torch.bfloat16)
    expected[1, 1029] = math.nan
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
