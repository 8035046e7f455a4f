"""prefix_attention for Hopper GPUs: the launch of :mod:`psykern.kernels.triton.hopper_kernel`."""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from psykern.kernels.segments import Segments
from psykern.kernels.triton.common import dense_rows, has_aligned_rows, on_device_of
from psykern.kernels.triton.hopper_kernel import TILE_ROWS, attention_kernel

HEAD_DIMS = (64, 128)
_BLOCK_N = 128  # keys of a product
_STAGES = 3  # blocks of keys and of values that shared memory holds
# Registers of a thread that computes. What two such warpgroups leave of the 65,536 goes to the one that fetches.
_REGISTERS = 232


def supports(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """16-bit numbers, heads of 64 or 128 of them, at most 128 query heads to a key head, and rows that begin at
    multiples of 16 bytes."""
    is_fit = q.dtype in (torch.bfloat16, torch.float16) and k.dtype == v.dtype == q.dtype and q.shape[2] in HEAD_DIMS
    return is_fit and q.shape[1] // k.shape[1] <= TILE_ROWS.value and has_aligned_rows(k) and has_aligned_rows(v)


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
    turns: bool = False,
    persistent: bool = True,
) -> Tensor:
    """With ``overlap`` a warpgroup also multiplies beside its own exponentials, and with ``turns`` the two begin their
    products in turns. Without ``persistent`` a program answers one tile."""
    if q.numel() == 0:
        return out
    q, k, v = dense_rows(q), dense_rows(k.to(q.dtype)), dense_rows(v.to(q.dtype))
    if not supports(q, k, v):
        raise ValueError(f"q: expected 16-bit heads of {HEAD_DIMS} and aligned rows, got {q.dtype} {list(q.shape)}")
    head_dim, group = q.shape[2], q.shape[1] // k.shape[1]
    cut = segments.tiles(TILE_ROWS.value // group, q.device)
    num_items = cut.num_tiles * k.shape[1]
    target = out if dense_rows(out) is out else torch.empty_like(out, memory_format=torch.contiguous_format)
    with on_device_of(q):
        attention_kernel[(min(num_items, _num_processors(q.device)) if persistent else num_items,)](
            q,
            _descriptor(k.flatten(1), head_dim),
            _descriptor(v.flatten(1), head_dim),
            v,
            target,
            cut.table,
            cut.key_ranges,
            cut.limits,
            cut.tails,
            cut.positions,
            q.stride(0),
            v.stride(0),
            target.stride(0),
            num_items,
            k.shape[1],
            softmax_scale,
            0 if window is None else window,
            Dh=head_dim,
            GROUP=group,
            HAS_WINDOW=window is not None,
            OVERLAP=overlap,
            TURNS=turns,
            BLOCK_N=_BLOCK_N,
            STAGES=_STAGES,
            REGISTERS=_REGISTERS,
            num_warps=4,
        )
    return out if target is out else out.copy_(target)


def _num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _descriptor(x: Tensor, head_dim: int) -> TensorDescriptor:
    block = [_BLOCK_N, head_dim]
    layout = gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float16)
    return TensorDescriptor(x, list(x.shape), [x.stride(0), 1], block, layout)
