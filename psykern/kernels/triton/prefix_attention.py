"""prefix_attention: online softmax over the keys of each tile of queries, range by range of their path.

One program answers the query heads of one key head for the queries of one tile (:mod:`psykern.kernels.tiles`),
so that a key is read once for all of them. Blocks of keys that all queries of the tile see need no mask; those that
none sees, behind the last query or before the window, are not read. What lies between, at the edges, is masked, in
smaller blocks where these leave registers to the others. On Hopper TMA fetches all blocks: what ``cp.async`` fetches
must not feed wgmma without a fence, which Triton 3.6 leaves out.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from psykern.kernels import tiles
from psykern.kernels.segments import Segments
from psykern.kernels.triton.common import (
    LOG2E,
    dense_rows,
    descriptor,
    has_aligned_rows,
    is_hopper,
    is_wide,
    on_device_of,
    power_of_2,
)

MAX_HEAD_DIM = 256


class Blocks(NamedTuple):
    """Rows (queries times heads) and keys of a program's products, keys of its masked ones, and what it takes."""

    block_m: int
    block_n: int
    block_e: int
    num_warps: int
    num_stages: int


def blocks_of(head_dim: int, dtype: torch.dtype, hopper: bool, use_tma: bool) -> Blocks:
    """By head size and dtype: the largest that spill no register, by Triton 3.6 nor 3.9
    (benchmarks/results/triton_resources_*.csv). Loads take registers, but not those by TMA (``use_tma``). With heads of
    128 on Hopper two smaller programs share a multiprocessor, and one takes exponentials while the other multiplies:
    on an H200 1.12 times as fast as one of 128 x 128 on sequences of many lengths (results/attention_h200.csv)."""
    if dtype == torch.float32:
        if head_dim > 128:
            return Blocks(16, 16, 16, 8, 1)
        return Blocks(32 if head_dim <= 64 else 16, 32, 32, 8, 2) if hopper else Blocks(32, 32, 32, 8, 1)
    if use_tma:
        if head_dim <= 64:
            return Blocks(128, 64, 32, 8, 3)
        return Blocks(64, 64, 32, 4, 3) if head_dim <= 128 else Blocks(64, 64, 32, 8, 3)
    if hopper:  # in one stage, so not by cp.async, see above
        return Blocks(128, 64, 64, 8, 1) if head_dim <= 128 else Blocks(64, 32, 32, 8, 1)
    if head_dim <= 64:
        return Blocks(128, 64, 64, 8, 3)
    if head_dim > 128:
        return Blocks(64, 32, 32, 8, 1)
    return Blocks(128, 64, 64, 8, 2) if head_dim == 128 else Blocks(64, 32, 32, 8, 2)


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    softmax_scale: float,
    window: int | None,
    out: Tensor,
) -> Tensor:
    if q.shape[2] > MAX_HEAD_DIM:
        raise ValueError(f"q: expected heads of at most {MAX_HEAD_DIM} numbers, got {q.shape[2]}")
    if q.numel() == 0:
        return out
    q, k, v = dense_rows(q), dense_rows(k.to(q.dtype)), dense_rows(v.to(q.dtype))
    use_tma = uses_tma(k, v)
    blocks = blocks_of(q.shape[2], q.dtype, is_hopper(q.device), use_tma)
    group = q.shape[1] // k.shape[1]
    block_m = max(blocks.block_m, power_of_2(group))
    cut = segments.tiles(block_m // group, q.device)
    target = out if dense_rows(out) is out else torch.empty_like(out, memory_format=torch.contiguous_format)
    with on_device_of(q):
        attention_kernel[(cut.num_tiles * k.shape[1],)](
            q,
            k,
            v,
            *(descriptors_of(k, blocks) if use_tma else (None, None)),
            *(descriptors_of(v, blocks) if use_tma else (None, None)),
            target,
            cut.table,
            cut.key_ranges,
            cut.limits,
            cut.tails,
            cut.positions,
            q.stride(0),
            k.stride(0),
            v.stride(0),
            target.stride(0),
            k.shape[1],
            softmax_scale,
            0 if window is None else window,
            q.shape[2],
            GROUP=group,
            HAS_WINDOW=window is not None,
            IS_WIDE=is_wide(q.dtype),
            USE_TMA=use_tma,
            BLOCK_M=block_m,
            BLOCK_N=blocks.block_n,
            BLOCK_E=blocks.block_e,
            BLOCK_D=power_of_2(q.shape[2]),
            num_warps=blocks.num_warps,
            num_stages=blocks.num_stages,
        )
    return out if target is out else out.copy_(target)


def uses_tma(k: Tensor, v: Tensor) -> bool:
    """Whether TMA fetches the keys and values: 16-bit numbers, heads of a power of 2 of them, and rows
    that begin at multiples of 16 bytes."""
    size = k.shape[2]
    is_fit = k.dtype != torch.float32 and size == power_of_2(size) and is_hopper(k.device)
    return is_fit and has_aligned_rows(k) and has_aligned_rows(v)


def descriptors_of(x: Tensor, blocks: Blocks) -> tuple[TensorDescriptor, TensorDescriptor]:
    """For TMA, of keys or values: of blocks that need no mask, and of those at the edges."""
    rows, size = x.flatten(1), x.shape[2]
    whole = descriptor(rows, blocks.block_n, size)
    return whole, whole if blocks.block_e == blocks.block_n else descriptor(rows, blocks.block_e, size)


# The columns of the tiles' table, as constants that a kernel may read.
FIRST_QUERY, END_QUERY = tl.constexpr(tiles.FIRST_QUERY), tl.constexpr(tiles.END_QUERY)
FIRST_RANGE, END_RANGE = tl.constexpr(tiles.FIRST_RANGE), tl.constexpr(tiles.END_RANGE)
FIRST_TAIL, END_TAIL = tl.constexpr(tiles.FIRST_TAIL), tl.constexpr(tiles.END_TAIL)
FIRST_POSITION, LAST_POSITION = tl.constexpr(tiles.FIRST_POSITION), tl.constexpr(tiles.LAST_POSITION)
LIMIT, MIN_LIMIT = tl.constexpr(tiles.LIMIT), tl.constexpr(tiles.MIN_LIMIT)
NUM_COLUMNS = tl.constexpr(tiles.NUM_COLUMNS)


@triton.jit
def fetch(source, row, offs_n, offs_d, inside, IS_MASKED: tl.constexpr, USE_TMA: tl.constexpr):
    """The block [BLOCK_N, BLOCK_D] of keys or values in the store from ``row`` on. IS_MASKED: 0 where it is not
    ``inside``; but what TMA fetches is what stands there."""
    x_ptr, x_desc, stride, column = source
    places = (row + offs_n).to(tl.int64)[:, None] * stride + offs_d[None, :]
    if USE_TMA:
        x = x_desc.load([row, column])
    elif IS_MASKED:
        x = tl.load(x_ptr + places, mask=inside, other=0.0)
    else:
        x = tl.load(x_ptr + places)
    return x


@triton.jit
def attend(
    q,
    softmax,  # (acc [BLOCK_M, BLOCK_D], maximum [BLOCK_M], total [BLOCK_M]) of the keys before
    keys,  # (pointer, tensor descriptor, stride, column), see ``fetch``
    values,
    span,  # (row, begin, end, skip_from, skip); from begin to skip_from are whole blocks
    sees,  # (lows [BLOCK_M], highs [BLOCK_M]), with IS_MASKED
    offs_d,
    scale,
    Dh: tl.constexpr,
    IS_MASKED: tl.constexpr,
    IS_WIDE: tl.constexpr,
    USE_TMA: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``softmax`` with the keys at places ``begin`` to ``end`` behind store row ``row``, without ``skip`` of them from
    place ``skip_from`` on. With IS_MASKED a query sees those from its ``lows`` to its ``highs``, else all."""
    acc, maximum, total = softmax
    row, begin, end, skip_from, skip = span
    lows, highs = sees
    highs = tl.minimum(highs, end)
    offs_n = tl.arange(0, BLOCK_N)
    for i in range(begin, end - skip, BLOCK_N):
        first = i + tl.where(i >= skip_from, skip, 0)  # of the block, whose places follow one another
        places = first + offs_n
        inside = (places < end)[:, None] & (offs_d < Dh)[None, :]
        k = fetch(keys, row + first, offs_n, offs_d, inside, IS_MASKED or Dh != offs_d.shape[0], USE_TMA)
        if IS_WIDE:
            scores = tl.dot(q.to(tl.float32), tl.trans(k.to(tl.float32)), input_precision="ieee")
        else:
            scores = tl.dot(q, tl.trans(k))
        if IS_MASKED:
            is_seen = (places[None, :] >= lows[:, None]) & (places[None, :] < highs[:, None])
            scores = tl.where(is_seen, scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=1) * scale)
        shift = new_maximum
        if IS_MASKED:
            shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)  # no key was seen so far
        weights = tl.exp2(tl.fma(scores, scale, -shift[:, None]))
        rescale = tl.exp2(maximum - shift)
        total = total * rescale + tl.sum(weights, axis=1)
        acc = acc * rescale[:, None]
        maximum = new_maximum
        v = fetch(values, row + first, offs_n, offs_d, inside, IS_MASKED or Dh != offs_d.shape[0], USE_TMA)
        if IS_MASKED and USE_TMA:
            v = tl.where(inside, v, 0.0)  # behind the end may stand NaN, which a weight of 0 does not end
        if IS_WIDE:
            acc = tl.dot(weights, v.to(tl.float32), acc, input_precision="ieee")
        else:
            acc = tl.dot(weights.to(v.dtype), v, acc)
    return acc, maximum, total


@triton.jit(
    do_not_specialize=["window"],
    do_not_specialize_on_alignment=["table_ptr", "key_ranges_ptr", "limits_ptr", "tails_ptr", "positions_ptr"],
)
def attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_desc,  # tensor descriptors of k and v, see ``descriptors_of``; None without USE_TMA
    k_edge_desc,
    v_desc,
    v_edge_desc,
    out_ptr,
    table_ptr,
    key_ranges_ptr,
    limits_ptr,
    tails_ptr,
    positions_ptr,
    stride_qn,
    stride_km,
    stride_vm,
    stride_on,
    num_heads,  # of keys
    softmax_scale,
    window,
    Dh: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    IS_WIDE: tl.constexpr,
    USE_TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One tile of queries, one key head: the longest tiles of all heads first, so that none begins when all others are
    done. Row m of a product is query m // GROUP, head m % GROUP."""
    tile_ptr = table_ptr + tl.program_id(0) // num_heads * NUM_COLUMNS
    head = tl.program_id(0) % num_heads
    limit = tl.load(tile_ptr + LIMIT)
    min_limit = tl.load(tile_ptr + MIN_LIMIT)
    end_tail = tl.load(tile_ptr + END_TAIL)

    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    query = tl.load(tile_ptr + FIRST_QUERY) + offs_m // GROUP
    is_query = query < tl.load(tile_ptr + END_QUERY)
    mask = is_query[:, None] & (offs_d < Dh)[None, :]
    columns = ((head * GROUP + offs_m % GROUP) * Dh)[:, None] + offs_d[None, :]
    q = tl.load(q_ptr + query.to(tl.int64)[:, None] * stride_qn + columns, mask=mask, other=0.0)
    highs = tl.load(limits_ptr + query, mask=is_query, other=0)
    lows = tl.zeros([BLOCK_M], dtype=tl.int32)
    if HAS_WINDOW:
        lows = tl.load(positions_ptr + query, mask=is_query, other=0) - window + 1
        first_key = tl.maximum(tl.load(tile_ptr + FIRST_POSITION) - window + 1, 0)  # that some query sees
        common_key = tl.maximum(tl.load(tile_ptr + LAST_POSITION) - window + 1, 0)  # the first that all see
    scale = softmax_scale * LOG2E
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    maximum = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    softmax = (acc, maximum, tl.zeros([BLOCK_M], dtype=tl.float32))
    keys = (k_ptr + head * Dh, k_desc, stride_km, head * Dh)
    values = (v_ptr + head * Dh, v_desc, stride_vm, head * Dh)
    edge_keys = (k_ptr + head * Dh, k_edge_desc, stride_km, head * Dh)
    edge_values = (v_ptr + head * Dh, v_edge_desc, stride_vm, head * Dh)

    place = 0  # of the range's first key on the path
    for r in range(tl.load(tile_ptr + FIRST_RANGE), tl.load(tile_ptr + END_RANGE)):
        row = tl.load(key_ranges_ptr + 2 * r)
        length = tl.load(key_ranges_ptr + 2 * r + 1) - row
        end = tl.minimum(limit - place, length)
        begin = 0
        common_begin = 0
        if HAS_WINDOW:
            begin = tl.maximum(first_key - place, 0)
            common_begin = begin + tl.cdiv(tl.maximum(common_key - place, 0) - begin, BLOCK_E) * BLOCK_E
        common_keys = tl.maximum(tl.minimum(min_limit - place, length) - common_begin, 0) // BLOCK_N * BLOCK_N
        span = (row, common_begin, common_begin + common_keys, 0, 0)
        softmax = attend(
            q, softmax, keys, values, span, (lows, highs), offs_d, scale, Dh, False, IS_WIDE, USE_TMA, BLOCK_N
        )
        span = (row, begin, end, common_begin, common_keys)
        sees = (lows - place, highs - place)
        softmax = attend(
            q, softmax, edge_keys, edge_values, span, sees, offs_d, scale, Dh, True, IS_WIDE, USE_TMA, BLOCK_E
        )
        place += length
    if end_tail > 0:
        tail_ptr = tails_ptr + 2 * query
        tail_highs = tl.load(tail_ptr + 1, mask=is_query, other=0)
        tail_lows = tl.load(tail_ptr, mask=is_query, other=0)
        if HAS_WINDOW:
            tail_lows = tl.maximum(tail_lows, tail_highs - window)
        span = (0, tl.load(tile_ptr + FIRST_TAIL), end_tail, 0, 0)
        sees = (tail_lows, tail_highs)
        softmax = attend(
            q, softmax, edge_keys, edge_values, span, sees, offs_d, scale, Dh, True, IS_WIDE, USE_TMA, BLOCK_E
        )
    acc, _, total = softmax
    o = acc / total[:, None]
    # Places are computed anew, from a load that the compiler must repeat: kept, they would take registers of the loops.
    query = tl.load(tile_ptr + FIRST_QUERY, volatile=True) + offs_m // GROUP
    is_query = query < tl.load(tile_ptr + END_QUERY, volatile=True)
    mask = is_query[:, None] & (offs_d < Dh)[None, :]
    columns = ((head * GROUP + offs_m % GROUP) * Dh)[:, None] + offs_d[None, :]
    tl.store(out_ptr + query.to(tl.int64)[:, None] * stride_on + columns, o.to(out_ptr.dtype.element_ty), mask=mask)
