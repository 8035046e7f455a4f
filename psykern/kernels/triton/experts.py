"""expert_swiglu and expert_linear: the products of a mixture of experts.

An expert's rows are cut into tiles, its last one ragged; a small kernel writes the table of the tiles of all experts,
so that nobody but the device needs to know how many rows each has. The product's grid is of the most tiles that there
can be, and the programs of those that there are not return at once: no row is padded or dropped. Each program
multiplies the rows of one tile with some columns of its expert's weights. GROUP tiles next to each other, mostly of one
expert, take the same columns one after the other: then the weights of a column, and the rows, are read again from the
L2 cache while other columns are multiplied.

SwiGLU is two products with the same rows, gathered by the program, with the gate applied in fp32 to their sums. The
second product scatters its rows to the order of slots. Sums over K are fp32, in one order. On Hopper TMA fetches the
weights, and rows that stand next to each other; it cannot gather.

Compiled for an A100 and an H100, and run under Triton's interpreter; not yet run or measured on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from psykern.kernels.routes import Routes
from psykern.kernels.triton.common import (
    dense_rows,
    dense_target,
    descriptor,
    has_aligned_rows,
    is_hopper,
    is_wide,
    multiply,
    on_device_of,
)

_GROUP = 8  # tiles that take the same columns one after the other
# Triton 3.6 sets no fence between what cp.async fetches and wgmma; 3.9 does (tests/kernels/test_triton_resources.py).
_HAS_FENCE = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)


class Tiles(NamedTuple):
    """Rows and columns of a program's results, its step along K, and what it takes."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def tiles_of(
    rows_of_expert: float, size: int, dtype: torch.dtype, is_gated: bool, hopper: bool, use_tma: bool
) -> Tiles:
    """By the mean rows of an expert, the size K of a row, and what is multiplied. ``is_gated``: two products of as many
    columns each. Of 64 rows or fewer weights take longer to read than to multiply: then two programs share a
    multiprocessor. benchmarks/results/triton_resources_*.csv have the registers they take.
    """
    products = 2 if is_gated else 1
    if dtype == torch.float32:
        return Tiles(64, 64 // products, 16, 4, 2)
    block_k = 64 if size > 32 and size % 8 == 0 else 32  # odd rows are loaded number by number, into registers
    if rows_of_expert <= 64:
        return Tiles(64, 128 // products, block_k, 4 if use_tma else 8, 4 if use_tma or not hopper else 1)
    if use_tma:
        return Tiles(128, 256 // products, block_k, 8, 4)
    return Tiles(128, 128 // products, block_k, 8, 1 if hopper else 3)  # in one stage: not by cp.async


def expert_swiglu(x: Tensor, gates: Sequence[Tensor], ups: Sequence[Tensor], routes: Routes, out: Tensor) -> Tensor:
    gate, up = as_one("gates", gates, x.dtype), as_one("ups", ups, x.dtype)
    if out.numel() == 0:
        return out
    x, target = dense_rows(x), dense_target(out)
    num_experts, width, size = gate.shape
    use_tma = uses_tma(gate) and uses_tma(up)
    rows = len(out) / num_experts
    tiles = tiles_of(rows, size, x.dtype, True, is_hopper(x.device), use_tma)
    with on_device_of(x):
        table = tile_table(routes, tiles.block_m)
        expert_swiglu_kernel[(len(table) * triton.cdiv(width, tiles.block_n),)](
            x,
            gate,
            up,
            descriptor(_rows_of(gate), tiles.block_n, tiles.block_k) if use_tma else None,
            descriptor(_rows_of(up), tiles.block_n, tiles.block_k) if use_tma else None,
            routes.slots,
            table,
            target,
            x.stride(0),
            gate.stride(0),
            gate.stride(1),
            up.stride(0),
            up.stride(1),
            target.stride(0),
            width,
            size,
            TOP_K=routes.top_k,
            IS_WIDE=is_wide(x.dtype),
            USE_TMA=use_tma,
            IS_AHEAD=use_tma and not _HAS_FENCE,
            EVEN_K=size % tiles.block_k == 0,
            GROUP=_GROUP,
            BLOCK_M=tiles.block_m,
            BLOCK_N=tiles.block_n,
            BLOCK_K=tiles.block_k,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )
    return out if target is out else out.copy_(target)


def expert_linear(x: Tensor, weights: Sequence[Tensor], routes: Routes, out: Tensor) -> Tensor:
    weight = as_one("weights", weights, x.dtype)
    if out.numel() == 0:
        return out
    x, target = dense_rows(x), dense_target(out)
    num_experts, width, size = weight.shape
    use_tma = uses_tma(weight) and has_aligned_rows(x)
    tiles = tiles_of(len(x) / num_experts, size, x.dtype, False, is_hopper(x.device), use_tma)
    with on_device_of(x):
        table = tile_table(routes, tiles.block_m)
        expert_linear_kernel[(len(table) * triton.cdiv(width, tiles.block_n),)](
            x,
            weight,
            descriptor(x, tiles.block_m, tiles.block_k) if use_tma else None,
            descriptor(_rows_of(weight), tiles.block_n, tiles.block_k) if use_tma else None,
            routes.slots,
            table,
            target,
            x.stride(0),
            weight.stride(0),
            weight.stride(1),
            target.stride(0),
            width,
            size,
            IS_WIDE=is_wide(x.dtype),
            USE_TMA=use_tma,
            EVEN_K=size % tiles.block_k == 0,
            GROUP=_GROUP,
            BLOCK_M=tiles.block_m,
            BLOCK_N=tiles.block_n,
            BLOCK_K=tiles.block_k,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )
    return out if target is out else out.copy_(target)


def tile_table(routes: Routes, block_m: int) -> Tensor:
    """[tiles, 3] int32, a multiple of _GROUP and at least as many as there can be: the expert of each, its first row
    and the end of the expert's rows, in the order of ``routes.slots``; those that there are not end before they begin.
    """
    slots, num_experts = routes.slots.shape[0], routes.num_experts
    most = slots // block_m + min(num_experts, slots)  # each expert that has rows has at most one ragged tile
    table = torch.empty((triton.cdiv(most, _GROUP) * _GROUP, 3), dtype=torch.int32, device=routes.slots.device)
    tiles_kernel[(num_experts + 1,)](
        routes.offsets,
        table,
        num_experts,
        len(table),
        BLOCK_M=block_m,
        BLOCK_E=triton.next_power_of_2(num_experts),
        BLOCK_T=128,
        num_warps=1,
    )
    return table


def as_one(name: str, experts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The weights of all experts as one tensor [E, M, K] of ``dtype`` whose rows are dense; a copy only where they are
    of another dtype, or not dense. Raises ``ValueError`` where they do not lie at one distance from each other."""
    one = (experts if isinstance(experts, Tensor) else _around(name, experts)).to(dtype)
    return one if one.stride(2) == 1 else one.contiguous()


def _around(name: str, experts: Sequence[Tensor]) -> Tensor:
    """What ``experts`` are views of, in order."""
    first = experts[0]
    memory, start = first.untyped_storage().data_ptr(), first.storage_offset()
    step = experts[1].storage_offset() - start if len(experts) > 1 else 0
    for e, weight in enumerate(experts):
        is_next = weight.untyped_storage().data_ptr() == memory and weight.storage_offset() == start + e * step
        if not is_next or step < 0 or weight.stride() != first.stride():
            raise ValueError(
                f"{name}: expected one tensor [{len(experts)}, {first.shape[0]}, {first.shape[1]}] or views of one in "
                f"the order of experts, got tensors apart from expert {e} on: put them into one"
            )
    return first.as_strided((len(experts), *first.shape), (step, *first.stride()), start)


def uses_tma(weights: Tensor) -> bool:
    """Whether TMA fetches [E, M, K]: 16-bit numbers, rows that begin at multiples of 16 bytes, and experts that lie a
    number of rows apart."""
    step, stride = weights.stride(0), weights.stride(1)
    is_fit = weights.dtype != torch.float32 and step % max(stride, 1) == 0 and is_hopper(weights.device)
    return is_fit and has_aligned_rows(weights[0])


def _rows_of(weights: Tensor) -> Tensor:
    """[E, M, K] as a matrix, with the rows that lie between one expert's and the next's, if any do."""
    num_experts, width, size = weights.shape
    rows = (num_experts - 1) * (weights.stride(0) // weights.stride(1)) + width
    return weights.as_strided((rows, size), (weights.stride(1), 1))


@triton.jit(do_not_specialize=["E", "num_tiles"])
def tiles_kernel(
    offsets_ptr, tiles_ptr, E, num_tiles, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_T: tl.constexpr
):
    """The tiles of one expert; the program behind the last expert's writes those that there are not."""
    expert = tl.program_id(0)
    offs_e = tl.arange(0, BLOCK_E)
    is_before = offs_e < expert
    begins = tl.load(offsets_ptr + offs_e, mask=is_before, other=0)
    ends = tl.load(offsets_ptr + offs_e + 1, mask=is_before, other=0)
    first = tl.sum((ends - begins + BLOCK_M - 1) // BLOCK_M, axis=0)
    begin = tl.load(offsets_ptr + expert, mask=expert < E, other=0)
    end = tl.load(offsets_ptr + expert + 1, mask=expert < E, other=0)
    count = tl.where(expert < E, (end - begin + BLOCK_M - 1) // BLOCK_M, num_tiles - first)
    for t in range(0, count, BLOCK_T):
        offs_t = t + tl.arange(0, BLOCK_T)
        row_ptr = tiles_ptr + 3 * (first + offs_t)
        mask = offs_t < count
        tl.store(row_ptr, expert + tl.zeros_like(offs_t), mask=mask)
        tl.store(row_ptr + 1, begin + offs_t * BLOCK_M, mask=mask)
        tl.store(row_ptr + 2, end + tl.zeros_like(offs_t), mask=mask)


@triton.jit
def tile_of_program(tiles_ptr, M, GROUP: tl.constexpr, BLOCK_N: tl.constexpr):
    """The expert, the first row, the end of the expert's rows, and the first column."""
    pid = tl.program_id(0)
    columns = tl.cdiv(M, BLOCK_N)
    tile_ptr = tiles_ptr + 3 * (pid // (GROUP * columns) * GROUP + pid % GROUP)
    return tl.load(tile_ptr), tl.load(tile_ptr + 1), tl.load(tile_ptr + 2), pid // GROUP % columns * BLOCK_N


@triton.jit
def fetch(ptrs, k, K, EVEN_K: tl.constexpr, BLOCK_K: tl.constexpr):
    """A block of some rows from column k on, of which ``ptrs`` are at column 0; 0 behind the last column."""
    mask = None if EVEN_K else (tl.arange(0, BLOCK_K) < K - k)[None, :]
    return tl.load(ptrs + k, mask=mask, other=None if EVEN_K else 0.0)


@triton.jit
def pointers(ptr, rows, stride, BLOCK_K: tl.constexpr):
    """To the first BLOCK_K columns of ``rows``."""
    return ptr + rows.to(tl.int64)[:, None] * stride + tl.arange(0, BLOCK_K)[None, :]


@triton.jit
def expert_swiglu_kernel(
    x_ptr,
    gates_ptr,
    ups_ptr,
    gates_desc,  # tensor descriptors of the same weights; None without USE_TMA
    ups_desc,
    slots_ptr,
    tiles_ptr,
    out_ptr,
    stride_xn,
    stride_ge,
    stride_gm,
    stride_ue,
    stride_um,
    stride_on,
    M,
    K,
    TOP_K: tl.constexpr,
    IS_WIDE: tl.constexpr,
    USE_TMA: tl.constexpr,
    IS_AHEAD: tl.constexpr,
    EVEN_K: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile. IS_WIDE: inputs are multiplied in fp32. IS_AHEAD: the rows of the next step wait in registers, and go
    to shared memory from there, before a fence; else by cp.async."""
    expert, first, end, column0 = tile_of_program(tiles_ptr, M, GROUP, BLOCK_N)
    if first >= end:
        return
    offs_m = first + tl.arange(0, BLOCK_M)
    offs_n = column0 + tl.arange(0, BLOCK_N)
    # Rows behind the last, and columns, are others read again, and not used: the loop needs no mask for them.
    x_ptrs = pointers(x_ptr, tl.load(slots_ptr + tl.minimum(offs_m, end - 1)) // TOP_K, stride_xn, BLOCK_K)
    if not USE_TMA:
        columns = tl.minimum(offs_n, M - 1)
        gate_ptrs = pointers(gates_ptr + expert.to(tl.int64) * stride_ge, columns, stride_gm, BLOCK_K)
        up_ptrs = pointers(ups_ptr + expert.to(tl.int64) * stride_ue, columns, stride_um, BLOCK_K)
    gate = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    if IS_AHEAD:
        ahead = fetch(x_ptrs, 0, K, EVEN_K, BLOCK_K)
    for k in range(0, K, BLOCK_K):
        if IS_AHEAD:
            x = ahead
            ahead = fetch(x_ptrs, k + BLOCK_K, K, False, BLOCK_K)
        else:
            x = fetch(x_ptrs, k, K, EVEN_K, BLOCK_K)
        if USE_TMA:
            gate_weight = gates_desc.load([expert * (stride_ge // stride_gm) + column0, k])
            up_weight = ups_desc.load([expert * (stride_ue // stride_um) + column0, k])
        else:
            gate_weight = fetch(gate_ptrs, k, K, EVEN_K, BLOCK_K)
            up_weight = fetch(up_ptrs, k, K, EVEN_K, BLOCK_K)
        gate = multiply(x, gate_weight, gate, IS_WIDE)
        up = multiply(x, up_weight, up, IS_WIDE)
    value = gate / (1.0 + tl.exp(-gate)) * up
    out_ptrs = out_ptr + offs_m.to(tl.int64)[:, None] * stride_on + offs_n[None, :]
    mask = (offs_m < end)[:, None] & (offs_n < M)[None, :]
    tl.store(out_ptrs, value.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def expert_linear_kernel(
    x_ptr,
    weight_ptr,
    x_desc,  # tensor descriptors of the same arrays; None without USE_TMA
    weight_desc,
    slots_ptr,
    tiles_ptr,
    out_ptr,
    stride_xn,
    stride_we,
    stride_wm,
    stride_on,
    M,
    K,
    IS_WIDE: tl.constexpr,
    USE_TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile. TMA fetches the rows of the next expert behind the last, which are not used."""
    expert, first, end, column0 = tile_of_program(tiles_ptr, M, GROUP, BLOCK_N)
    if first >= end:
        return
    offs_m = first + tl.arange(0, BLOCK_M)
    offs_n = column0 + tl.arange(0, BLOCK_N)
    if not USE_TMA:
        x_ptrs = pointers(x_ptr, tl.minimum(offs_m, end - 1), stride_xn, BLOCK_K)
        weight_ptr += expert.to(tl.int64) * stride_we
        weight_ptrs = pointers(weight_ptr, tl.minimum(offs_n, M - 1), stride_wm, BLOCK_K)
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        if USE_TMA:
            x = x_desc.load([first, k])
            weight = weight_desc.load([expert * (stride_we // stride_wm) + column0, k])
        else:
            x = fetch(x_ptrs, k, K, EVEN_K, BLOCK_K)
            weight = fetch(weight_ptrs, k, K, EVEN_K, BLOCK_K)
        total = multiply(x, weight, total, IS_WIDE)
    slots = tl.load(slots_ptr + offs_m, mask=offs_m < end, other=0).to(tl.int64)
    out_ptrs = out_ptr + slots[:, None] * stride_on + offs_n[None, :]
    mask = (offs_m < end)[:, None] & (offs_n < M)[None, :]
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=mask)
