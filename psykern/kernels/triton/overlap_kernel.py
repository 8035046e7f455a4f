"""A kernel of prefix_attention for Hopper GPUs: eight warps do everything, products run beside exponentials.

It takes the roles of :mod:`psykern.kernels.triton.hopper_kernel` together: the warps that multiply also fetch. While
they take the exponentials of a block of keys, the values of the block before are multiplied. A buffer is filled again
when all warps have met after its use, so that no barrier is waited for whose phase another warp could change meanwhile.
Blocks are fetched ahead over the ends of ranges and of tiles: a program answers tiles until none is left.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from psykern.kernels.triton.common import LOG2E
from psykern.kernels.triton.hopper_kernel import (
    TILE_ROWS,
    barriers_of,
    end_range_of,
    fetch,
    meet,
    range_of,
    soften,
    tile_of,
)
from psykern.kernels.triton.prefix_attention import END_QUERY, FIRST_QUERY, FIRST_RANGE


@gluon.constexpr_function
def product_layout(columns):
    return gl.NVMMADistributedLayout([3, 0], [8, 1], [16, columns, 16])


@gluon.constexpr_function
def rows_layout(columns):
    """Of 16-bit rows that eight warps load and store together."""
    return gl.BlockedLayout([1, 8], [256 // columns, columns // 8], [8, 1], [1, 0])


@gluon.jit
def expect_block(ring, count, is_block, Dh: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr):
    mbarrier.expect(ring[1].index(count % STAGES), BLOCK_N * Dh * 2, pred=is_block)


@gluon.jit
def fetch_block(desc, ring, count, at, STAGES: gl.constexpr):
    """Block ``count``, if there is one, into its buffer, with which all warps are done."""
    row, column, is_block = at
    buffers, full = ring
    fetch(desc, [row, column], full.index(count % STAGES), buffers.index(count % STAGES), pred=is_block)


@gluon.jit
def await_block(ring, count, is_block, STAGES: gl.constexpr):
    mbarrier.wait(ring[1].index(count % STAGES), (count // STAGES) % 2, pred=is_block)


@gluon.jit
def clear_behind(ring, count, length, Dh: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr):
    """Sets the rows of a block from ``length`` on to 0: what stands there may be no number, and 0 times it none."""
    buffer = ring[0].index(count % STAGES)
    layout: gl.constexpr = rows_layout(Dh)
    ROWS: gl.constexpr = 2048 // Dh  # that the layout holds once
    offs = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    for s in gl.static_range(BLOCK_N // ROWS):
        if ROWS * s + ROWS > length:
            rows = buffer.slice(ROWS * s, ROWS)
            x = rows.load(layout)
            rows.store(gl.where((ROWS * s + offs < length)[:, None], x, gl.zeros_like(x)))
    fence_async_shared()
    meet()


@gluon.jit
def multiply_keys(q_buffer, ring, count, BLOCK_N: gl.constexpr, STAGES: gl.constexpr):
    """Begins the product of the queries with block ``count`` of the keys, which is there."""
    scores = gl.zeros([TILE_ROWS, BLOCK_N], gl.float32, layout=product_layout(BLOCK_N))
    k = ring[0].index(count % STAGES).permute((1, 0))
    return warpgroup_mma(q_buffer, k, scores, use_acc=False, is_async=True)


@gluon.jit
def multiply_values(weights, ring, count, acc, STAGES: gl.constexpr):
    """Begins to add the product of the weights with block ``count`` of the values."""
    await_block(ring, count, True, STAGES)
    return warpgroup_mma(weights, ring[0].index(count % STAGES), acc, is_async=True)


@gluon.jit
def masked(scores, i, span, sees, BLOCK_N: gl.constexpr):
    """Scores of the keys from ``i`` on, -inf for those that a query does not see."""
    _, end, common_begin, common_end = span
    place, lows, highs = sees
    if (i < common_begin) | (i >= common_end):
        places = place + i + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, product_layout(BLOCK_N)))
        ends = gl.minimum(highs, place + end)
        is_seen = (places[None, :] >= lows[:, None]) & (places[None, :] < ends[:, None])
        scores = gl.where(is_seen, scores, float("-inf"))
    return scores


@gluon.jit
def rescaled(acc, rescale, Dh: gl.constexpr):
    return acc * gl.convert_layout(rescale, gl.SliceLayout(1, product_layout(Dh)))[:, None]


@gluon.jit
def as_operand(weights, dtype: gl.constexpr, Dh: gl.constexpr):
    return gl.convert_layout(weights.to(dtype), gl.DotOperandLayout(0, product_layout(Dh), 2))


@gluon.jit
def following(cursor, tables, work, HAS_WINDOW: gl.constexpr, BLOCK_N: gl.constexpr):
    """The block behind the cursor's among the program's: of its range, or of what range comes next that has one."""
    stripe, tile_ptr, head, r, place, row, length, i, end, is_block = cursor
    i += BLOCK_N
    while is_block & (i >= end):
        r += 1
        place += length
        if r < end_range_of(tile_ptr):
            _is_tail, row, length, span = range_of(tile_ptr, tables[1], r, place, work[2], HAS_WINDOW, BLOCK_N)
            i = span[0]
            end = span[1]
        else:
            stripe += 1
            tile_ptr, head, is_block = tile_of(stripe, tables, work)
            r = gl.load(tile_ptr + FIRST_RANGE) - 1
            place = 0
            length = 0
    return stripe, tile_ptr, head, r, place, row, length, i, end, is_block


@gluon.jit
def first_block(tables, work, HAS_WINDOW: gl.constexpr, BLOCK_N: gl.constexpr):
    tile_ptr, head, is_block = tile_of(0, tables, work)
    none = gl.to_tensor(0)
    cursor = (none, tile_ptr, head, gl.load(tile_ptr + FIRST_RANGE) - 1, none, none, none, none, none, is_block)
    return following(cursor, tables, work, HAS_WINDOW, BLOCK_N)


@gluon.jit
def refill(
    cursor,  # of the keys to fetch next
    values_at,  # (row, column, is_block) of the values to fetch next
    count,
    descs,
    k_ring,
    v_ring,
    tables,
    work,
    Dh: gl.constexpr,
    HAS_WINDOW: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    """When the product with block ``count`` of the keys has begun: fetches what the buffers of the keys before it, and
    of the values before those, are to hold next."""
    keys_at = (cursor[5] + cursor[7], cursor[2] * Dh, cursor[9])
    meet()  # all are done with these buffers
    # Barriers are set before both fetches, and all meet after: else the compiler has warps meet between each two.
    expect_block(k_ring, count + STAGES - 1, keys_at[2], Dh, BLOCK_N, STAGES)
    expect_block(v_ring, count + STAGES - 2, values_at[2], Dh, BLOCK_N, STAGES)
    fetch_block(descs[0], k_ring, count + STAGES - 1, keys_at, STAGES)
    fetch_block(descs[1], v_ring, count + STAGES - 2, values_at, STAGES)
    meet()
    return following(cursor, tables, work, HAS_WINDOW, BLOCK_N), keys_at


@gluon.jit
def attend(
    softmax,  # (acc [TILE_ROWS, Dh], maximum [TILE_ROWS], total [TILE_ROWS], operand) of the keys before
    q_buffer,
    k_ring,  # (buffers, barriers of full ones)
    v_ring,
    ahead,  # (cursor, values_at), see ``refill``
    count,  # of blocks before
    descs,
    length,  # rows of the range
    span,  # (begin, end, common_begin, common_end), see ``range_of``
    sees,  # (place, lows [TILE_ROWS], highs [TILE_ROWS]): place of the range's first key; what a query sees
    tables,
    work,
    scale,
    Dh: gl.constexpr,
    HAS_WINDOW: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    """``softmax`` with the keys of a range; but the values of its last block, whose weights are ``operand``, are still
    to be multiplied."""
    acc, maximum, total, operand = softmax
    cursor, values_at = ahead
    begin, end, _, _ = span
    if begin < end:
        await_block(k_ring, count, True, STAGES)
        for i in range(begin, end, BLOCK_N):
            scores = multiply_keys(q_buffer, k_ring, count, BLOCK_N, STAGES)
            product = multiply_values(operand, v_ring, count - 1, acc, STAGES)
            cursor, values_at = refill(
                cursor, values_at, count, descs, k_ring, v_ring, tables, work, Dh, HAS_WINDOW, BLOCK_N, STAGES
            )
            scores = warpgroup_mma_wait(num_outstanding=1, deps=(scores,))
            weights, maximum, total, rescale = soften(masked(scores, i, span, sees, BLOCK_N), maximum, total, scale)
            operand = as_operand(weights, q_buffer.dtype, Dh)
            # The next keys are waited for already here, for without a branch between the two, ptxas waits for the
            # product first and takes the exponentials afterwards.
            await_block(k_ring, count + 1, i + BLOCK_N < end, STAGES)
            acc = warpgroup_mma_wait(num_outstanding=0, deps=(product,))
            acc = rescaled(acc, rescale, Dh)
            count += 1
        last = begin + (end - begin - 1) // BLOCK_N * BLOCK_N
        if last + BLOCK_N > length:
            await_block(v_ring, count - 1, True, STAGES)
            clear_behind(v_ring, count - 1, length - last, Dh, BLOCK_N, STAGES)
    return (acc, maximum, total, operand), (cursor, values_at), count


@gluon.jit
def rows_of(tile_ptr, head, stride, GROUP: gl.constexpr, Dh: gl.constexpr):
    """Places of the tile's queries or outputs [TILE_ROWS, Dh], and the mask of those that there are."""
    layout: gl.constexpr = rows_layout(Dh)
    offs_m = gl.arange(0, TILE_ROWS, layout=gl.SliceLayout(1, layout))
    offs_d = gl.arange(0, Dh, layout=gl.SliceLayout(0, layout))
    query = gl.load(tile_ptr + FIRST_QUERY) + offs_m // GROUP
    columns = ((head * GROUP + offs_m % GROUP) * Dh)[:, None] + offs_d[None, :]
    return query.to(gl.int64)[:, None] * stride + columns, (query < gl.load(tile_ptr + END_QUERY))[:, None]


