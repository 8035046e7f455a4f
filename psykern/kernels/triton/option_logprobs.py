"""option_logprobs: a matrix product whose tiles of logits are reduced where they are made, and never stored.

Each program computes one tile [rows, tokens] of logits in fp32 accumulators, and from these accumulators, for each of
its rows, the maximum m, its token, sum exp(z - m) and sum exp(z - m) (z - m), and it stores the logits that the row
asks for. A second kernel combines the tiles of a row in the order of the vocabulary. Tiles are numbered down a column
of row blocks first, so that programs that run together read the same rows of the weight, and a launch takes only as
many rows as stay in the L2 cache meanwhile. On Hopper TMA fetches the tiles.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from psykern.kernels.triton.common import (
    LN2,
    LOG2E,
    dense_rows,
    descriptor,
    has_aligned_rows,
    is_hopper,
    is_wide,
    multiply,
    on_device_of,
    power_of_2,
)

_PARTIAL_BYTES = 64 * 2**20  # of the reduced tiles that are held at once
_HIDDEN_BYTES = 16 * 2**20  # of hidden states read again for each tile of tokens; L2: 40 MB on A100, 50 on H100
_TARGETS = 256  # looked at together to see whether a tile has any


class Tiles(NamedTuple):
    """How a product is cut, and what a program of it takes."""

    block_r: int
    block_v: int
    block_k: int
    num_warps: int
    num_stages: int


def tiles_of(rows: int, size: int, dtype: torch.dtype, use_tma: bool) -> Tiles:
    """Of a product of ``rows`` hidden states of ``size`` numbers; ``dtype`` is what is multiplied.

    benchmarks/results/triton_resources_*.csv have the registers they take. Only where TMA fetches the tiles are enough
    registers left for those of 128 x 256: with masked loads these spill.
    """
    if dtype == torch.float32:
        return Tiles(16, 64, 32, 4, 2) if rows <= 16 else Tiles(64, 64, 16, 8, 2)
    block_k = 64 if size > 32 else 32
    if rows <= 16:
        return Tiles(16, 128, block_k, 4, 4)
    if rows <= 64:
        return Tiles(64, 128, block_k, 8, 4)
    return Tiles(128, 256, block_k, 8, 3) if use_tma else Tiles(128, 128, block_k, 8, 3)


def option_logprobs(
    hidden: Tensor, weight: Tensor, token_offsets: Tensor, token_ids: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden, weight = dense_rows(hidden), dense_rows(weight)
    token_offsets, token_ids = token_offsets.contiguous(), token_ids.contiguous()
    num_rows, size = hidden.shape
    vocabulary = weight.shape[0]
    device = hidden.device
    lse = torch.empty(num_rows, dtype=torch.float32, device=device)
    entropy = torch.empty_like(lse)
    argmax = torch.empty(num_rows, dtype=torch.int64, device=device)
    logits = torch.empty(token_ids.shape, dtype=torch.float32, device=device)
    if num_rows == 0:
        return lse, logits, argmax, entropy

    use_tma = uses_tma(hidden, weight)
    tiles = tiles_of(num_rows, size, _multiplied(hidden, weight), use_tma)
    num_tiles = triton.cdiv(vocabulary, tiles.block_v)
    chunk = rows_of_launch(num_rows, hidden.stride(0) * hidden.element_size(), num_tiles, tiles.block_r)
    partial = torch.empty((3, num_tiles, chunk), dtype=torch.float32, device=device)  # maximum, total, moment
    best = torch.empty((num_tiles, chunk), dtype=torch.int32, device=device)
    with on_device_of(hidden):
        for first in range(0, num_rows, chunk):
            rows = slice(first, min(first + chunk, num_rows))
            _reduce_tiles(hidden[rows], weight, token_offsets[first:], token_ids, logits, partial, best, tiles, use_tma)
            _combine_tiles(partial, best, lse[rows], argmax[rows], entropy[rows])
    return lse, logits, argmax, entropy


def _reduce_tiles(
    hidden: Tensor,
    weight: Tensor,
    token_offsets: Tensor,
    token_ids: Tensor,
    logits: Tensor,
    partial: Tensor,
    best: Tensor,
    tiles: Tiles,
    use_tma: bool,
) -> None:
    """The wanted logits of some rows, and each tile's part of their sums."""
    rows, (vocabulary, size) = hidden.shape[0], weight.shape
    row_blocks = triton.cdiv(rows, tiles.block_r)
    logits_kernel[(row_blocks * partial.shape[1],)](
        hidden,
        weight,
        descriptor(hidden, tiles.block_r, tiles.block_k) if use_tma else None,
        descriptor(weight, tiles.block_v, tiles.block_k) if use_tma else None,
        token_offsets,
        token_ids,
        logits,
        partial,
        best,
        hidden.stride(0),
        weight.stride(0),
        rows,
        vocabulary,
        size,
        partial.shape[2],
        row_blocks,
        IS_WIDE=is_wide(_multiplied(hidden, weight)),
        USE_TMA=use_tma,
        EVEN_K=size % tiles.block_k == 0,
        EVEN_V=vocabulary % tiles.block_v == 0,
        BLOCK_R=tiles.block_r,
        BLOCK_V=tiles.block_v,
        BLOCK_K=tiles.block_k,
        BLOCK_T=_TARGETS,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )


