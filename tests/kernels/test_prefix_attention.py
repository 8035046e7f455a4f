"""prefix_attention against a dense mask in fp64, written from what segments, ranges, positions and window mean."""

from __future__ import annotations

import math

import pytest
import torch
from support.attention import (
    LAYOUTS,
    LONG,
    SCALE,
    TOLERANCES,
    Layout,
    Segment,
    fp64,
    long,
    problem,
    rounding_of_scores,
    run,
)
from support.backends import REFERENCE, Place, assert_as_in_company, assert_same_bits, check, each_place, short
from torch import Tensor

from psykern import kernels
from psykern.kernels import reference

each_dtype = pytest.mark.parametrize("dtype", TOLERANCES, ids=short)


each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
each_window = pytest.mark.parametrize("window", [None, 1, 5, 1000], ids=lambda w: f"window-{w}")


AGREEMENT = 2 * TOLERANCES[torch.float32]  # of two ways to the same numbers: each may be TOLERANCES from fp64


@each_place
@each_window
@each_layout
def test_equals_fp64(place: Place, layout: Layout, window: int | None) -> None:
    q, k, v, *rest = problem(layout)
    truth = fp64(layout, q, k, v, window)
    check(place, lambda p: [run(p, q, k, v, *rest, window=window)], [truth], TOLERANCES[torch.float32])


@each_place
@pytest.mark.parametrize("window", [None, 2, long(600)], ids=lambda w: f"window-{w}")  # 2: within a branch
@pytest.mark.parametrize("layout", LONG.values(), ids=LONG)
def test_long_segments_equal_fp64(place: Place, layout: Layout, window: int | None) -> None:
    q, k, v, *rest = problem(layout, (2, 1))
    truth = fp64(layout, q, k, v, window)
    tolerance = TOLERANCES[torch.float32] + rounding_of_scores(layout, q, k, v, window)
    check(place, lambda p: [run(p, q, k, v, *rest, window=window)], [truth], tolerance)


@each_place
@each_dtype
@pytest.mark.parametrize(
    ("heads", "size", "window"),
    [
        ((1, 1), 24, None),  # neither a power of two nor a multiple of 16
        ((1, 1), 24, 5),
        ((2, 2), 80, None),  # a multiple of 16 only
        ((4, 2), 128, None),  # Llama, Qwen3, OLMo 3
        ((4, 2), 128, 5),
        ((7, 1), 64, None),  # Qwen2.5-0.5B: 14 query heads on 2
        ((14, 2), 16, None),
        ((2, 1), 96, None),
        ((1, 1), 256, None),  # the largest in use
    ],
    ids=lambda value: "-on-".join(map(str, value)) if isinstance(value, tuple) else str(value),
)
def test_heads_and_sizes(
    place: Place, dtype: torch.dtype, heads: tuple[int, int], size: int, window: int | None
) -> None:
    layout = LAYOUTS["trie"]
    q, k, v, *rest = problem(layout, heads, size, dtype)
    scale = size**-0.5
    truth = fp64(layout, q, k, v, window, scale)
    check(place, lambda p: [run(p, q, k, v, *rest, window=window, scale=scale)], [truth], TOLERANCES[dtype])


@each_place
@each_window
@each_layout
def test_rows_that_no_segment_names_do_not_matter(place: Place, layout: Layout, window: int | None) -> None:
    q, k, v, *rest = problem(layout)
    clean = run(place, q, k, v, *rest, window=window)
    named = sorted({row for s in range(len(layout.segments)) for row in layout.path(s)})
    others = torch.ones(len(k), dtype=torch.bool)
    others[named] = False
    assert others.any()
    k[others], v[others] = math.nan, math.inf
    assert_same_bits(run(place, q, k, v, *rest, window=window), clean)


@each_place
@each_window
@each_layout
def test_every_element_of_out_is_written(place: Place, layout: Layout, window: int | None) -> None:
    q, k, v, *rest = problem(layout)
    got = run(place, q, k, v, *rest, window=window, out=torch.full_like(q, math.nan))
    assert got.isfinite().all()
    assert_same_bits(got, run(place, q, k, v, *rest, window=window))