@gluon.jit
def load_queries(q_ptr, tile_ptr, head, stride, GROUP: gl.constexpr, Dh: gl.constexpr):
    places, mask = rows_of(tile_ptr, head, stride, GROUP, Dh)
    return gl.load(q_ptr + places, mask=mask, other=0.0)


@gluon.jit
def answer_tile(
    tile_ptr,
    q_buffer,
    k_ring,
    v_ring,
    ahead,
    count,
    descs,
    tables,
    work,
    scale,
    Dh: gl.constexpr,
    GROUP: gl.constexpr,
    HAS_WINDOW: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The tile's outputs. Row m of a tile is query m // GROUP, head m % GROUP."""
    _, key_ranges_ptr, limits_ptr, tails_ptr, positions_ptr = tables
    window = work[2]
    rows: gl.constexpr = gl.SliceLayout(1, product_layout(BLOCK_N))
    query = gl.load(tile_ptr + FIRST_QUERY) + gl.arange(0, TILE_ROWS, layout=rows) // GROUP
    is_query = query < gl.load(tile_ptr + END_QUERY)
    highs = gl.load(limits_ptr + query, mask=is_query, other=0)
    lows = gl.full_like(highs, 0)
    if HAS_WINDOW:
        lows = gl.load(positions_ptr + query, mask=is_query, other=0) - window + 1
    acc = gl.zeros([TILE_ROWS, Dh], gl.float32, layout=product_layout(Dh))
    maximum = gl.full([TILE_ROWS], float("-inf"), gl.float32, layout=rows)
    total = gl.full([TILE_ROWS], 0.0, gl.float32, layout=rows)
    operand = gl.zeros([TILE_ROWS, BLOCK_N], q_buffer.dtype, layout=gl.DotOperandLayout(0, product_layout(Dh), 2))
    softmax = (acc, maximum, total, operand)
    place = 0
    for r in range(gl.load(tile_ptr + FIRST_RANGE), end_range_of(tile_ptr)):
        is_tail, row, length, span = range_of(tile_ptr, key_ranges_ptr, r, place, window, HAS_WINDOW, BLOCK_N)
        if is_tail:
            highs = gl.load(tails_ptr + 2 * query + 1, mask=is_query, other=0)
            lows = gl.load(tails_ptr + 2 * query, mask=is_query, other=0)
            if HAS_WINDOW:
                lows = gl.maximum(lows, highs - window)
            place = row
        softmax, ahead, count = attend(
            softmax, q_buffer, k_ring, v_ring, ahead, count, descs, length, span, (place, lows, highs),
            tables, work, scale, Dh, HAS_WINDOW, BLOCK_N, STAGES,
        )  # fmt: skip
        place += length
    acc, _, total, operand = softmax
    acc = multiply_values(operand, v_ring, count - 1, acc, STAGES)
    acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
    return acc / gl.convert_layout(total, gl.SliceLayout(1, product_layout(Dh)))[:, None], ahead, count


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
    num_items,  # tiles times key heads
    num_heads,  # of keys
    softmax_scale,
    window,
    Dh: gl.constexpr,
    GROUP: gl.constexpr,
    HAS_WINDOW: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE_ROWS, Dh], dtype)
    q_buffer = gl.allocate_shared_memory(dtype, [TILE_ROWS, Dh], q_layout)
    k_ring = ring_of(k_desc, Dh, BLOCK_N, STAGES)
    v_ring = ring_of(v_desc, Dh, BLOCK_N, STAGES)
    descs = (k_desc, v_desc)
    tables = (table_ptr, key_ranges_ptr, limits_ptr, tails_ptr, positions_ptr)
    work = (num_items, num_heads, window)
    fence_async_shared()
    meet()
    # All keys but those of the last buffer, and the values that go with the first of them.
    cursor = first_block(tables, work, HAS_WINDOW, BLOCK_N)
    values_at = (cursor[5] + cursor[7], cursor[2] * Dh, cursor[9])
    # Blocks are counted from where the values before the first are not waited for: their barrier is in its first phase.
    count = 2 * STAGES
    for s in gl.static_range(STAGES - 1):
        keys_at = (cursor[5] + cursor[7], cursor[2] * Dh, cursor[9])
        expect_block(k_ring, s, keys_at[2], Dh, BLOCK_N, STAGES)
        fetch_block(k_desc, k_ring, s, keys_at, STAGES)
        if s < STAGES - 2:
            expect_block(v_ring, s, keys_at[2], Dh, BLOCK_N, STAGES)
            fetch_block(v_desc, v_ring, s, keys_at, STAGES)
        values_at = keys_at
        cursor = following(cursor, tables, work, HAS_WINDOW, BLOCK_N)
    meet()
    ahead = (cursor, values_at)
    tile_ptr, head, is_item = tile_of(0, tables, work)
    q = load_queries(q_ptr, tile_ptr, head, stride_qn, GROUP, Dh)
    for stripe in range(0, gl.cdiv(num_items, gl.num_programs(0))):
        if is_item:
            meet()  # all have read the outputs of the tile before
            q_buffer.store(q)
            # The first block has no values before it to multiply: what stands in their buffer is multiplied by 0.
            before = v_ring[0].index((count - 1) % STAGES)
            before.store(gl.zeros([BLOCK_N, Dh], dtype, layout=rows_layout(Dh)))
            fence_async_shared()
            meet()
            o, ahead, count = answer_tile(
                tile_ptr, q_buffer, k_ring, v_ring, ahead, count, descs, tables, work, softmax_scale * LOG2E,
                Dh, GROUP, HAS_WINDOW, BLOCK_N, STAGES,
            )  # fmt: skip
            # The queries of the next tile come while the outputs of this one go.
            done_ptr = tile_ptr
            done_head = head
            tile_ptr, head, is_item = tile_of(stripe + 1, tables, work)
            q = load_queries(q_ptr, tile_ptr, head, stride_qn, GROUP, Dh)
            # Outputs pass through the queries' buffer, so that whole rows are stored.
            meet()  # all have multiplied the queries
            q_buffer.store(o.to(dtype))
            meet()
            places, mask = rows_of(done_ptr, done_head, stride_on, GROUP, Dh)
            gl.store(out_ptr + places, q_buffer.load(rows_layout(Dh)), mask=mask)


@gluon.jit
def ring_of(desc, Dh: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr):
    """Buffers, and barriers of full ones."""
    return gl.allocate_shared_memory(desc.dtype, [STAGES, BLOCK_N, Dh], desc.layout), barriers_of(STAGES, 1)
