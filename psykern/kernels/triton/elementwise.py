"""add_rms_norm, qk_norm_rope, silu_mul and add_weighted: one read and one write of each number."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from psykern.kernels.triton.common import dense_rows, dense_target, on_device_of

_COLUMNS = 1024  # of a program of silu_mul or add_weighted


def add_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    norm_first: bool,
    normed: Tensor,
    summed: Tensor | None,
) -> None:
    x, weight = dense_rows(x), weight.contiguous()
    residual = None if residual is None else dense_rows(residual)
    targets = [None if out is None else dense_target(out) for out in (normed, summed)]
    if x.numel():
        block = triton.next_power_of_2(x.shape[1])
        with on_device_of(x):
            add_rms_norm_kernel[(x.shape[0],)](
                x,
                residual,
                weight,
                *targets,
                x.stride(0),
                0 if residual is None else residual.stride(0),
                targets[0].stride(0),  # type: ignore[union-attr]
                0 if targets[1] is None else targets[1].stride(0),
                x.shape[1],
                eps,
                HAS_RESIDUAL=residual is not None,
                NORM_FIRST=norm_first,
                BLOCK_D=block,
                num_warps=_warps(block),
            )
    for out, target in zip((normed, summed), targets, strict=True):
        if out is not None and target is not None and target is not out:
            out.copy_(target)


def qk_norm_rope(
    x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, positions: Tensor, eps: float, out: Tensor
) -> Tensor:
    x, target = dense_rows(x), dense_target(out)
    rows, heads, size = x.shape
    kind = "none" if weight is None else "head" if weight.shape[0] == size else "projection"
    if x.numel():
        block_h, block_p = triton.next_power_of_2(heads), triton.next_power_of_2(size // 2)
        with on_device_of(x):
            qk_norm_rope_kernel[(rows,)](
                x,
                None if weight is None else weight.contiguous(),
                cos.contiguous(),
                sin.contiguous(),
                positions.contiguous(),
                target,
                x.stride(0),
                target.stride(0),
                heads,
                size // 2,
                eps,
                NORM=kind,
                BLOCK_H=block_h,
                BLOCK_P=block_p,
                num_warps=_warps(2 * block_h * block_p),
            )
    return out if target is out else out.copy_(target)


def silu_mul(gate: Tensor, up: Tensor, out: Tensor) -> Tensor:
    gate, up, target = dense_rows(gate), dense_rows(up), dense_target(out)
    rows, columns = gate.shape
    if gate.numel():
        with on_device_of(gate):
            silu_mul_kernel[(rows * triton.cdiv(columns, _COLUMNS),)](
                gate,
                up,
                target,
                gate.stride(0),
                up.stride(0),
                target.stride(0),
                columns,
                BLOCK_F=_COLUMNS,
                num_warps=4,
            )
    return out if target is out else out.copy_(target)


def add_weighted(x: Tensor, weights: Tensor, total: Tensor) -> Tensor:
    x, weights, target = dense_rows(x), weights.contiguous(), dense_rows(total)
    rows, columns = total.shape
    if total.numel():
        with on_device_of(total):
            add_weighted_kernel[(rows * triton.cdiv(columns, _COLUMNS),)](
                x,
                weights,
                target,
                x.stride(0),
                target.stride(0),
                columns,
                TOP_K=weights.shape[1],
                BLOCK_D=_COLUMNS,
                num_warps=4,
            )
    return total if target is total else total.copy_(target)


def gather_rows(source: Tensor, rows: Tensor, out: Tensor) -> Tensor:
    return torch.index_select(source, 1, rows, out=out)


def _warps(numbers: int) -> int:
    """Of a program that holds ``numbers`` at once: 8 to 32 in each thread."""
    return min(max(numbers // 512, 1), 8)


@triton.jit
def add_rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    normed_ptr,
    summed_ptr,
    stride_xn,
    stride_rn,
    stride_nn,
    stride_sn,
    D,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    NORM_FIRST: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One row. Where the sum is stored in half precision, the norm is that of the stored sum."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK_D)
    mask = offs < D
    dtype = normed_ptr.dtype.element_ty
    s = tl.load(x_ptr + row * stride_xn + offs, mask=mask, other=0.0).to(tl.float32)
    residual = tl.zeros([BLOCK_D], dtype=tl.float32)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + row * stride_rn + offs, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL and not NORM_FIRST:
        total = (s + residual).to(dtype)
        tl.store(summed_ptr + row * stride_sn + offs, total, mask=mask)
        s = total.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(s * s, axis=0) / D + eps)
    weight = tl.load(weight_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    normed = (s * scale * weight).to(dtype)
    if HAS_RESIDUAL and NORM_FIRST:
        total = (residual + normed.to(tl.float32)).to(dtype)
        tl.store(summed_ptr + row * stride_sn + offs, total, mask=mask)
    tl.store(normed_ptr + row * stride_nn + offs, normed, mask=mask)


@triton.jit(do_not_specialize_on_alignment=["positions_ptr"])  # a batch begins at any place
def qk_norm_rope_kernel(
    x_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    out_ptr,
    stride_xn,
    stride_on,
    H,
    P,  # pairs of a head, Dh / 2
    eps,
    NORM: tl.constexpr,  # "none", "head" or "projection"
    BLOCK_H: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """All heads of one row: the low and the high halves as two arrays [BLOCK_H, BLOCK_P]."""
    row = tl.program_id(0).to(tl.int64)
    offs_h = tl.arange(0, BLOCK_H)
    offs_p = tl.arange(0, BLOCK_P)
    mask = (offs_h < H)[:, None] & (offs_p < P)[None, :]
    place = offs_h[:, None] * (2 * P) + offs_p[None, :]
    low = tl.load(x_ptr + row * stride_xn + place, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(x_ptr + row * stride_xn + place + P, mask=mask, other=0.0).to(tl.float32)
    if NORM != "none":
        squares = tl.sum(low * low + high * high, axis=1)  # [BLOCK_H]
        if NORM == "head":
            scale = (1.0 / tl.sqrt(squares / (2 * P) + eps))[:, None]
            weight_low = tl.load(weight_ptr + offs_p, mask=offs_p < P, other=0.0).to(tl.float32)[None, :]
            weight_high = tl.load(weight_ptr + offs_p + P, mask=offs_p < P, other=0.0).to(tl.float32)[None, :]
        else:
            scale = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / (2 * P * H) + eps)
            weight_low = tl.load(weight_ptr + place, mask=mask, other=0.0).to(tl.float32)
            weight_high = tl.load(weight_ptr + place + P, mask=mask, other=0.0).to(tl.float32)
        low = low * scale * weight_low
        high = high * scale * weight_high
    position = tl.load(positions_ptr + row).to(tl.int64)
    cos = tl.load(cos_ptr + position * P + offs_p, mask=offs_p < P, other=0.0)[None, :]
    sin = tl.load(sin_ptr + position * P + offs_p, mask=offs_p < P, other=0.0)[None, :]
    dtype = out_ptr.dtype.element_ty
    tl.store(out_ptr + row * stride_on + place, (low * cos - high * sin).to(dtype), mask=mask)
    tl.store(out_ptr + row * stride_on + place + P, (high * cos + low * sin).to(dtype), mask=mask)


@triton.jit
def silu_mul_kernel(gate_ptr, up_ptr, out_ptr, stride_gn, stride_un, stride_on, F, BLOCK_F: tl.constexpr):
    """A part of one row. One axis for both: the parts of a row run together, as they lie in memory, and an axis for
    rows alone, behind that of the parts, would end at 65,535."""
    blocks = tl.cdiv(F, BLOCK_F)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    offs = tl.program_id(0) % blocks * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = offs < F
    gate = tl.load(gate_ptr + row * stride_gn + offs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_un + offs, mask=mask, other=0.0).to(tl.float32)
    value = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * stride_on + offs, value.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def add_weighted_kernel(
    x_ptr, weights_ptr, total_ptr, stride_xn, stride_tn, D, TOP_K: tl.constexpr, BLOCK_D: tl.constexpr
):
    """A part of one row; programs in one axis, as in ``silu_mul_kernel``."""
    blocks = tl.cdiv(D, BLOCK_D)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    offs = tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = offs < D
    total_ptrs = total_ptr + row * stride_tn + offs
    total = tl.load(total_ptrs, mask=mask, other=0.0).to(tl.float32)
    for j in tl.static_range(TOP_K):
        slot = row * TOP_K + j
        x = tl.load(x_ptr + slot * stride_xn + offs, mask=mask, other=0.0).to(tl.float32)
        total += x * tl.load(weights_ptr + slot)
    tl.store(total_ptrs, total.to(total_ptr.dtype.element_ty), mask=mask)
