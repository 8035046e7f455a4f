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


def plan_tiles(
    positions: np.ndarray,
    query_offsets: np.ndarray,
    range_offsets: np.ndarray,
    key_ranges: np.ndarray,
    tile_queries: int,
    device: torch.device,
) -> QueryTiles:
    """The tiles of at most ``tile_queries`` queries each; see :class:`psykern.kernels.Segments` for the arrays."""
    active = np.flatnonzero(np.diff(query_offsets))  # segments with queries
    starts, counts = query_offsets[active], np.diff(query_offsets)[active]
    first_range, end_range = range_offsets[active], range_offsets[active + 1]
    sizes = np.concatenate(([0], np.cumsum(key_ranges[:, 1] - key_ranges[:, 0], dtype=np.int64)))
    last = np.maximum(end_range - 1, 0)
    trunk = (sizes[last] - sizes[first_range]).astype(np.int32)  # keys before the last range
    group = _groups(positions, key_ranges, starts, counts, first_range, end_range, trunk, tile_queries)

    begins = np.flatnonzero(np.diff(group, prepend=-1))  # first segment of each group, among the active
    ends = np.append(begins[1:], len(group)).astype(np.int64)
    is_packed = ends - begins > 1
    longest = begins.copy()  # the segment whose trunk holds those of all others
    for g in np.flatnonzero(is_packed):
        longest[g] += int(trunk[begins[g] : ends[g]].argmax())

    packed = np.repeat(is_packed, ends - begins)  # by segment
    segment = np.repeat(np.arange(len(active)), counts)  # of each query
    own = key_ranges[last, 0] if len(key_ranges) else trunk
    beyond = positions + 1 - trunk[segment]
    in_pack = packed[segment]
    limits = np.where(in_pack, trunk[segment], positions + 1).astype(np.int32)
    tails = np.where(in_pack[:, None], own[segment][:, None] + np.stack((0 * beyond, beyond), axis=1), 0)

    queries = np.append(starts, len(positions))
    queries = queries[ends] - queries[begins]  # of each group
    pieces = -(-queries // tile_queries)
    owner = np.repeat(np.arange(len(begins)), pieces)
    piece = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    table = np.zeros((len(owner), NUM_COLUMNS), np.int32)
    table[:, FIRST_QUERY] = starts[begins][owner] + piece * tile_queries
    table[:, END_QUERY] = np.minimum(table[:, FIRST_QUERY] + tile_queries, (starts[begins] + queries)[owner])
    table[:, FIRST_RANGE] = first_range[longest][owner]
    table[:, END_RANGE] = (end_range[longest] - is_packed)[owner]
    if len(table):
        first = table[:, FIRST_QUERY]
        table[:, FIRST_POSITION] = np.minimum.reduceat(positions, first)
        table[:, LAST_POSITION] = np.maximum.reduceat(positions, first)
        table[:, LIMIT] = np.maximum.reduceat(limits, first)
        table[:, MIN_LIMIT] = np.minimum.reduceat(limits, first)
        table[:, FIRST_TAIL] = np.where(is_packed[owner], np.minimum.reduceat(tails[:, 0], first), 0)
        table[:, END_TAIL] = np.maximum.reduceat(tails[:, 1], first)
    order = np.argsort(-table[:, LIMIT], kind="stable")
    return QueryTiles(
        table=_upload(table[order], device),
        key_ranges=_upload(key_ranges, device),
        limits=_upload(limits, device),
        tails=_upload(tails, device),
        positions=_upload(positions, device),
        num_tiles=len(table),
    )


def _groups(
    positions: np.ndarray,
    key_ranges: np.ndarray,
    starts: np.ndarray,
    counts: np.ndarray,
    first_range: np.ndarray,
    end_range: np.ndarray,
    trunk: np.ndarray,
    tile_queries: int,
) -> np.ndarray:
    """[segments] ascending numbers: segments of one number are answered together."""
    if len(starts) == 0:
        return np.zeros(0, np.int64)
    num_ranges = end_range - first_range
    last = np.maximum(end_range - 1, 0)
    is_short = (num_ranges >= 2) & (counts * _PACK_SHARE <= tile_queries) & (positions[starts] >= trunk)
    is_short &= np.diff(key_ranges[last], axis=1)[:, 0] <= tile_queries if len(key_ranges) else False
    # The next segment continues a pack: as many ranges, the last right behind this one's, all but the last two equal,
    # the one before the last from the same row.
    links = is_short[:-1] & is_short[1:] & (num_ranges[:-1] == num_ranges[1:])
    links &= key_ranges[last[:-1], 1] == key_ranges[last[1:], 0] if len(key_ranges) else False
    candidates = np.flatnonzero(links)
    if len(candidates):
        n = num_ranges[candidates]
        offsets = np.cumsum(n) - n
        place = np.arange(n.sum()) - np.repeat(offsets, n)  # of a range on its path
        here = key_ranges[np.repeat(first_range[candidates], n) + place]
        there = key_ranges[np.repeat(first_range[candidates + 1], n) + place]
        same = (here[:, 0] == there[:, 0]) & ((here[:, 1] == there[:, 1]) | (place == np.repeat(n, n) - 2))
        same |= place == np.repeat(n, n) - 1
        links[candidates] = np.logical_and.reduceat(same, offsets)
    chain = np.concatenate(([0], np.cumsum(~links)))
    before = starts - starts[np.flatnonzero(np.diff(chain, prepend=-1))][chain]  # queries of the chain before this
    longest = int(counts[is_short].max(initial=1))
    pack = np.where(is_short, before // (tile_queries - longest + 1), 0)
    return np.cumsum((np.diff(chain, prepend=0) != 0) | (np.diff(pack, prepend=0) != 0))


def _upload(array: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array, np.int32))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
