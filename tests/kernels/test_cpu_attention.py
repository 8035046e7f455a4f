"""What prefix_attention in C++ promises beyond its numbers, in every instruction set that this machine has: the bits of
a row depend on nothing but its query and the keys that it sees, and bf16 rounds no more than its products do."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.attention import Layout
from support.backends import assert_same_bits, short
from torch import Tensor

from psykern import _cpu, kernels

U = 2.0**-8  # what a number moves at most, relative to itself, when it is rounded to bf16

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)


@pytest.fixture(params=_cpu.instruction_sets())
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(_cpu, "prefix_attention", partial(_cpu.prefix_attention, isa=request.param))
    return str(request.param)


def attend(q: Tensor, k: Tensor, v: Tensor, layout: Layout, window: int | None = None) -> Tensor:
    scale = q.shape[2] ** -0.5
    return kernels.prefix_attention(
        q, k, v, layout.kernel_segments(), softmax_scale=scale, window=window, backend="cpu"
    )


def numbers(seed: int, *shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@dataclass(frozen=True)
class Company:
    """A path of ``length`` keys, alone and among others."""

    length: int
    cuts: list[int]  # where its ranges begin, but for the first
    gaps: list[int]  # rows that stand before each range
    first_queries: list[int]  # of segments, each up to the next one's
    skipped: int  # every so manieth query is not asked for; 0: all are
    window: int | None
    heads: tuple[int, int]
    size: int
    threads: int


@st.composite
def companies(draw: st.DrawFn) -> Company:
    length = draw(st.sampled_from([7, 40, 255, 256, 257, 300, 530]))
    first = draw(st.integers(0, length - 1))
    cuts = sorted(draw(st.sets(st.integers(1, first), max_size=6))) if first else []
    later = draw(st.sets(st.integers(first, length - 1), max_size=3))
    kv_heads = draw(st.sampled_from([1, 2]))
    return Company(
        length,
        cuts,
        draw(st.lists(st.integers(0, 40), min_size=len(cuts) + 1, max_size=len(cuts) + 1)),
        sorted({first, *later}),
        draw(st.sampled_from([0, 0, 2, 3])),
        draw(st.sampled_from([None, None, 1, 33, 300])),
        (kv_heads * draw(st.sampled_from([1, 2, 7])), kv_heads),
        draw(st.sampled_from([4, 5, 16, 33, 64, 100])),
        draw(st.sampled_from([1, 2, 3])),
    )


@each_dtype
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=companies())
def test_a_row_has_the_same_bits_in_any_company(instruction_set: str, dtype: torch.dtype, case: Company) -> None:
    """Whole and in one range, against: in other ranges of a larger store, in several segments of which some queries are
    left out, behind another transcript and before a branch that shares its front, on other threads."""
    q = numbers(0, case.length, case.heads[0], case.size, dtype=dtype)
    k, v = (numbers(i, case.length, case.heads[1], case.size, dtype=dtype) for i in (1, 2))
    alone = attend(q, k, v, Layout(((range(case.length), [(0, case.length)]),)), case.window)

    path, row = [], 20  # rows of a transcript of others
    for begin, end, gap in zip([0, *case.cuts], [*case.cuts, case.length], case.gaps, strict=True):
        path.append((row + gap, row + gap + end - begin))
        row += gap + end - begin
    far_k, far_v = (numbers(i, row + 5, *x.shape[1:], dtype=dtype) for i, x in ((3, k), (4, v)))
    rows = [r for begin, end in path for r in range(begin, end)]
    far_k[rows], far_v[rows] = k, v
    bounds = [*case.first_queries, case.length]
    asked = [[p for p in range(*pair) if not case.skipped or p % case.skipped] for pair in pairwise(bounds)]
    fork = bounds[0]  # where the branch leaves the path
    branch = ([fork, fork + 2], [*front(path, fork), (row, row + 5)])
    layout = Layout(((range(20), [(0, 20)]), *((positions, path) for positions in asked), branch))
    own = [p for positions in asked for p in positions]
    others = numbers(5, 22, *q.shape[1:], dtype=dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    try:
        got = attend(torch.cat([others[:20], q[own], others[20:]]), far_k, far_v, layout, case.window)
    finally:
        torch.set_num_threads(before)
    assert_same_bits(got[20:-2], alone[own])


def front(path: list[tuple[int, int]], length: int) -> list[tuple[int, int]]:
    """The ranges of a path's first keys."""
    ranges = []
    for begin, end in path:
        if length > 0:
            ranges.append((begin, min(end, begin + length)))
        length -= end - begin
    return ranges


