"""What the queries of one call of ``prefix_attention`` see: a token tree cut into segments, each with its path.

A segment is a run of queries below one node of the tree. Its path is the list of all keys from the root to its last
query, named by ranges of rows of k and v. Key j of a segment's list is token j of its path; a query at position p sees
keys 0..p.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from psykern.kernels.checks import expect, expect_dtype, expect_offsets, span
from psykern.kernels.tiles import QueryTiles, plan_tiles


@dataclass(frozen=True, slots=True, eq=False)
class Segments:
    """Checked once, when made; raises ``ValueError`` for what does not fit.

    The arrays may stay on the CPU whatever the device of the queries, and are best left there: tiles are planned on the
    CPU. They must not be changed afterwards, for the tiles planned from them are kept here.
    """

    positions: Tensor  # [N] int32, of the queries, ascending within a segment
    query_offsets: Tensor  # [S+1] int32: segment s has the queries query_offsets[s] to query_offsets[s+1]
    range_offsets: Tensor  # [S+1] int32: its keys are the ranges range_offsets[s] to range_offsets[s+1]
    key_ranges: Tensor  # [n, 2] int32, rows of k and v, half open; a segment's own keys are in its last range
    key_span: tuple[int, int] | None = field(init=False)  # least and largest of key_ranges; None: none, or on a device
    _tiles: dict[tuple[int, torch.device], QueryTiles] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        queries, ranges, shape = self.query_offsets, self.key_ranges, list(self.query_offsets.shape)
        expect("positions", self.positions.dim() == 1, "[N]", self.positions)
        expect("query_offsets", queries.dim() == 1, "[S+1]", queries)
        expect("range_offsets", list(self.range_offsets.shape) == shape, f"{shape}", self.range_offsets)
        expect("key_ranges", ranges.dim() == 2 and ranges.shape[1] == 2, "[n, 2]", ranges)
        for name in ("positions", "query_offsets", "range_offsets", "key_ranges"):
            expect_dtype(name, getattr(self, name), (torch.int32,))
        expect_offsets("query_offsets", queries, self.positions.shape[0])
        expect_offsets("range_offsets", self.range_offsets, ranges.shape[0])
        object.__setattr__(self, "key_span", span(ranges))

    def tiles(self, tile_queries: int, device: torch.device) -> QueryTiles:
        """The queries cut into tiles of at most ``tile_queries``, on ``device``: planned once for each such pair.
        Where the segments themselves are on a device, planning waits for it."""
        key = (tile_queries, device)
        if key not in self._tiles:
            self._tiles[key] = plan_tiles(
                self.positions.cpu().numpy(),
                self.query_offsets.cpu().numpy(),
                self.range_offsets.cpu().numpy(),
                self.key_ranges.cpu().numpy(),
                tile_queries,
                device,
            )
        return self._tiles[key]