def _combine_tiles(partial: Tensor, best: Tensor, lse: Tensor, argmax: Tensor, entropy: Tensor) -> None:
    _, num_tiles, chunk = partial.shape
    combine_kernel[(triton.cdiv(len(lse), 16),)](
        partial,
        best,
        lse,
        argmax,
        entropy,
        len(lse),
        num_tiles,
        chunk,
        BLOCK_R=16,
        BLOCK_T=power_of_2(min(num_tiles, 128)),
        num_warps=4,
    )


def _multiplied(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype of the product's inputs: their own, or where they differ what holds both."""
    return hidden.dtype if hidden.dtype == weight.dtype else torch.float32


def rows_of_launch(rows: int, row_bytes: int, num_tiles: int, block_r: int) -> int:
    """Whole blocks of rows, at most as many as hold ``rows``, whose partial results and hidden states fit."""
    most = min(_PARTIAL_BYTES // (16 * num_tiles), _HIDDEN_BYTES // max(row_bytes, 1))
    return min(max(most // block_r, 1), triton.cdiv(rows, block_r)) * block_r


def uses_tma(hidden: Tensor, weight: Tensor) -> bool:
    """Whether TMA fetches the tiles: 16-bit numbers, and rows that begin at multiples of 16 bytes."""
    return (
        is_hopper(hidden.device)
        and hidden.dtype == weight.dtype != torch.float32
        and has_aligned_rows(hidden)
        and has_aligned_rows(weight)
    )


@triton.jit
def count_tokens(token_ids_ptr, target0, target1, token0, BLOCK_V: tl.constexpr, BLOCK_T: tl.constexpr):
    """How many of the tokens wanted in places ``target0`` to ``target1`` are of the tile that begins at ``token0``."""
    num_hits = 0
    for t in range(target0, target1, BLOCK_T):
        offs_t = t + tl.arange(0, BLOCK_T)
        ids = tl.load(token_ids_ptr + offs_t, mask=offs_t < target1, other=-1)
        num_hits += tl.sum(((ids >= token0) & (ids < token0 + BLOCK_V)).to(tl.int32), axis=0)
    return num_hits


@triton.jit
def store_wanted(token_offsets_ptr, token_ids_ptr, logits_ptr, z, offs_r, offs_v, token0, R, BLOCK_V: tl.constexpr):
    """The logits of z [BLOCK_R, BLOCK_V] that its rows ask for."""
    begins = tl.load(token_offsets_ptr + offs_r, mask=offs_r < R, other=0)
    counts = (tl.load(token_offsets_ptr + offs_r + 1, mask=offs_r < R, other=0) - begins).to(tl.int32)
    for j in range(0, tl.max(counts, axis=0)):
        ids = tl.load(token_ids_ptr + begins + j, mask=j < counts, other=-1)
        is_here = (ids >= token0) & (ids < token0 + BLOCK_V)
        wanted = tl.sum(tl.where(ids[:, None] == offs_v[None, :], z, 0.0), axis=1)  # one term is not 0
        tl.store(logits_ptr + begins + j, wanted, mask=is_here)


# Sizes and starts that change from batch to batch are not specialized on: each would compile the kernel anew.
@triton.jit(
    do_not_specialize=["R", "V", "row_blocks"],
    do_not_specialize_on_alignment=["token_offsets_ptr", "token_ids_ptr", "logits_ptr"],
)
def logits_kernel(
    hidden_ptr,
    weight_ptr,
    hidden_desc,  # tensor descriptors of the same matrices; None without USE_TMA
    weight_desc,
    token_offsets_ptr,
    token_ids_ptr,
    logits_ptr,
    partial_ptr,
    best_ptr,
    stride_hr,
    stride_wv,
    R,
    V,
    D,
    chunk,
    row_blocks,
    IS_WIDE: tl.constexpr,
    USE_TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """One tile of logits; see the module. IS_WIDE: inputs are multiplied in fp32."""
    pid = tl.program_id(0)
    tile = pid // row_blocks
    row0 = (pid % row_blocks) * BLOCK_R
    token0 = tile * BLOCK_V
    offs_r = row0 + tl.arange(0, BLOCK_R)
    offs_v = token0 + tl.arange(0, BLOCK_V)

    # Does any row of the block ask for a token of this tile? Looked up first: the answer comes during the product.
    target0 = tl.load(token_offsets_ptr + row0).to(tl.int32)
    target1 = tl.load(token_offsets_ptr + tl.minimum(row0 + BLOCK_R, R)).to(tl.int32)
    num_hits = count_tokens(token_ids_ptr, target0, target1, token0, BLOCK_V, BLOCK_T)

    z = tl.zeros([BLOCK_R, BLOCK_V], dtype=tl.float32)
    if USE_TMA:
        for k in range(0, D, BLOCK_K):
            h = hidden_desc.load([row0, k])
            w = weight_desc.load([token0, k])
            z = multiply(h, w, z, IS_WIDE)
    else:
        offs_k = tl.arange(0, BLOCK_K)
        # Rows beyond the last are read again, and not used: the loop needs no mask for them.
        h_rows = tl.where(offs_r < R, offs_r, 0).to(tl.int64)
        w_rows = tl.where(offs_v < V, offs_v, 0).to(tl.int64)
        h_ptrs = hidden_ptr + h_rows[:, None] * stride_hr + offs_k[None, :]
        w_ptrs = weight_ptr + w_rows[:, None] * stride_wv + offs_k[None, :]
        for k in range(0, D, BLOCK_K):
            if EVEN_K:
                h = tl.load(h_ptrs)
                w = tl.load(w_ptrs)
            else:
                h = tl.load(h_ptrs, mask=(offs_k < D - k)[None, :], other=0.0)
                w = tl.load(w_ptrs, mask=(offs_k < D - k)[None, :], other=0.0)
            z = multiply(h, w, z, IS_WIDE)
            h_ptrs += BLOCK_K
            w_ptrs += BLOCK_K

    if num_hits > 0:
        store_wanted(token_offsets_ptr, token_ids_ptr, logits_ptr, z, offs_r, offs_v, token0, R, BLOCK_V)

    if not EVEN_V:
        z = tl.where((offs_v < V)[None, :], z, float("-inf"))
    maximum = tl.max(z, axis=1)
    # The lowest token that holds the maximum; a row of NaN holds none.
    first = tl.min(tl.where(z == maximum[:, None], offs_v[None, :], V - 1), axis=1)
    shifted = z - maximum[:, None]
    weights = tl.exp2(shifted * LOG2E)
    total = tl.sum(weights, axis=1)
    if not EVEN_V:
        shifted = tl.where((offs_v < V)[None, :], shifted, 0.0)
    moment = tl.sum(weights * shifted, axis=1)
    place = tile * chunk + offs_r
    stride = tl.num_programs(0) // row_blocks * chunk
    mask = offs_r < R
    tl.store(partial_ptr + place, maximum, mask=mask)
    tl.store(partial_ptr + stride + place, total, mask=mask)
    tl.store(partial_ptr + 2 * stride + place, moment, mask=mask)
    tl.store(best_ptr + place, first, mask=mask)


@triton.jit(do_not_specialize=["R", "num_tiles"])
def combine_kernel(
    partial_ptr,
    best_ptr,
    lse_ptr,
    argmax_ptr,
    entropy_ptr,
    R,
    num_tiles,
    chunk,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """The tiles of BLOCK_R rows, BLOCK_T at a time in order: maximum first, then the sums relative to it."""
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    stride = num_tiles * chunk
    maximum = tl.full([BLOCK_R], float("-inf"), dtype=tl.float32)
    best = tl.zeros([BLOCK_R], dtype=tl.int32)
    for t in range(0, num_tiles, BLOCK_T):
        offs_t = t + tl.arange(0, BLOCK_T)
        mask = (offs_t < num_tiles)[:, None] & (offs_r < R)[None, :]
        place = offs_t[:, None] * chunk + offs_r[None, :]
        m = tl.load(partial_ptr + place, mask=mask, other=float("-inf"))
        ids = tl.load(best_ptr + place, mask=mask, other=0)
        here = tl.max(m, axis=0)
        # The lowest token among the tiles that hold the maximum, if it is above all before.
        lowest = tl.min(tl.where(m == here[None, :], ids, 2147483647), axis=0)
        best = tl.where(here > maximum, lowest, best)
        maximum = tl.maximum(maximum, here)
    total = tl.zeros([BLOCK_R], dtype=tl.float32)
    moment = tl.zeros([BLOCK_R], dtype=tl.float32)
    for t in range(0, num_tiles, BLOCK_T):
        offs_t = t + tl.arange(0, BLOCK_T)
        mask = (offs_t < num_tiles)[:, None] & (offs_r < R)[None, :]
        place = offs_t[:, None] * chunk + offs_r[None, :]
        shift = tl.load(partial_ptr + place, mask=mask, other=0.0) - maximum[None, :]
        part = tl.load(partial_ptr + stride + place, mask=mask, other=0.0)
        part_moment = tl.load(partial_ptr + 2 * stride + place, mask=mask, other=0.0)
        scale = tl.exp2(shift * LOG2E)
        # Tiles far below the maximum count nothing: their scale is 0, and shift may be -inf.
        part_moment = tl.where(scale > 0, (part_moment + part * shift) * scale, part_moment * 0.0)
        total += tl.sum(tl.where(mask, part * scale, 0.0), axis=0)
        moment += tl.sum(tl.where(mask, part_moment, 0.0), axis=0)
    mask = offs_r < R
    log_total = tl.log2(total) * LN2
    tl.store(lse_ptr + offs_r, maximum + log_total, mask=mask)
    tl.store(argmax_ptr + offs_r, best.to(tl.int64), mask=mask)
    tl.store(entropy_ptr + offs_r, log_total - moment / total, mask=mask)
