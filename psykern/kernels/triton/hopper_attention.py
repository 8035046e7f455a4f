"""prefix_attention for Hopper GPUs: of a program's three warpgroups one fetches, two compute.

The kernel of :mod:`psykern.kernels.triton.prefix_attention` waits for each product before it takes exponentials, and
its tensor cores idle meanwhile. Here a warpgroup fetches blocks of keys and values by TMA into a ring of buffers, and
two more answer half of the tile's rows each, in no fixed step: while one takes exponentials the other multiplies. That
takes Gluon, Triton's lower level, which places memory, barriers and waits by hand.

A program answers tiles until none is left, so that the keys of its next one are fetched while it writes this one.
Tiles, limits and tails are those of :mod:`psykern.kernels.tiles`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from psykern.kernels.segments import Segments
from psykern.kernels.triton.common import LOG2E, dense_rows, has_aligned_rows, on_device_of
from psykern.kernels.triton.prefix_attention import (
    END_QUERY,
    END_RANGE,
    END_TAIL,
    FIRST_POSITION,
    FIRST_QUERY,
    FIRST_RANGE,
    FIRST_TAIL,
    LAST_POSITION,
    LIMIT,
    MIN_LIMIT,
    NUM_COLUMNS,
)

HEAD_DIMS = (64, 128)
# As this version of Triton calls them.
fetch = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
meet = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier  # the threads of a partition
_ROWS = 64  # of a warpgroup: the least of a product
_TILE_ROWS = 2 * _ROWS
_BLOCK_N = 128
# Registers of a thread that computes. What two such warpgroups leave of the 65,536 goes to the one that fetches.
_REGISTERS = 232


def supports(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """16-bit numbers, heads of 64 or 128 of them, at most 128 query heads to a key head, and rows that begin at
    multiples of 16 bytes."""
    is_fit = q.dtype in (torch.bfloat16, torch.float16) and k.dtype == v.dtype == q.dtype and q.shape[2] in HEAD_DIMS
    return is_fit and q.shape[1] // k.shape[1] <= _TILE_ROWS and has_aligned_rows(k) and has_aligned_rows(v)


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    softmax_scale: float,
    window: int | None,
    out: Tensor,
    *,
    overlap: bool = False,
    persistent: bool = True,
) -> Tensor:
    """With ``overlap`` a warpgroup also multiplies beside its own exponentials. Without ``persistent`` a program
    answers one tile."""
    if q.numel() == 0:
        return out
    q, k, v = dense_rows(q), dense_rows(k.to(q.dtype)), dense_rows(v.to(q.dtype))
    if not supports(q, k, v):
        raise ValueError(f"q: expected 16-bit heads of {HEAD_DIMS} and aligned rows, got {q.dtype} {list(q.shape)}")
    head_dim, group = q.shape[2], q.shape[1] // k.shape[1]
    cut = segments.tiles(_TILE_ROWS // group, q.device)
    num_items = cut.num_tiles * k.shape[1]
    target = out if dense_rows(out) is out else torch.empty_like(out, memory_format=torch.contiguous_format)
    with on_device_of(q):
        attention_kernel[(min(num_items, _num_processors(q.device)) if persistent else num_items,)](
            q,
            _descriptor(k.flatten(1), head_dim),
            _descriptor(v.flatten(1), head_dim),
            target,
            cut.table,
            cut.key_ranges,
            cut.limits,
            cut.tails,
            cut.positions,
            q.stride(0),
            target.stride(0),
            num_items,
            k.shape[1],
            softmax_scale,
            0 if window is None else window,
            Dh=head_dim,
            GROUP=group,
            HAS_WINDOW=window is not None,
            OVERLAP=overlap,
            ROWS=_ROWS,
            BLOCK_N=_BLOCK_N,
            STAGES=3,
            REGISTERS=_REGISTERS,
            num_warps=4,
        )
    return out if target is out else out.copy_(target)


def _num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _descriptor(x: Tensor, head_dim: int) -> TensorDescriptor:
    block = [_BLOCK_N, head_dim]
    dtype = gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float16
    layout = gl.NVMMASharedLayout.get_default_for(block, dtype)
    return TensorDescriptor(x, list(x.shape), [x.stride(0), 1], block, layout)


@gluon.jit
def item_of(stripe, num_items, num_heads):
    """(tile, head) of the program's work in a stripe of the list, and whether there is any. The list is sorted by
    length; there and back alternately, so that all programs get about as much."""
    programs = gl.num_programs(0)
    program = gl.program_id(0)
    column = gl.where(stripe % 2 == 0, program, programs - 1 - program)
    item = stripe * programs + column
    return item // num_heads, item % num_heads, item < num_items


@gluon.jit
def range_of(tile_ptr, key_ranges_ptr, r, place, window, HAS_WINDOW: gl.constexpr, BLOCK_N: gl.constexpr):
    """Of the tile's range ``r``, whose first key stands at ``place`` of the path: its first row, how many rows it
    has; the first and the end of those read, and of those among them, in whole blocks, that all queries see. All but
    the row count from the first one. The tails are the range behind the last; their first row is ``row``."""
    is_tail = r == gl.load(tile_ptr + END_RANGE)
    if is_tail:
        row = gl.load(tile_ptr + FIRST_TAIL)
        length = gl.load(tile_ptr + END_TAIL) - row
        begin = 0
        end = length
        common_begin = 0
        common_end = 0
    else:
        row = gl.load(key_ranges_ptr + 2 * r)
        length = gl.load(key_ranges_ptr + 2 * r + 1) - row
        end = gl.minimum(gl.load(tile_ptr + LIMIT) - place, length)
        begin = 0
        common_begin = 0
        if HAS_WINDOW:
            first_key = gl.maximum(gl.load(tile_ptr + FIRST_POSITION) - window + 1, 0)  # that some query sees
            common_key = gl.maximum(gl.load(tile_ptr + LAST_POSITION) - window + 1, 0)  # the first that all see
            begin = gl.maximum(first_key - place, 0)
            common_begin = begin + gl.cdiv(gl.maximum(common_key - place, 0) - begin, BLOCK_N) * BLOCK_N
        common = gl.maximum(gl.minimum(gl.load(tile_ptr + MIN_LIMIT) - place, length) - common_begin, 0)
        common_end = common_begin + common // BLOCK_N * BLOCK_N
    return is_tail, row, length, begin, end, common_begin, common_end


@gluon.jit
def clear_behind(buffer, length, Dh: gl.constexpr, BLOCK_N: gl.constexpr):
    """Sets the rows of a block from ``length`` on to 0: what stands there may be no number, and 0 times it none."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // Dh, Dh // 8], [4, 1], [1, 0])
    offs = gl.arange(0, 16, layout=gl.SliceLayout(1, layout))
    for s in gl.static_range(BLOCK_N // 16):
        if 16 * s + 16 > length:
            rows = buffer.slice(16 * s, 16)
            x = rows.load(layout)
            rows.store(gl.where((16 * s + offs < length)[:, None], x, gl.zeros_like(x)))
    fence_async_shared()
    meet()


@gluon.jit
def produce(
    k_desc,
    v_desc,
    k_ring,  # (buffers, barriers of full ones, barriers of empty ones)
    v_ring,
    landed,  # barrier of values that must be cleared behind their range
    table_ptr,
    key_ranges_ptr,
    num_items,
    num_heads,
    window,
    Dh: gl.constexpr,
    HAS_WINDOW: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Fetches all blocks of all tiles, in order."""
    k_buffers, k_full, k_empty = k_ring
    v_buffers, v_full, v_empty = v_ring
    count = 0  # of blocks
    cleared = 0
    for stripe in range(0, gl.cdiv(num_items, gl.num_programs(0))):
        tile, head, is_item = item_of(stripe, num_items, num_heads)
        if is_item:
            tile_ptr = table_ptr + tile * NUM_COLUMNS
            end_range = gl.load(tile_ptr + END_RANGE) + (gl.load(tile_ptr + END_TAIL) > 0).to(gl.int32)
            place = 0
            for r in range(gl.load(tile_ptr + FIRST_RANGE), end_range):
                _, row, length, begin, end, _, _ = range_of(
                    tile_ptr, key_ranges_ptr, r, place, window, HAS_WINDOW, BLOCK_N
                )
                for i in range(begin, end, BLOCK_N):
                    stage = count % STAGES
                    phase = (count // STAGES) % 2
                    mbarrier.wait(k_empty.index(stage), phase ^ 1)
                    mbarrier.expect(k_full.index(stage), BLOCK_N * Dh * 2)
                    place_k = [row + i, head * Dh]
                    fetch(k_desc, place_k, k_full.index(stage), k_buffers.index(stage))
                    mbarrier.wait(v_empty.index(stage), phase ^ 1)
                    if i + BLOCK_N <= length:
                        mbarrier.expect(v_full.index(stage), BLOCK_N * Dh * 2)
                        fetch(v_desc, place_k, v_full.index(stage), v_buffers.index(stage))
                    else:
                        mbarrier.expect(landed, BLOCK_N * Dh * 2)
                        fetch(v_desc, place_k, landed, v_buffers.index(stage))
                        mbarrier.wait(landed, cleared % 2)
                        cleared += 1
                        clear_behind(v_buffers.index(stage), length - i, Dh, BLOCK_N)
                        mbarrier.arrive(v_full.index(stage), count=1)
                    count += 1
                place += length


@gluon.jit
def soften(scores, maximum, total, scale):
    """The weights of a block of scores before they are divided by the total; the new maximum and total; and what the
    sums of the blocks before are to be multiplied by."""
    new_maximum = gl.maximum(maximum, gl.max(scores, axis=1) * scale)
    shift = gl.where(new_maximum == float("-inf"), 0.0, new_maximum)  # no key was seen so far
    weights = gl.exp2(scores * scale - shift[:, None])
    rescale = gl.exp2(maximum - shift)
    return weights, new_maximum, total * rescale + gl.sum(weights, axis=1), rescale


@gluon.jit
def masked(scores, i, span, sees):
    """Scores of the block of keys from ``i`` on, -inf for those that a query does not see."""
    _, end, common_begin, common_end = span
    place, lows, highs = sees
    if (i < common_begin) | (i >= common_end):
        places = place + i + gl.arange(0, scores.shape[1], layout=gl.SliceLayout(0, scores.type.layout))
        highs = gl.minimum(highs, place + end)
        is_seen = (places[None, :] >= lows[:, None]) & (places[None, :] < highs[:, None])
        scores = gl.where(is_seen, scores, float("-inf"))
    return scores


@gluon.jit
def multiply_keys(q_buffer, k_ring, count, like, BLOCK_N: gl.constexpr, STAGES: gl.constexpr):
    """Begins the product of the queries with block ``count`` of the keys."""
    k_buffers, k_full, _ = k_ring
    stage = count % STAGES
    mbarrier.wait(k_full.index(stage), (count // STAGES) % 2)
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    zeros = gl.zeros([like.shape[0], BLOCK_N], gl.float32, layout=layout)
    k = k_buffers.index(stage).permute((1, 0))
    return warpgroup_mma(q_buffer, k, zeros, use_acc=False, is_async=True)


@gluon.jit
def multiply_values(weights, v_ring, count, acc, STAGES: gl.constexpr):
    """Begins to add the product of the weights with block ``count`` of the values."""
    v_buffers, v_full, _ = v_ring
    stage = count % STAGES
    mbarrier.wait(v_full.index(stage), (count // STAGES) % 2)
    return warpgroup_mma(weights, v_buffers.index(stage), acc, is_async=True)


@gluon.jit
def release(ring, count, STAGES: gl.constexpr):
    _, _, empty = ring
    mbarrier.arrive(empty.index(count % STAGES), count=1)


@gluon.jit
def as_operand(weights, acc, dtype: gl.constexpr):
    layout: gl.constexpr = gl.DotOperandLayout(0, acc.type.layout, 2)
    return gl.convert_layout(weights.to(dtype), layout)


@gluon.jit
def rescaled(acc, rescale):
    return acc * gl.convert_layout(rescale, gl.SliceLayout(1, acc.type.layout))[:, None]


@gluon.jit
def attend(
    softmax,  # (acc [ROWS, Dh], maximum [ROWS], total [ROWS]) of the keys before
    q_buffer,
    k_ring,
    v_ring,
    count,  # of blocks before
    span,  # (begin, end, common_begin, common_end), see ``range_of``
    sees,  # (place, lows [ROWS], highs [ROWS]): place of the range's first key; those that a query sees
    scale,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    """``softmax`` with the keys of a range. Exponentials wait for products, which the other warpgroup does beside."""
    acc, maximum, total = softmax
    begin, end, _, _ = span
    for i in range(begin, end, BLOCK_N):
        scores = multiply_keys(q_buffer, k_ring, count, acc, BLOCK_N, STAGES)
        scores = warpgroup_mma_wait(num_outstanding=0, deps=(scores,))
        release(k_ring, count, STAGES)
        weights, maximum, total, rescale = soften(masked(scores, i, span, sees), maximum, total, scale)
        weights = as_operand(weights, acc, q_buffer.dtype)
        acc = multiply_values(weights, v_ring, count, rescaled(acc, rescale), STAGES)
        acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
        release(v_ring, count, STAGES)
        count += 1
    return acc, maximum, total, count


@gluon.jit
def attend_beside(
    softmax,
    q_buffer,
    k_ring,
    v_ring,
    count,
    span,
    sees,
    scale,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    """As ``attend``, but the values of the block before are multiplied beside the exponentials of each."""
    acc, maximum, total = softmax
    begin, end, _, _ = span
    if begin < end:
        scores = multiply_keys(q_buffer, k_ring, count, acc, BLOCK_N, STAGES)
        scores = warpgroup_mma_wait(num_outstanding=0, deps=(scores,))
        release(k_ring, count, STAGES)
        weights, maximum, total, rescale = soften(masked(scores, begin, span, sees), maximum, total, scale)
        acc = rescaled(acc, rescale)
        operand = as_operand(weights, acc, q_buffer.dtype)
        for i in range(begin + BLOCK_N, end, BLOCK_N):
            scores = multiply_keys(q_buffer, k_ring, count + 1, acc, BLOCK_N, STAGES)
            product = multiply_values(operand, v_ring, count, acc, STAGES)
            scores = warpgroup_mma_wait(num_outstanding=1, deps=(scores,))
            release(k_ring, count + 1, STAGES)
            weights, maximum, total, rescale = soften(masked(scores, i, span, sees), maximum, total, scale)
            acc = warpgroup_mma_wait(num_outstanding=0, deps=(product,))
            release(v_ring, count, STAGES)
            acc = rescaled(acc, rescale)
            operand = as_operand(weights, acc, q_buffer.dtype)
            count += 1
        acc = multiply_values(operand, v_ring, count, acc, STAGES)
        acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
        release(v_ring, count, STAGES)
        count += 1
    return acc, maximum, total, count


@gluon.jit
def consume(
    q_ptr,
    out_ptr,
    q_buffer,
    k_ring,
    v_ring,
    table_ptr,
    key_ranges_ptr,
    limits_ptr,
    tails_ptr,
    positions_ptr,
    stride_qn,
    stride_on,
    num_items,
    num_heads,
    softmax_scale,
    window,
    HALF: gl.constexpr,
    Dh: gl.constexpr,
    GROUP: gl.constexpr,
    HAS_WINDOW: gl.constexpr,
    OVERLAP: gl.constexpr,
    ROWS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Answers one half of the rows of all tiles. Row m of a tile is query m // GROUP, head m % GROUP."""
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, Dh, 16])
    io_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // Dh, Dh // 8], [4, 1], [1, 0])
    scale = softmax_scale * LOG2E
    offs_d = gl.arange(0, Dh, layout=gl.SliceLayout(0, io_layout))
    io_m = HALF * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, io_layout))
    count = 0
    for stripe in range(0, gl.cdiv(num_items, gl.num_programs(0))):
        tile, head, is_item = item_of(stripe, num_items, num_heads)
        if is_item:
            tile_ptr = table_ptr + tile * NUM_COLUMNS
            first_query = gl.load(tile_ptr + FIRST_QUERY)
            end_query = gl.load(tile_ptr + END_QUERY)
            has_tail = gl.load(tile_ptr + END_TAIL) > 0
            query = first_query + io_m // GROUP
            columns = ((head * GROUP + io_m % GROUP) * Dh)[:, None] + offs_d[None, :]
            mask = gl.expand_dims(query < end_query, 1)
            q = gl.load(q_ptr + query.to(gl.int64)[:, None] * stride_qn + columns, mask=mask, other=0.0)
            meet()  # all have read the outputs of the tile before
            q_buffer.store(q)
            fence_async_shared()
            meet()

            query = first_query + (HALF * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, s_layout))) // GROUP
            is_query = query < end_query
            highs = gl.load(limits_ptr + query, mask=is_query, other=0)
            lows = gl.full_like(highs, 0)
            if HAS_WINDOW:
                lows = gl.load(positions_ptr + query, mask=is_query, other=0) - window + 1
            acc = gl.zeros([ROWS, Dh], gl.float32, layout=o_layout)
            maximum = gl.full([ROWS], float("-inf"), gl.float32, layout=gl.SliceLayout(1, s_layout))
            total = gl.full([ROWS], 0.0, gl.float32, layout=gl.SliceLayout(1, s_layout))
            place = 0
            for r in range(gl.load(tile_ptr + FIRST_RANGE), gl.load(tile_ptr + END_RANGE) + has_tail.to(gl.int32)):
                is_tail, row, length, begin, end, common_begin, common_end = range_of(
                    tile_ptr, key_ranges_ptr, r, place, window, HAS_WINDOW, BLOCK_N
                )
                if is_tail:
                    highs = gl.load(tails_ptr + 2 * query + 1, mask=is_query, other=0)
                    lows = gl.load(tails_ptr + 2 * query, mask=is_query, other=0)
                    if HAS_WINDOW:
                        lows = gl.maximum(lows, highs - window)
                    place = row
                span = (begin, end, common_begin, common_end)
                sees = (place, lows, highs)
                softmax = (acc, maximum, total)
                if OVERLAP:
                    acc, maximum, total, count = attend_beside(
                        softmax, q_buffer, k_ring, v_ring, count, span, sees, scale, BLOCK_N, STAGES
                    )
                else:
                    acc, maximum, total, count = attend(
                        softmax, q_buffer, k_ring, v_ring, count, span, sees, scale, BLOCK_N, STAGES
                    )
                place += length

            o = acc / gl.convert_layout(total, gl.SliceLayout(1, o_layout))[:, None]
            meet()  # all have multiplied the queries
            q_buffer.store(o.to(dtype))
            meet()
            o = q_buffer.load(io_layout)
            query = first_query + io_m // GROUP
            columns = ((head * GROUP + io_m % GROUP) * Dh)[:, None] + offs_d[None, :]
            mask = gl.expand_dims(query < end_query, 1)
            gl.store(out_ptr + query.to(gl.int64)[:, None] * stride_on + columns, o, mask=mask)


