"""Tiles of queries: each query in one, and what shares keys together."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from support.attention import LAYOUTS, LONG, Layout

from psykern.kernels import tiles

CPU = torch.device("cpu")


def rows_of(layout: Layout, tile_queries: int) -> list[list[int]]:
    return layout.kernel_segments().tiles(tile_queries, CPU).table.tolist()


@pytest.mark.parametrize("tile_queries", [1, 2, 18, 64])
@pytest.mark.parametrize("layout", [*LAYOUTS.values(), *LONG.values()], ids=[*LAYOUTS, *LONG])
def test_each_query_is_in_one_tile_and_the_longest_come_first(layout: Layout, tile_queries: int) -> None:
    rows = rows_of(layout, tile_queries)
    queries = [q for row in rows for q in range(row[tiles.FIRST_QUERY], row[tiles.END_QUERY])]
    assert sorted(queries) == list(range(layout.num_queries))
    assert all(row[tiles.END_QUERY] - row[tiles.FIRST_QUERY] <= tile_queries for row in rows)
    limits = [row[tiles.LIMIT] for row in rows]
    assert limits == sorted(limits, reverse=True)


def options(point: int, rows: Sequence[int], length: int = 3) -> list[tuple[range, list[tuple[int, int]]]]:
    """Branches of ``length`` tokens each, behind ``point`` tokens of one transcript."""
    return [(range(point, point + length), [(0, point), (row, row + length)]) for row in rows]


def test_answer_options_share_a_tile() -> None:
    """16 branches of 3 tokens at each of two responses: 96 queries in two tiles of up to 64, no branch cut."""
    layout = Layout((*options(500, range(600, 648, 3)), *options(520, range(648, 696, 3))))
    rows = rows_of(layout, 64)
    assert len(rows) == 2
    assert all(row[tiles.END_TAIL] > row[tiles.FIRST_TAIL] >= 600 for row in rows)
    assert {row[tiles.LIMIT] for row in rows} == {520}  # the trunk goes as far as the longest branch's
    assert [row[tiles.MIN_LIMIT] for row in rows] == [500, 520]
    assert rows_of(layout, 4)[0][tiles.END_TAIL] == 0  # where a tile holds hardly more than one, each is on its own


@pytest.mark.parametrize(
    "segments",
    [
        [*options(50, [100]), *options(50, [110])],  # other rows between the two
        [(range(50, 53), [(0, 50), (100, 103)]), (range(50, 53), [(1, 51), (103, 106)])],  # other trunks
        [*options(50, [100, 120], length=20)],  # too long to be packed in tiles of 64
    ],
    ids=["gap", "trunks", "long"],
)
def test_what_shares_no_keys_or_is_long_has_a_tile_of_its_own(segments: Sequence[object]) -> None:
    rows = rows_of(Layout(tuple(segments)), 64)  # type: ignore[arg-type]
    assert len(rows) == 2
    assert all(row[tiles.END_TAIL] == 0 for row in rows)
