"""What the launches share."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

# What a kernel's log2 and exp2 are scaled by: the hardware computes powers of 2.
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

HOPPER_SHARED_BYTES = 227 * 1024  # that one program may have


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Launches go to the device of ``x``, on torch's current stream there."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def is_wide(dtype: torch.dtype) -> bool:
    """Whether inputs of ``dtype`` are multiplied in fp32; the interpreter has no product of bf16, whose numbers fp32
    holds exactly."""
    return dtype == torch.float32 or (dtype == torch.bfloat16 and triton.knobs.runtime.interpret)


def dense_rows(x: Tensor) -> Tensor:
    """``x`` with the numbers of each row dense: a copy where they are not."""
    inner = x[:1] if x.dim() > 1 else x
    return x if inner.is_contiguous() or x.numel() == 0 else x.contiguous()


def dense_target(out: Tensor) -> Tensor:
    """Where to write: ``out``, or a dense array in its place, to be copied."""
    return out if dense_rows(out) is out else torch.empty(out.shape, dtype=out.dtype, device=out.device)


def has_aligned_rows(x: Tensor) -> bool:
    """Whether each row begins at a multiple of 16 bytes, as TMA asks."""
    return x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0


def descriptor(x: Tensor, block_rows: int, block_columns: int) -> TensorDescriptor:
    """What TMA, the tensor memory accelerator of Hopper GPUs, needs to fetch blocks of a matrix with dense rows; what
    lies outside the matrix it reads as 0."""
    return TensorDescriptor(x, list(x.shape), [x.stride(0), 1], [block_rows, block_columns])


@cache
def is_hopper(device: torch.device) -> bool:
    """TMA, which loads tiles without registers, and the shared memory of a Hopper GPU, which the larger tiles fill: a
    later GPU for desktops (compute capability 12.0) has the one without the other, and takes the tiles of an A100."""
    if device.type != "cuda":
        return False
    has = torch.cuda.get_device_properties(device)
    shared_bytes = has.shared_memory_per_block_optin  # type: ignore[attr-defined]  # not in torch's stubs
    return has.major >= 9 and shared_bytes >= HOPPER_SHARED_BYTES


def power_of_2(n: int) -> int:
    """The least power of 2 from ``n`` on, at least 16 (the least side of a matrix product)."""
    return max(16, triton.next_power_of_2(n))


@triton.jit
def multiply(x, weight, total, IS_WIDE: tl.constexpr):
    """total + x @ weight.T; IS_WIDE: in fp32."""
    if IS_WIDE:
        total = tl.dot(x.to(tl.float32), tl.trans(weight.to(tl.float32)), total, input_precision="ieee")
    else:
        total = tl.dot(x, tl.trans(weight), total)
    return total
