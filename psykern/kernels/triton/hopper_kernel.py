"""The kernel of prefix_attention for Hopper GPUs: of a program's three warpgroups one fetches, two compute.

The kernel of :mod:`psykern.kernels.triton.prefix_attention` waits for each product before it takes exponentials, and
its tensor cores idle meanwhile. Here a warpgroup fetches blocks of keys and values by TMA into a ring of buffers, and
two more answer half of the tile's rows each, in no fixed step: while one takes exponentials the other multiplies. That
takes Gluon, Triton's lower level, which places memory, barriers and waits by hand.

A program answers tiles until none is left, so that the keys of its next one are fetched while it writes this one.
Tiles, limits and tails are those of :mod:`psykern.kernels.tiles`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from psykern.kernels.triton.common import LOG2E
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

ROWS = gl.constexpr(64)  # of a warpgroup: those of one product
TILE_ROWS = gl.constexpr(128)
# As this version of Triton calls them.
fetch = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
meet = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier  # the threads of a partition


@gluon.constexpr_function
def product_layout(columns):
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.constexpr_function
def rows_layout(columns):
    """Of 16-bit rows that four warps load and store together."""
    return gl.BlockedLayout([1, 8], [256 // columns, columns // 8], [4, 1], [1, 0])


@gluon.jit
def tile_of(stripe, tables, work):
    """The program's tile and head in a stripe of the list of both, and whether there is one; else any. The list is
    sorted by length: there and back alternately, all programs get about as much."""
    num_items, num_heads, _window = work
    programs = gl.num_programs(0)
    program = gl.program_id(0)
    item = stripe * programs + gl.where(stripe % 2 == 0, program, programs - 1 - program)
    one = gl.minimum(item, num_items - 1)
    return tables[0] + one // num_heads * NUM_COLUMNS, one % num_heads, item < num_items


@gluon.jit
def end_range_of(tile_ptr):
    """Behind the tile's last range; its tails, if any, are one more."""
    return gl.load(tile_ptr + END_RANGE) + (gl.load(tile_ptr + END_TAIL) > 0).to(gl.int32)


@gluon.jit
def range_of(tile_ptr, key_ranges_ptr, r, place, window, HAS_WINDOW: gl.constexpr, BLOCK_N: gl.constexpr):
    """Of the tile's range ``r``, whose first key stands at ``place`` of the path: whether it is the tails; its first
    row; how many rows it has; and from the first on, (begin, end) of those that are read and of those among them, in
    whole blocks, that all queries see."""
    is_tail = r == gl.load(tile_ptr + END_RANGE)
    begin = 0
    common_begin = 0
    common_end = 0
    if is_tail:
        row = gl.load(tile_ptr + FIRST_TAIL)
        length = gl.load(tile_ptr + END_TAIL) - row
        end = length
    else:
        row = gl.load(key_ranges_ptr + 2 * r)
        length = gl.load(key_ranges_ptr + 2 * r + 1) - row
        end = gl.minimum(gl.load(tile_ptr + LIMIT) - place, length)
        if HAS_WINDOW:
            first_key = gl.maximum(gl.load(tile_ptr + FIRST_POSITION) - window + 1, 0)  # that some query sees
            common_key = gl.maximum(gl.load(tile_ptr + LAST_POSITION) - window + 1, 0)  # the first that all see
            begin = gl.maximum(first_key - place, 0)
            common_begin = begin + gl.cdiv(gl.maximum(common_key - place, 0) - begin, BLOCK_N) * BLOCK_N
        common = gl.maximum(gl.minimum(gl.load(tile_ptr + MIN_LIMIT) - place, length) - common_begin, 0)
        common_end = common_begin + common // BLOCK_N * BLOCK_N
    return is_tail, row, length, (begin, end, common_begin, common_end)