@each_place
@each_window
@pytest.mark.parametrize(
    "layout", [LAYOUTS["trie"], LAYOUTS["gaps"], LONG["many-gaps"]], ids=["trie", "gaps", "many-gaps"]
)
def test_out_may_be_q(place: Place, layout: Layout, window: int | None) -> None:
    inputs = problem(layout)
    expected = run(place, *inputs, window=window)
    q, *others = place.put(*inputs)
    got = kernels.prefix_attention(q, *others, softmax_scale=SCALE, window=window, out=q, backend=place.backend)
    assert got is q
    assert_same_bits(got.cpu(), expected)


@each_place
@each_window
@each_layout
def test_inputs_are_not_changed_and_two_runs_give_the_same_bits(
    place: Place, layout: Layout, window: int | None
) -> None:
    inputs = place.put(*problem(layout))
    copies = [t.clone() for t in inputs]
    one, other = (
        kernels.prefix_attention(*inputs, softmax_scale=SCALE, window=window, backend=place.backend) for _ in range(2)
    )
    for before, after in zip(copies, inputs, strict=True):
        assert_same_bits(after, before)
    assert_same_bits(one, other)


@each_place
@each_window
@pytest.mark.parametrize("name", ["trie", "two-transcripts", "carried", "no-queries"])
def test_a_segment_alone_scores_as_in_company(place: Place, name: str, window: int | None) -> None:
    layout = LAYOUTS[name]
    q, k, v, *rest = problem(layout)
    together = run(place, q, k, v, *rest, window=window)
    first = 0
    for segment in layout.segments:
        last = first + len(segment[0])
        alone = run(place, q[first:last], k, v, *Layout((segment,)).tensors(), window=window)
        assert_as_in_company(place, alone, together[first:last], AGREEMENT)
        first = last


@each_place
@each_window
@pytest.mark.parametrize("cut", [1, 20, 39])
@pytest.mark.parametrize("is_one_range", [True, False], ids=["one-range", "two-ranges"])
def test_a_segment_in_two_pieces_equals_the_whole(
    place: Place, window: int | None, cut: int, is_one_range: bool
) -> None:
    whole = Layout(((range(40), [(0, 40)]),))
    path = [(0, 40)] if is_one_range else [(0, cut), (cut, 40)]
    pieces = Layout(((range(cut), [(0, cut)]), (range(cut, 40), path)))
    q, k, v, *rest = problem(whole)
    expected = run(place, q, k, v, *rest, window=window)
    got = run(place, q, k, v, *pieces.tensors(), window=window)
    torch.testing.assert_close(got, expected, rtol=0, atol=AGREEMENT)


@each_place
@pytest.mark.parametrize("window", [None, 5], ids=lambda w: f"window-{w}")
def test_some_of_a_segments_queries_get_what_all_of_them_get(place: Place, window: int | None) -> None:
    """The last layer asks for the rows that predict a response only."""
    path = [(0, 4), (6, 42)]
    q, k, v, *rest = problem(Layout(((range(4, 40), path),)))
    expected = run(place, q, k, v, *rest, window=window)
    chosen = [4, 5, 6, 11, 30, 39]
    queries = [p - 4 for p in chosen]
    got = run(place, q[queries], k, v, *Layout(((chosen, path),)).tensors(), window=window)
    torch.testing.assert_close(got, expected[queries], rtol=0, atol=AGREEMENT)


@each_place
@each_window
def test_where_keys_stand_in_the_store_does_not_matter(place: Place, window: int | None) -> None:
    """One path in one range and the same keys scattered over ranges of odd lengths: numbers agree."""
    q, k, v, *rest = problem(Layout(((range(20, 30), [(0, 30)]),)))
    expected = run(place, q, k, v, *rest, window=window)
    scattered = Layout(((range(20, 30), [(41, 42), (7, 10), (50, 61), (1, 6), (20, 30)]),))
    far_k, far_v = torch.full((2, 64, *k.shape[1:]), math.nan)
    far_k[scattered.path(0)], far_v[scattered.path(0)] = k[:30], v[:30]
    got = run(place, q, far_k, far_v, *scattered.tensors(), window=window)
    torch.testing.assert_close(got, expected, rtol=0, atol=AGREEMENT)


