"""Segments and their paths, for attention: each layout is a form that a wave can have."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from support.backends import LONGEST_TILE, Place, poisoned_memory
from torch import Tensor

from psykern import kernels

Range = tuple[int, int]

Segment = tuple[Sequence[int], Sequence[Range]]  # positions of its queries, rows of its path


@dataclass(frozen=True, slots=True)
class Layout:
    """Segments in order; the store has rows that none of them names."""

    segments: tuple[Segment, ...]

    @property
    def num_queries(self) -> int:
        return sum(len(positions) for positions, _ in self.segments)

    @property
    def num_store_rows(self) -> int:
        return 3 + max((end for _, ranges in self.segments for _, end in ranges), default=0)

    def path(self, s: int) -> list[int]:
        """Rows of the keys of segment s, by position."""
        return [row for begin, end in self.segments[s][1] for row in range(begin, end)]

    def kernel_segments(self) -> kernels.Segments:
        """The segments as the operation takes them."""
        positions = [p for segment, _ in self.segments for p in segment]
        query_offsets = torch.tensor([0, *(len(segment) for segment, _ in self.segments)]).cumsum(0)
        range_offsets = torch.tensor([0, *(len(ranges) for _, ranges in self.segments)]).cumsum(0)
        ranges = [r for _, ranges in self.segments for r in ranges]
        return kernels.Segments(
            torch.tensor(positions, dtype=torch.int32),
            query_offsets.int(),
            range_offsets.int(),
            torch.tensor(ranges, dtype=torch.int32).view(-1, 2),
        )


LAYOUTS = {
    "causal": Layout(((range(13), [(0, 13)]),)),
    "one-key": Layout((([0], [(3, 4)]),)),
    "two-transcripts": Layout(((range(9), [(0, 9)]), (range(5), [(9, 14)]))),
    "trie": Layout(
        (
            (range(4), [(0, 4)]),
            (range(4, 9), [(0, 9)]),  # a child right behind its parent: one range
            (range(9, 12), [(0, 12)]),  # and its child
            (range(4, 9), [(0, 4), (12, 17)]),  # a sibling, away from the parent
            (range(9, 11), [(0, 4), (12, 19)]),
            (range(9, 10), [(0, 4), (12, 17), (19, 20)]),  # a branch of one token on two ranges of ancestors
        )
    ),
    "carried": Layout((([*range(3, 8)], [(1, 4), (6, 11)]), ([3], [(0, 3), (11, 12)]), ([4], [(2, 6), (12, 13)]))),
    "gaps": Layout((([5, 6, 9, 11], [(0, 5), (6, 13)]), ([9], [(0, 10)]), ([2, 7, 8, 30, 31], [(0, 33)]))),
    "branches-with-gaps": Layout(
        ((range(20), [(0, 20)]), *((range(10, 13), [(0, 10), (row, row + 3)]) for row in (20, 25, 28)))
    ),
    "one-key-short-of-a-block": Layout(tuple((range(n - 2, n + 9), [(0, n + 9)]) for n in (16, 32, 64, 128))),
    "no-queries": Layout(
        (([], [(0, 2)]), (range(5), [(0, 5)]), ([], []), ([], [(0, 5)]), ([5], [(0, 5), (7, 8)]), ([], []))
    ),
    "only-no-queries": Layout((([], [(0, 2)]), ([], []))),
    "no-segments": Layout(()),
    "keys-behind-the-last-query": Layout((([1, 2, 3], [(0, 9)]), ([4, 6], [(0, 3), (9, 15)]))),
}


def deep(count: int, queries: int, own: int) -> Segment:
    """A segment below `count` ancestors of 1 to 7 rows each, its own rows from `own` on."""
    ancestors = [(8 * i, 8 * i + 1 + i % 7) for i in range(count)]
    depth = sum(end - begin for begin, end in ancestors)
    return range(depth, depth + queries), [*ancestors, (own, own + queries)]


def branches(tokens: int, every: int) -> Layout:
    """A transcript, and behind it four branches of 3 tokens at every `every`-th of its tokens."""
    points = [point for point in range(every, tokens, every) for _ in range(4)]
    ends = [tokens + 3 * (i + 1) for i in range(len(points))]
    options = [(range(p, p + 3), [(0, p), (end - 3, end)]) for p, end in zip(points, ends, strict=True)]
    return Layout(((range(tokens), [(0, tokens)]), *options))


def long(count: int) -> int:
    """``count`` where the longest tile of queries has 128, as many for its length."""
    return count * LONGEST_TILE // 128


LONG = {  # beyond every tile of queries and of keys
    "long-700": Layout(((range(long(700)), [(0, long(700))]),)),
    "long-on-two-ranges": Layout(
        (
            (range(long(300)), [(0, long(300))]),
            (range(long(300), long(571)), [(0, long(300)), (long(310), long(310) + long(571) - long(300))]),
        )
    ),
    "long-gaps": Layout((([0, 1, long(600), long(1300), long(2000) - 1], [(0, long(2000))]),)),  # whole blocks masked
    "many-gaps": Layout((([*range(0, long(600), 2)], [(0, long(600))]),)),  # two tiles and a bit, each with gaps
    "deep-ancestors": Layout((deep(150, 3, 1200), deep(150, 4, 1203), deep(100, 2, 1207))),
    "branches": branches(long(700), 20),  # 420 queries that share more and more keys with those before
}


# the reference needs two thirds; half precision rounds the output once for each range of the path
TOLERANCES = {torch.float32: 1.5e-6, torch.bfloat16: 1.5e-2, torch.float16: 2.5e-3}

SCALE = 0.3  # not Dh ** -0.5, so that a kernel that takes that for granted shows


def problem(
    layout: Layout, heads: tuple[int, int] = (4, 2), size: int = 16, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, kernels.Segments]:
    """q, k, v, segments."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(layout.num_queries, heads[0], size, generator=generator)
    k, v = torch.randn(2, layout.num_store_rows, heads[1], size, generator=generator)
    return q.to(dtype), k.to(dtype), v.to(dtype), layout.kernel_segments()