@gluon.jit
def produce(
    k_desc,
    v_desc,
    v_ptr,
    stride_v,
    k_ring,  # (buffers, barriers of full ones, barriers of empty ones)
    v_ring,
    tables,
    work,
    Dh: gl.constexpr,
    HAS_WINDOW: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Fetches all blocks of the program's tiles, in order."""
    num_items, _num_heads, window = work
    count = 0  # of blocks
    for stripe in range(0, gl.cdiv(num_items, gl.num_programs(0))):
        tile_ptr, head, is_item = tile_of(stripe, tables, work)
        if is_item:
            place = 0
            for r in range(gl.load(tile_ptr + FIRST_RANGE), end_range_of(tile_ptr)):
                _is_tail, row, length, span = range_of(tile_ptr, tables[1], r, place, window, HAS_WINDOW, BLOCK_N)
                for i in range(span[0], span[1], BLOCK_N):
                    fetch_block(k_desc, k_ring, count, row + i, head * Dh, Dh, BLOCK_N, STAGES)
                    if i + BLOCK_N <= length:
                        fetch_block(v_desc, v_ring, count, row + i, head * Dh, Dh, BLOCK_N, STAGES)
                    else:
                        first = v_ptr + (row + i).to(gl.int64) * stride_v + head * Dh
                        load_edge(first, stride_v, v_ring, count, length - i, Dh, BLOCK_N, STAGES)
                    count += 1
                place += length
    leave()


@gluon.jit
def fetch_block(desc, ring, count, row, column, Dh: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr):
    """Into the buffer of block ``count``, once it is empty; then its barrier opens."""
    buffers, full, empty = ring
    stage = count % STAGES
    mbarrier.wait(empty.index(stage), (count // STAGES) % 2 ^ 1)
    meet()  # a warp that is late would else find the barrier two phases on, and wait for ever
    mbarrier.expect(full.index(stage), BLOCK_N * Dh * 2)
    fetch(desc, [row, column], full.index(stage), buffers.index(stage))


@gluon.jit
def load_edge(first, stride, ring, count, length, Dh: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr):
    """A block of values of which only ``length`` rows count, by loads: 0 behind them, as what stands there may be no
    number, and 0 times it none."""
    buffers, full, empty = ring
    stage = count % STAGES
    buffer = buffers.index(stage)
    layout: gl.constexpr = rows_layout(Dh)
    offs_n = gl.arange(0, 16, layout=gl.SliceLayout(1, layout))
    offs_d = gl.arange(0, Dh, layout=gl.SliceLayout(0, layout))
    places = offs_n.to(gl.int64)[:, None] * stride + offs_d[None, :]
    mbarrier.wait(empty.index(stage), (count // STAGES) % 2 ^ 1)
    for s in gl.static_range(BLOCK_N // 16):
        inside = (16 * s + offs_n < length)[:, None]
        buffer.slice(16 * s, 16).store(gl.load(first + 16 * s * stride + places, mask=inside, other=0.0))
    fence_async_shared()
    meet()
    mbarrier.arrive(full.index(stage), count=1)


@gluon.jit
def multiply_keys(q_buffer, ring, count, BLOCK_N: gl.constexpr, STAGES: gl.constexpr):
    """Begins the product of the queries with block ``count`` of the keys."""
    buffers, full, _ = ring
    mbarrier.wait(full.index(count % STAGES), (count // STAGES) % 2)
    scores = gl.zeros([ROWS, BLOCK_N], gl.float32, layout=product_layout(BLOCK_N))
    k = buffers.index(count % STAGES).permute((1, 0))
    return warpgroup_mma(q_buffer, k, scores, use_acc=False, is_async=True)


@gluon.jit
def multiply_values(weights, ring, count, acc, STAGES: gl.constexpr):
    """Begins to add the product of the weights with block ``count`` of the values."""
    buffers, full, _ = ring
    mbarrier.wait(full.index(count % STAGES), (count // STAGES) % 2)
    return warpgroup_mma(weights, buffers.index(count % STAGES), acc, is_async=True)


@gluon.jit
def release(ring, count, STAGES: gl.constexpr):
    """One half has used block ``count``."""
    mbarrier.arrive(ring[2].index(count % STAGES), count=1)


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
def soften(scores, maximum, total, scale):
    """The weights of a block of keys, not yet divided by the total; the new maximum and total; and what the sums of
    the blocks before are to be multiplied by."""
    new_maximum = gl.maximum(maximum, gl.max(scores, axis=1) * scale)
    shift = gl.where(new_maximum == float("-inf"), 0.0, new_maximum)  # no key was seen so far
    weights = gl.exp2(scores * scale - shift[:, None])
    rescale = gl.exp2(maximum - shift)
    return weights, new_maximum, total * rescale + gl.sum(weights, axis=1), rescale


@gluon.jit
def rescaled(acc, rescale, Dh: gl.constexpr):
    return acc * gl.convert_layout(rescale, gl.SliceLayout(1, product_layout(Dh)))[:, None]


@gluon.jit
def as_operand(weights, dtype: gl.constexpr, Dh: gl.constexpr):
    return gl.convert_layout(weights.to(dtype), gl.DotOperandLayout(0, product_layout(Dh), 2))


@gluon.jit
def attend(
    softmax,  # (acc [ROWS, Dh], maximum [ROWS], total [ROWS]) of the keys before
    q_buffer,
    k_ring,
    v_ring,
    count,  # of blocks before
    span,  # (begin, end, common_begin, common_end), see ``range_of``
    sees,  # (place, lows [ROWS], highs [ROWS]): place of the range's first key; the places that a query sees
    scale,
    Dh: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    """``softmax`` with the keys of a range. Exponentials wait for products, which the other half does beside."""
    acc, maximum, total = softmax
    for i in range(span[0], span[1], BLOCK_N):
        scores = multiply_keys(q_buffer, k_ring, count, BLOCK_N, STAGES)
        scores = warpgroup_mma_wait(num_outstanding=0, deps=(scores,))
        release(k_ring, count, STAGES)
        weights, maximum, total, rescale = soften(masked(scores, i, span, sees, BLOCK_N), maximum, total, scale)
        acc = rescaled(acc, rescale, Dh)
        acc = multiply_values(as_operand(weights, q_buffer.dtype, Dh), v_ring, count, acc, STAGES)
        acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
        release(v_ring, count, STAGES)
        count += 1
    return acc, maximum, total, count


@gluon.jit
def await_turn(turns, count, HALF: gl.constexpr):
    """Until the other half has begun what comes before this half's products of block ``count``."""
    if turns.shape[0] == 2:
        mbarrier.wait(turns.index(HALF), count % 2 ^ (1 - HALF))
        meet()  # see ``fetch_block``


@gluon.jit
def pass_turn(turns, HALF: gl.constexpr):
    if turns.shape[0] == 2:
        mbarrier.arrive(turns.index(1 - HALF), count=1)


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
    turns,
    HALF: gl.constexpr,
    Dh: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    """As ``attend``, but the values of the block before are multiplied beside the exponentials of each. The halves
    begin their products in turns, so that they do not take exponentials at the same time."""
    acc, maximum, total = softmax
    begin, end, _, _ = span
    if begin < end:
        await_turn(turns, count, HALF)
        scores = multiply_keys(q_buffer, k_ring, count, BLOCK_N, STAGES)
        pass_turn(turns, HALF)
        scores = warpgroup_mma_wait(num_outstanding=0, deps=(scores,))
        release(k_ring, count, STAGES)
        weights, maximum, total, rescale = soften(masked(scores, begin, span, sees, BLOCK_N), maximum, total, scale)
        acc = rescaled(acc, rescale, Dh)
        operand = as_operand(weights, q_buffer.dtype, Dh)
        for i in range(begin + BLOCK_N, end, BLOCK_N):
            count += 1
            await_turn(turns, count, HALF)
            scores = multiply_keys(q_buffer, k_ring, count, BLOCK_N, STAGES)
            product = multiply_values(operand, v_ring, count - 1, acc, STAGES)
            pass_turn(turns, HALF)
            scores = warpgroup_mma_wait(num_outstanding=1, deps=(scores,))
            release(k_ring, count, STAGES)
            weights, maximum, total, rescale = soften(masked(scores, i, span, sees, BLOCK_N), maximum, total, scale)
            operand = as_operand(weights, q_buffer.dtype, Dh)
            # The next keys are waited for already here, for without a branch between the two, ptxas waits for the
            # product first and takes the exponentials afterwards.
            after = count + 1
            mbarrier.wait(k_ring[1].index(after % STAGES), (after // STAGES) % 2, pred=i + BLOCK_N < end)
            acc = warpgroup_mma_wait(num_outstanding=0, deps=(product,))
            release(v_ring, count - 1, STAGES)
            acc = rescaled(acc, rescale, Dh)
        acc = multiply_values(operand, v_ring, count, acc, STAGES)
        acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
        release(v_ring, count, STAGES)
        count += 1
    return acc, maximum, total, count


@gluon.jit
def rows_of(tile_ptr, head, stride, HALF: gl.constexpr, GROUP: gl.constexpr, Dh: gl.constexpr):
    """Places of the half's queries or outputs [ROWS, Dh], and the mask of those that there are."""
    layout: gl.constexpr = rows_layout(Dh)
    offs_m = HALF * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    offs_d = gl.arange(0, Dh, layout=gl.SliceLayout(0, layout))
    query = gl.load(tile_ptr + FIRST_QUERY) + offs_m // GROUP
    columns = ((head * GROUP + offs_m % GROUP) * Dh)[:, None] + offs_d[None, :]
    return query.to(gl.int64)[:, None] * stride + columns, (query < gl.load(tile_ptr + END_QUERY))[:, None]


@gluon.jit
def load_queries(q_ptr, tile_ptr, head, stride, HALF: gl.constexpr, GROUP: gl.constexpr, Dh: gl.constexpr):
    places, mask = rows_of(tile_ptr, head, stride, HALF, GROUP, Dh)
    return gl.load(q_ptr + places, mask=mask, other=0.0)


@gluon.jit
def answer_tile(
    tile_ptr,
    q_buffer,
    k_ring,
    v_ring,
    count,
    turns,  # two barriers: of each half's turn; or one, without turns
    tables,
    window,
    scale,
    HALF: gl.constexpr,
    Dh: gl.constexpr,
    GROUP: gl.constexpr,
    HAS_WINDOW: gl.constexpr,
    OVERLAP: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The half's outputs, and the count of blocks."""
    _, key_ranges_ptr, limits_ptr, tails_ptr, positions_ptr = tables
    rows: gl.constexpr = gl.SliceLayout(1, product_layout(BLOCK_N))
    query = gl.load(tile_ptr + FIRST_QUERY) + (HALF * ROWS + gl.arange(0, ROWS, layout=rows)) // GROUP
    is_query = query < gl.load(tile_ptr + END_QUERY)
    highs = gl.load(limits_ptr + query, mask=is_query, other=0)
    lows = gl.full_like(highs, 0)
    if HAS_WINDOW:
        lows = gl.load(positions_ptr + query, mask=is_query, other=0) - window + 1
    acc = gl.zeros([ROWS, Dh], gl.float32, layout=product_layout(Dh))
    maximum = gl.full([ROWS], float("-inf"), gl.float32, layout=rows)
    total = gl.full([ROWS], 0.0, gl.float32, layout=rows)
    place = 0
    for r in range(gl.load(tile_ptr + FIRST_RANGE), end_range_of(tile_ptr)):
        is_tail, row, length, span = range_of(tile_ptr, key_ranges_ptr, r, place, window, HAS_WINDOW, BLOCK_N)
        if is_tail:
            highs = gl.load(tails_ptr + 2 * query + 1, mask=is_query, other=0)
            lows = gl.load(tails_ptr + 2 * query, mask=is_query, other=0)
            if HAS_WINDOW:
                lows = gl.maximum(lows, highs - window)
            place = row
        softmax = (acc, maximum, total)
        sees = (place, lows, highs)
        if OVERLAP:
            acc, maximum, total, count = attend_beside(
                softmax, q_buffer, k_ring, v_ring, count, span, sees, scale, turns, HALF, Dh, BLOCK_N, STAGES
            )
        else:
            acc, maximum, total, count = attend(
                softmax, q_buffer, k_ring, v_ring, count, span, sees, scale, Dh, BLOCK_N, STAGES
            )
        place += length
    return acc / gl.convert_layout(total, gl.SliceLayout(1, product_layout(Dh)))[:, None], count


@gluon.jit
def consume(
    q_ptr,
    out_ptr,
    strides,
    q_buffer,
    k_ring,
    v_ring,
    turns,
    tables,
    work,
    softmax_scale,
    HALF: gl.constexpr,
    Dh: gl.constexpr,
    GROUP: gl.constexpr,
    HAS_WINDOW: gl.constexpr,
    OVERLAP: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Answers one half of the rows of the program's tiles. Row m of a tile is query m // GROUP, head m % GROUP."""
    num_items, _num_heads, window = work
    count = 0
    tile_ptr, head, is_item = tile_of(0, tables, work)
    q = load_queries(q_ptr, tile_ptr, head, strides[0], HALF, GROUP, Dh)
    for stripe in range(0, gl.cdiv(num_items, gl.num_programs(0))):
        if is_item:
            meet()  # all have read the outputs of the tile before
            q_buffer.store(q)
            fence_async_shared()
            meet()
            o, count = answer_tile(
                tile_ptr, q_buffer, k_ring, v_ring, count, turns, tables, window, softmax_scale * LOG2E,
                HALF, Dh, GROUP, HAS_WINDOW, OVERLAP, BLOCK_N, STAGES,
            )  # fmt: skip
            # The queries of the next tile come while the outputs of this one go.
            done_ptr = tile_ptr
            done_head = head
            tile_ptr, head, is_item = tile_of(stripe + 1, tables, work)
            q = load_queries(q_ptr, tile_ptr, head, strides[0], HALF, GROUP, Dh)
            # Outputs pass through the queries' buffer, so that whole rows are stored.
            meet()  # all have multiplied the queries
            q_buffer.store(o.to(q_buffer.dtype))
            meet()
            places, mask = rows_of(done_ptr, done_head, strides[1], HALF, GROUP, Dh)
            gl.store(out_ptr + places, q_buffer.load(rows_layout(Dh)), mask=mask)
    leave()


@gluon.jit
def leave():
    """Ends the threads of a partition. Behind a partition, Triton 3.6 has its warps give registers back twice in a row
    (``setmaxnreg``) without the barrier between that PTX demands, while others wait for these registers. Every warp of
    the program must be one of a partition: others would wait for an end that is no longer announced."""
    gl.inline_asm_elementwise("exit; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit(
    do_not_specialize=["num_items", "window"],
    do_not_specialize_on_alignment=["table_ptr", "key_ranges_ptr", "limits_ptr", "tails_ptr", "positions_ptr"],
)
def attention_kernel(
    q_ptr,
    k_desc,
    v_desc,
    v_ptr,
    out_ptr,
    table_ptr,
    key_ranges_ptr,
    limits_ptr,
    tails_ptr,
    positions_ptr,
    stride_qn,
    stride_vm,
    stride_on,
    num_items,  # tiles times key heads
    num_heads,  # of keys
    softmax_scale,
    window,
    Dh: gl.constexpr,
    GROUP: gl.constexpr,
    HAS_WINDOW: gl.constexpr,
    OVERLAP: gl.constexpr,
    TURNS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, Dh], dtype)
    q_buffers = gl.allocate_shared_memory(dtype, [2, ROWS, Dh], q_layout)
    k_ring = ring_of(k_desc, Dh, BLOCK_N, STAGES)
    v_ring = ring_of(v_desc, Dh, BLOCK_N, STAGES)
    turns = barriers_of(2 if TURNS else 1, 1)
    fence_async_shared()
    meet()
    tables = (table_ptr, key_ranges_ptr, limits_ptr, tails_ptr, positions_ptr)
    work = (num_items, num_heads, window)
    strides = (stride_qn, stride_on)
    upper: gl.constexpr = gl.constexpr(0)
    lower: gl.constexpr = gl.constexpr(1)
    gl.warp_specialize(
        [
            (produce, (k_desc, v_desc, v_ptr, stride_vm, k_ring, v_ring, tables, work,
                       Dh, HAS_WINDOW, BLOCK_N, STAGES)),
            (consume, (q_ptr, out_ptr, strides, q_buffers.index(0), k_ring, v_ring, turns, tables, work, softmax_scale,
                       upper, Dh, GROUP, HAS_WINDOW, OVERLAP, BLOCK_N, STAGES)),
            (consume, (q_ptr, out_ptr, strides, q_buffers.index(1), k_ring, v_ring, turns, tables, work, softmax_scale,
                       lower, Dh, GROUP, HAS_WINDOW, OVERLAP, BLOCK_N, STAGES)),
        ],
        [4, 4],
        [REGISTERS, REGISTERS],
    )  # fmt: skip


@gluon.jit
def barriers_of(number: gl.constexpr, arrivals: gl.constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [number, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(number):
        mbarrier.init(barriers.index(s), count=arrivals)
    return barriers


@gluon.jit
def ring_of(desc, Dh: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr):
    """Buffers, barriers of full ones, barriers of empty ones, at which both halves arrive."""
    buffers = gl.allocate_shared_memory(desc.dtype, [STAGES, BLOCK_N, Dh], desc.layout)
    return buffers, barriers_of(STAGES, 1), barriers_of(STAGES, 2)