@gluon.jit(
    do_not_specialize=["num_items", "window"],
    do_not_specialize_on_alignment=["table_ptr", "key_ranges_ptr", "limits_ptr", "tails_ptr", "positions_ptr"],
)
def attention_kernel(
    q_ptr,
    k_desc,
    v_desc,
    out_ptr,
    table_ptr,
    key_ranges_ptr,
    limits_ptr,
    tails_ptr,
    positions_ptr,
    stride_qn,
    stride_on,
    num_items,
    num_heads,
    softmax_scale,
    window,
    Dh: gl.constexpr,
    GROUP: gl.constexpr,
    HAS_WINDOW: gl.constexpr,
    OVERLAP: gl.constexpr,
    ROWS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, Dh], dtype)
    q_buffers = gl.allocate_shared_memory(dtype, [2, ROWS, Dh], q_layout)
    k_buffers = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, Dh], k_desc.layout)
    v_buffers = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, Dh], v_desc.layout)
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    landed = gl.allocate_shared_memory(gl.int64, [1], barrier)
    for s in gl.static_range(STAGES):
        mbarrier.init(k_full.index(s), count=1)
        mbarrier.init(v_full.index(s), count=1)
        mbarrier.init(k_empty.index(s), count=2)
        mbarrier.init(v_empty.index(s), count=2)
    mbarrier.init(landed, count=1)
    fence_async_shared()
    meet()

    k_ring = (k_buffers, k_full, k_empty)
    v_ring = (v_buffers, v_full, v_empty)
    upper: gl.constexpr = gl.constexpr(0)
    lower: gl.constexpr = gl.constexpr(1)
    gl.warp_specialize(
        [
            (
                produce,
                (
                    k_desc,
                    v_desc,
                    k_ring,
                    v_ring,
                    landed,
                    table_ptr,
                    key_ranges_ptr,
                    num_items,
                    num_heads,
                    window,
                    Dh,
                    HAS_WINDOW,
                    BLOCK_N,
                    STAGES,
                ),
            ),
            (
                consume,
                (
                    q_ptr,
                    out_ptr,
                    q_buffers.index(0),
                    k_ring,
                    v_ring,
                    table_ptr,
                    key_ranges_ptr,
                    limits_ptr,
                    tails_ptr,
                    positions_ptr,
                    stride_qn,
                    stride_on,
                    num_items,
                    num_heads,
                    softmax_scale,
                    window,
                    upper,
                    Dh,
                    GROUP,
                    HAS_WINDOW,
                    OVERLAP,
                    ROWS,
                    BLOCK_N,
                    STAGES,
                ),
            ),
            (
                consume,
                (
                    q_ptr,
                    out_ptr,
                    q_buffers.index(1),
                    k_ring,
                    v_ring,
                    table_ptr,
                    key_ranges_ptr,
                    limits_ptr,
                    tails_ptr,
                    positions_ptr,
                    stride_qn,
                    stride_on,
                    num_items,
                    num_heads,
                    softmax_scale,
                    window,
                    lower,
                    Dh,
                    GROUP,
                    HAS_WINDOW,
                    OVERLAP,
                    ROWS,
                    BLOCK_N,
                    STAGES,
                ),
            ),
        ],
        [4, 4],
        [REGISTERS, REGISTERS],
    )
