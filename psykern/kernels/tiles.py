"""Plans the query tiles of prefix_attention on the CPU, from the arrays that describe a batch's segments.

A tile is a run of queries that one program answers together. Long segments are cut into tiles. Neighbouring short
segments that branch off one path (the answer options of a transcript: the same ranges but for how far they go along
the last of them, and rows of their own behind) share a tile: the common keys, the *trunk*, are read once for all, then
the rows of their own, the *tails*. A query sees the keys at places of the trunk below its limit, and tail rows from
its begin to its end.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from psykern.core import csr

_PACK_SHARE = 4  # a segment is short where a tile holds at least so many of it

# Columns of the tiles' table.
FIRST_QUERY, END_QUERY, FIRST_RANGE, END_RANGE, FIRST_TAIL, END_TAIL = range(6)
FIRST_POSITION, LAST_POSITION, LIMIT, MIN_LIMIT = range(6, 10)
NUM_COLUMNS = 10


@dataclass(frozen=True, slots=True, eq=False)
class QueryTiles:
    """On the device of the queries."""

    table: Tensor  # [tiles, NUM_COLUMNS] int32, longest first
    key_ranges: Tensor  # [n, 2] int32
    limits: Tensor  # [N] int32, keys of the trunk that each query sees, without a window
    tails: Tensor  # [N, 2] int32, rows of the store
    positions: Tensor  # [N] int32
    num_tiles: int


@dataclass(frozen=True, slots=True, eq=False)
class _Active:
    """The segments that have queries, in order."""

    starts: np.ndarray  # [A] int32, first query
    counts: np.ndarray  # [A] int32, queries
    first_range: np.ndarray  # [A] int32, of the path
    end_range: np.ndarray  # [A] int32
    last_range: np.ndarray  # [A] int32; 0 where the path has no range
    trunk: np.ndarray  # [A] int32, keys of the path before its last range


def plan_tiles(
    positions: np.ndarray,
    query_offsets: np.ndarray,
    range_offsets: np.ndarray,
    key_ranges: np.ndarray,
    tile_queries: int,
    device: torch.device,
) -> QueryTiles:
    """The tiles of at most ``tile_queries`` queries each; see :class:`psykern.kernels.Segments` for the arrays."""
    active = _active(query_offsets, range_offsets, key_ranges)
    groups = _groups(active, positions, key_ranges, tile_queries)
    limits, tails = _limits(active, groups, positions, key_ranges)
    table = _table(active, groups, tile_queries, positions, limits, tails)
    return QueryTiles(
        table=_upload(table, device),
        key_ranges=_upload(key_ranges, device),
        limits=_upload(limits, device),
        tails=_upload(tails, device),
        positions=_upload(positions, device),
        num_tiles=len(table),
    )


def _active(query_offsets: np.ndarray, range_offsets: np.ndarray, key_ranges: np.ndarray) -> _Active:
    active = np.flatnonzero(np.diff(query_offsets))
    first_range, end_range = range_offsets[active], range_offsets[active + 1]
    last_range = np.maximum(end_range - 1, 0)
    keys = csr.offsets_of(key_ranges[:, 1] - key_ranges[:, 0])  # before each range, over all paths
    return _Active(
        starts=query_offsets[active],
        counts=np.diff(query_offsets)[active],
        first_range=first_range,
        end_range=end_range,
        last_range=last_range,
        trunk=(keys[last_range] - keys[first_range]).astype(np.int32),
    )


def _limits(
    active: _Active, groups: np.ndarray, positions: np.ndarray, key_ranges: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """By query: how many keys of the trunk it sees [N], and the begin and end of the rows it sees behind it [N, 2]."""
    segment = np.repeat(np.arange(len(active.counts)), active.counts)  # of each query
    in_pack = np.repeat(np.diff(groups) > 1, np.diff(groups))[segment]
    trunk = active.trunk[segment]
    own = key_ranges[active.last_range, 0][segment] if len(key_ranges) else trunk
    limits = np.where(in_pack, trunk, positions + 1)
    tails = np.where(in_pack[:, None], np.stack((own, own + positions + 1 - trunk), axis=1), 0)
    return limits, tails


def _table(
    active: _Active,
    groups: np.ndarray,
    tile_queries: int,
    positions: np.ndarray,
    limits: np.ndarray,
    tails: np.ndarray,
) -> np.ndarray:
    """[tiles, NUM_COLUMNS], those with the most keys first, so that no long one begins when all others are done."""
    begins, is_packed = groups[:-1], np.diff(groups) > 1
    longest = begins.copy()  # the segment of each group whose trunk holds those of all others
    for g in np.flatnonzero(is_packed):
        longest[g] += int(active.trunk[begins[g] : groups[g + 1]].argmax())
    queries = csr.reduce(np.add, active.counts, groups)
    pieces = -(-queries // tile_queries)
    owner, piece = csr.members(np.zeros_like(pieces), pieces)  # of each tile
    first = active.starts[begins][owner] + piece * tile_queries
    of_tile = np.append(first, len(positions))  # the tiles' queries stand end to end
    table = np.zeros((len(owner), NUM_COLUMNS), np.int32)
    table[:, FIRST_QUERY] = first
    table[:, END_QUERY] = of_tile[1:]
    table[:, FIRST_RANGE] = active.first_range[longest][owner]
    table[:, END_RANGE] = (active.end_range[longest] - is_packed)[owner]
    table[:, FIRST_POSITION] = csr.reduce(np.minimum, positions, of_tile)
    table[:, LAST_POSITION] = csr.reduce(np.maximum, positions, of_tile)
    table[:, LIMIT] = csr.reduce(np.maximum, limits, of_tile)
    table[:, MIN_LIMIT] = csr.reduce(np.minimum, limits, of_tile)
    table[:, FIRST_TAIL] = np.where(is_packed[owner], csr.reduce(np.minimum, tails[:, 0], of_tile), 0)
    table[:, END_TAIL] = csr.reduce(np.maximum, tails[:, 1], of_tile)
    return table[np.argsort(-table[:, LIMIT], kind="stable")]


def _groups(active: _Active, positions: np.ndarray, key_ranges: np.ndarray, tile_queries: int) -> np.ndarray:
    """CSR offsets [G+1] of the active segments: those of one group are answered together."""
    if len(active.starts) == 0 or len(key_ranges) == 0:
        return np.arange(len(active.starts) + 1)
    is_short = (active.end_range - active.first_range >= 2) & (active.counts * _PACK_SHARE <= tile_queries)
    is_short &= positions[active.starts] >= active.trunk  # all queries see the whole trunk
    is_short &= np.diff(key_ranges[active.last_range], axis=1)[:, 0] <= tile_queries
    chain = np.concatenate(([0], np.cumsum(~_links(active, is_short, key_ranges))))
    heads = np.flatnonzero(np.diff(chain, prepend=-1))  # the first segment of each chain
    before = active.starts - active.starts[heads][chain]  # queries of the chain before this segment
    longest = int(active.counts[is_short].max(initial=1))
    pack = np.where(is_short, before // (tile_queries - longest + 1), 0)
    is_next = (np.diff(chain, prepend=-1) != 0) | (np.diff(pack, prepend=0) != 0)  # begins another group
    return np.append(np.flatnonzero(is_next), len(is_next))


def _links(active: _Active, is_short: np.ndarray, key_ranges: np.ndarray) -> np.ndarray:
    """[A-1]: whether the next segment can share a tile with this one. It has as many ranges, the last right behind
    this one's; all but the last two are equal; and the one before the last begins at the same row."""
    num_ranges, last = active.end_range - active.first_range, active.last_range
    links = is_short[:-1] & is_short[1:] & (num_ranges[:-1] == num_ranges[1:])
    links &= key_ranges[last[:-1], 1] == key_ranges[last[1:], 0]
    candidates = np.flatnonzero(links)
    counts = num_ranges[candidates]
    owner, place = csr.members(np.zeros_like(counts), counts)  # of each range: its path, and its place there
    here = key_ranges[active.first_range[candidates][owner] + place]
    there = key_ranges[active.first_range[candidates + 1][owner] + place]
    to_last = counts[owner] - 1 - place
    same = (here[:, 0] == there[:, 0]) & ((here[:, 1] == there[:, 1]) | (to_last == 1)) | (to_last == 0)
    links[candidates] = csr.reduce(np.logical_and, same, csr.offsets_of(counts))
    return links


def _upload(array: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array, np.int32))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