def put(place: Place, segments: kernels.Segments) -> kernels.Segments:
    """Copies on the place's device, as ``Place.put`` makes of tensors."""
    arrays = (segments.positions, segments.query_offsets, segments.range_offsets, segments.key_ranges)
    return kernels.Segments(*place.put(*arrays))


def fp64(layout: Layout, q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float = SCALE) -> Tensor:
    """Scores of all queries with all rows of the store, masked, then softmax."""
    sees = torch.zeros(q.shape[0], k.shape[0], dtype=torch.bool)
    n = 0
    for s, (positions, _) in enumerate(layout.segments):
        rows = torch.tensor(layout.path(s), dtype=torch.int64)
        places = torch.arange(len(rows))
        for p in positions:
            first = 0 if window is None else p - window + 1
            sees[n, rows] = (first <= places) & (places <= p)
            n += 1
    group = q.shape[1] // k.shape[1]
    keys, values = (x.double().repeat_interleave(group, dim=1) for x in (k, v))  # [M, Hq, Dh]
    scores = torch.einsum("nhd,mhd->hnm", q.double(), keys) * scale
    weights = scores.masked_fill(~sees, -math.inf).softmax(-1)
    return torch.einsum("hnm,mhd->nhd", weights, values)


def rounding_of_scores(layout: Layout, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> float:
    """What one step of fp32 in each score (eps |s|) does to an output at most, to first order: sum w eps |s| |v - o|.

    Absolute for outputs up to 1, relative above. The last bit of a score is the vendor's: MKL's products with AVX2 and
    with AVX-512 differ in it, and where few keys have all the weight the output moves by more than any fixed tolerance.
    """
    truth = fp64(layout, q, k, v, window)
    group, most, n = q.shape[1] // k.shape[1], 0.0, 0
    for s, (positions, _) in enumerate(layout.segments):
        path = layout.path(s)
        for p in positions:
            rows = path[0 if window is None else max(0, p - window + 1) : p + 1]
            keys, values = (x[rows].double().repeat_interleave(group, dim=1) for x in (k, v))  # [keys, Hq, Dh]
            scores = torch.einsum("hd,mhd->mh", q[n].double(), keys) * SCALE
            steps = scores.softmax(0) * scores.abs() * torch.finfo(torch.float32).eps
            moved = (steps[..., None] * (values - truth[n]).abs()).sum(0)
            most = max(most, float((moved / truth[n].abs().clamp(min=1)).max()))
            n += 1
    return most


def run(
    place: Place,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: kernels.Segments,
    window: int | None = None,
    scale: float = SCALE,
) -> Tensor:
    with poisoned_memory():
        on_device = (*place.put(q, k, v), put(place, segments))
        return kernels.prefix_attention(*on_device, softmax_scale=scale, window=window, backend=place.backend).cpu()