@pytest.mark.parametrize("window", [None, 40], ids=["all", "window-40"])
@pytest.mark.parametrize("shift", [0.0, 3.0], ids=["centred", "with a mean"])
@pytest.mark.parametrize("size", [4, 33, 64, 128, 256])
def test_bf16_moves_an_output_no_more_than_its_roundings_can(
    instruction_set: str, size: int, shift: float, window: int | None
) -> None:
    """Of the output itself, U |o|; of the weights w, whose sum is of the rounded ones: U sum w |v - o|, and not |v|.
    Scores are sums of exact products in fp32."""
    length, asked = 300, [0, 1, 31, 200, 255, 256, 299]
    q = numbers(0, len(asked), 6, size, dtype=torch.bfloat16)
    k = numbers(1, length, 2, size, dtype=torch.bfloat16)
    v = (numbers(2, length, 2, size, dtype=torch.float32) + shift).bfloat16()
    got = attend(q, k, v, Layout(((asked, [(0, length)]),)), window)
    assert got.dtype == torch.bfloat16

    keys, values = (x.double().repeat_interleave(3, dim=1) for x in (k, v))
    distance = torch.tensor(asked)[:, None] - torch.arange(length)
    hidden = (distance < 0) | (distance >= (window or length))
    scores = torch.einsum("nhd,mhd->hnm", q.double(), keys) * size**-0.5
    weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
    truth = torch.einsum("hnm,mhd->nhd", weights, values)
    spread = torch.einsum("hnm,nmhd->nhd", weights, (values - truth[:, None]).abs())
    allowed = U * truth.abs() + U * (1 + 2 * U) * spread + 1e-5
    assert ((got - truth).abs() <= allowed).all()


@each_dtype
@pytest.mark.parametrize("window", [None, 30], ids=["all", "window-30"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_reaches_those_who_see_it(
    instruction_set: str, dtype: torch.dtype, bad: float, window: int | None
) -> None:
    """At an odd place, within the first of two tiles; the bits of all others stay."""
    length, place, end = 300, 101, 131
    q = numbers(0, length, 4, 16, dtype=dtype)
    k, v = (numbers(i, length, 2, 16, dtype=dtype) for i in (1, 2))
    layout = Layout(((range(length), [(0, length)]),))
    clean = attend(q, k, v, layout, window)
    v[place] = bad
    got = attend(q, k, v, layout, window)
    sees = torch.zeros(length, dtype=torch.bool)
    sees[place : end if window else length] = True
    assert_same_bits(got[~sees], clean[~sees])
    assert not got[sees].isfinite().any()


@each_dtype
def test_scores_beyond_what_a_product_resolves(instruction_set: str, dtype: torch.dtype) -> None:
    """Up to 1e33: each query takes the value of its best key, and nothing is NaN."""
    length = 50
    q = numbers(0, length, 2, 32, dtype=dtype) * 1e16
    k, v = numbers(1, length, 2, 32, dtype=dtype) * 1e16, numbers(2, length, 2, 32, dtype=dtype)
    got = attend(q, k, v, Layout(((range(length), [(0, length)]),)))
    scores = torch.einsum("nhd,mhd->hnm", q.double(), k.double())
    best = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf).argmax(-1)  # [heads, queries]
    expected = torch.stack([v[best[h], h] for h in range(2)], dim=1)
    assert_same_bits(got, expected)


def test_one_dtype_for_all() -> None:
    q, k = torch.zeros(3, 2, 4), torch.zeros(3, 1, 4)
    layout = Layout(((range(3), [(0, 3)]),))
    with pytest.raises(ValueError, match=r"k: expected torch.float32, got torch.bfloat16"):
        attend(q, k.bfloat16(), k, layout)
    with pytest.raises(ValueError, match=r"v: expected torch.bfloat16, got torch.float32"):
        attend(q.bfloat16(), k.bfloat16(), k, layout)


def test_the_binding_takes_one_dtype_for_all() -> None:
    arrays = {name: np.zeros((1, 1, 4), np.float32) for name in ("q", "k", "v", "out")}
    offsets = np.array([0, 1], np.int32)
    rest = (np.zeros(1, np.int32), offsets, offsets, np.array([[0, 1]], np.int32))

    def call(**changed: np.ndarray) -> None:
        a = {**arrays, **changed}
        _cpu.prefix_attention(a["q"], a["k"], a["v"], *rest, a["out"], softmax_scale=1.0, num_threads=1)

    call()
    for name in ("k", "v", "out"):
        with pytest.raises(ValueError, match=f"{name}: expected float32 like q, got int16"):
            call(**{name: np.zeros((1, 1, 4), np.int16)})
    with pytest.raises(ValueError, match="k: expected float32, or bfloat16 as int16 or uint16, got float64"):
        call(k=np.zeros((1, 1, 4)))
    read_only = np.zeros((1, 1, 4), np.float32)
    read_only.flags.writeable = False
    with pytest.raises(ValueError, match="out: expected an array to write to"):
        call(out=read_only)