@each_place
@each_window
def test_huge_scores_stay_finite(place: Place, window: int | None) -> None:
    """Scores up to 1e6: each query takes the value of its best key."""
    layout = LAYOUTS["trie"]
    q, k, v, *rest = problem(layout)
    q, k = q * 1e3, k * 1e3
    truth = fp64(layout, q, k, v, window)
    check(place, lambda p: [run(p, q, k, v, *rest, window=window)], [truth], TOLERANCES[torch.float32])


@each_place
@pytest.mark.parametrize("window", [None, 5], ids=lambda w: f"window-{w}")
def test_a_key_that_is_nan_reaches_those_who_see_it(place: Place, window: int | None) -> None:
    layout = LAYOUTS["two-transcripts"]
    q, k, v, *rest = problem(layout)
    clean = run(place, q, k, v, *rest, window=window)
    k[8] = math.nan  # the last key of the first transcript
    got = run(place, q, k, v, *rest, window=window)
    assert got[8].isnan().all()
    assert_same_bits(got[9:], clean[9:])  # the other transcript


@each_window
@pytest.mark.parametrize("layout", [*LAYOUTS.values(), LONG["many-gaps"]], ids=[*LAYOUTS, "many-gaps"])
def test_reference_with_tiles_that_do_not_divide_the_queries(
    layout: Layout, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "QUERY_TILE", 4)
    q, k, v, *rest = problem(layout)
    truth = fp64(layout, q, k, v, window)
    check(REFERENCE, lambda p: [run(p, q, k, v, *rest, window=window)], [truth], TOLERANCES[torch.float32])


@pytest.mark.parametrize(
    ("segment", "window", "parts"),
    [
        (([], [(0, 4)]), None, []),
        ((range(5), [(0, 5)]), None, ["causal"]),
        ((range(5, 8), [(0, 8)]), None, ["all", "causal"]),
        ((range(5, 8), [(0, 3), (4, 6), (9, 12)]), None, ["all", "all", "causal"]),
        (([5, 7], [(0, 3), (4, 12)]), None, ["all", "all", "mask"]),
        (([0, 7], [(0, 8)]), None, ["mask"]),
        ((range(5), [(0, 5)]), 3, ["mask", "mask"]),  # two tiles of at most 4 queries
        ((range(4, 7), [(0, 3), (5, 9)]), 3, ["mask"]),  # keys of both ranges, gathered
        ((range(6, 8), [(0, 3), (5, 10)]), 2, ["mask"]),  # keys of the last range only
        (([*range(0, 18, 2)], [(0, 18)]), None, ["mask", "all", "mask", "all", "mask"]),  # 4 + 4 + 1 queries
    ],
    ids=[
        "no-query",
        "dense",
        "dense-with-prefix",
        "dense-on-ranges",
        "gaps-with-prefix",
        "gaps",
        "window-tiles",
        "window-over-ranges",
        "window-in-one-range",
        "gaps-tiles",
    ],
)
def test_reference_takes_the_branch_that_each_case_is_for(
    segment: Segment, window: int | None, parts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "QUERY_TILE", 4)
    taken: list[str] = []
    attend = reference._attend

    def record(
        q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None, is_causal: bool = False
    ) -> tuple[Tensor, Tensor]:
        taken.append("causal" if is_causal else "all" if mask is None else "mask")
        return attend(q, k, v, scale, mask, is_causal)

    monkeypatch.setattr(reference, "_attend", record)
    layout = Layout((segment,))
    q, k, v, *rest = problem(layout)
    got = run(REFERENCE, q, k, v, *rest, window=window)
    assert taken == parts
    torch.testing.assert_close(got.double(), fp64(layout, q, k, v, window), rtol=0, atol=TOLERANCES[torch.float32])
