"""The operations in CUDA C++ (csrc/cuda), for fp32, bf16 and fp16 on a GPU of compute capability 8.0 or later.

The kernels take addresses, sizes and strides, and run on torch's current stream of the inputs' device. All arithmetic
is fp32; rows of inputs and outputs may lie apart, the numbers of a row must be dense, else an input is copied and an
output is written by way of a dense array. Inputs of different dtypes are computed in the wider one and rounded at the
end. Arguments are checked by ``psykern.kernels``, where the operations are described, and again by the binding.

There is no ``prefix_attention`` in CUDA C++, nor what a mixture of experts needs, by design: this backend takes
Triton's.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from types import ModuleType

import torch
from torch import Tensor

from psykern import _cuda
from psykern.kernels.reference import linear as linear
from psykern.kernels.reference import swiglu as swiglu
from psykern.kernels.routes import Routes
from psykern.kernels.segments import Segments

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_MIN_ROWS, _MAX_ROWS = 64, 512  # of a tile of logits
_TILE_BYTES = 16 * 2**20  # of a tile of fp32 logits: it stays in the second cache (A100 40 MB, H100 50 MB)
_WIDENED_BYTES = 64 * 2**20  # of the part of the weight that is held in fp32, where it must be


def option_logprobs(
    hidden: Tensor, weight: Tensor, token_offsets: Tensor, token_ids: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tiles of fp32 logits by the vendor's matrix product, each reduced while it stands in the cache.

    All tiles have one number of rows, the least power of 2 that holds all rows, from 64 to 512, so that calls of a few
    rows multiply the same shapes whatever stands beside a row. 16-bit inputs are multiplied as they are where torch
    writes fp32 products of them (from 2.8 on); else, and where the dtypes differ, both are widened, the weight a part
    at a time. fp32 products follow torch's ``allow_tf32``, which is off unless someone turns it on. Beside the outputs
    this takes 16 MiB, a tile of hidden states, and 64 MiB where the weight is widened.
    """
    token_offsets, token_ids = token_offsets.contiguous(), token_ids.contiguous()
    num_rows, size = hidden.shape
    device = hidden.device
    lse, entropy = torch.empty((2, num_rows), dtype=torch.float32, device=device)
    logits = torch.empty(token_ids.shape, dtype=torch.float32, device=device)
    argmax = torch.empty(num_rows, dtype=torch.int64, device=device)
    is_wide = hidden.dtype != weight.dtype or not (hidden.dtype == torch.float32 or _multiplies_into_fp32())
    height, width = _tile_shape(num_rows, weight.shape[0], size if is_wide else 0)
    tile = torch.zeros((height, size), dtype=torch.float32 if is_wide else hidden.dtype, device=device)
    buffer = torch.empty(height * width, dtype=torch.float32, device=device)
    state = torch.empty((3, height), dtype=torch.float32, device=device)  # maximum, total, moment
    with torch.cuda.device(device):
        running = dict(zip(("maximum", "total", "moment"), (x.data_ptr() for x in state), strict=True))
        running["stream"] = torch.cuda.current_stream().cuda_stream
        for begin in range(0, num_rows, height):
            rows = slice(begin, min(begin + height, num_rows))
            tile[: rows.stop - begin] = hidden[rows]
            for first in range(0, weight.shape[0], width):
                part = weight[first : first + width]
                z = buffer[: height * len(part)].view(height, len(part))
                _multiply(tile, part, z)
                _reduce_chunk(z, first, token_offsets[begin:], token_ids, logits, argmax[rows], running)
            done = {"lse": lse[begin:].data_ptr(), "entropy": entropy[begin:].data_ptr()}
            _cuda.finish_softmax(rows=rows.stop - begin, **done, **running)
    return lse, logits, argmax, entropy


def _reduce_chunk(
    z: Tensor,
    first: int,
    token_offsets: Tensor,
    token_ids: Tensor,
    logits: Tensor,
    argmax: Tensor,
    running: dict[str, int],
) -> None:
    """The logits z of the tokens from ``first`` on into the rows' running sums, and those that are wanted into
    ``logits``."""
    _cuda.online_softmax_chunk(
        z=z.data_ptr(),
        rows=len(argmax),
        width=z.shape[1],
        first=first,
        token_offsets=token_offsets.data_ptr(),
        token_ids=token_ids.data_ptr(),
        wanted=logits.data_ptr(),
        best=argmax.data_ptr(),
        **running,
    )


def _tile_shape(num_rows: int, vocabulary: int, widened_size: int) -> tuple[int, int]:
    """Rows and tokens of a tile of logits; ``widened_size``: numbers of a token that are held in fp32, 0 for none."""
    height = _MIN_ROWS
    while height < min(num_rows, _MAX_ROWS):
        height *= 2
    width = _TILE_BYTES // 4 // height
    if widened_size:
        width = min(width, max(_WIDENED_BYTES // 4 // widened_size // 64, 1) * 64)
    return height, min(width, vocabulary)


def _multiplies_into_fp32() -> bool:
    """Whether this torch has fp32 products of 16-bit matrices."""
    return "dtype_out" in torch.ops.aten.mm.overloads()


def _multiply(hidden: Tensor, weight: Tensor, z: Tensor) -> None:
    """z = hidden @ weight.T in fp32. Where hidden was widened the weight is too, which loses nothing."""
    if hidden.dtype == torch.float32:
        torch.mm(hidden, weight.float().T, out=z)
    else:
        torch.mm(hidden, weight.T, out_dtype=torch.float32, out=z)


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    softmax_scale: float,
    window: int | None,
    out: Tensor,
) -> Tensor:
    return _triton("prefix_attention").prefix_attention(q, k, v, segments, softmax_scale, window, out)


def expert_swiglu(x: Tensor, gates: Sequence[Tensor], ups: Sequence[Tensor], routes: Routes, out: Tensor) -> Tensor:
    return _triton("expert_swiglu").expert_swiglu(x, gates, ups, routes, out)


def expert_linear(x: Tensor, weights: Sequence[Tensor], routes: Routes, out: Tensor) -> Tensor:
    return _triton("expert_linear").expert_linear(x, weights, routes, out)


def add_weighted(x: Tensor, weights: Tensor, total: Tensor) -> Tensor:
    return _triton("add_weighted").add_weighted(x, weights, total)


def _triton(op: str) -> ModuleType:
    """Triton's operations; raises :class:`psykern.kernels.BackendError` where Triton is not installed."""
    from psykern.kernels import BackendError

    try:
        from psykern.kernels import triton
    except ImportError as error:
        raise BackendError(
            f"backend 'cuda' takes Triton's {op}, and triton is not installed: `pip install triton`"
        ) from error
    return triton


def add_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    norm_first: bool,
    normed: Tensor,
    summed: Tensor | None,
) -> None:
    dtype = _common_dtype(x, residual, weight)
    x, weight = _dense_rows(x, dtype), weight.to(dtype).contiguous()
    residual = None if residual is None else _dense_rows(residual, dtype)
    normed_target = _target(normed, dtype)
    summed_target = None if summed is None else _target(summed, dtype)
    with torch.cuda.device(x.device):
        _cuda.add_rms_norm(
            x=x.data_ptr(),
            x_stride=x.stride(0),
            residual=_pointer(residual),
            residual_stride=_stride(residual),
            weight=weight.data_ptr(),
            normed=normed_target.data_ptr(),
            normed_stride=normed_target.stride(0),
            summed=_pointer(summed_target),
            summed_stride=_stride(summed_target),
            rows=x.shape[0],
            columns=x.shape[1],
            eps=eps,
            norm_first=norm_first,
            dtype=_DTYPES[dtype],
            stream=torch.cuda.current_stream().cuda_stream,
        )
    _finish(normed, normed_target)
    if summed is not None and summed_target is not None:
        _finish(summed, summed_target)


def qk_norm_rope(
    x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, positions: Tensor, eps: float, out: Tensor
) -> Tensor:
    dtype = _common_dtype(x, weight)
    x, target = _dense_rows(x, dtype), _target(out, dtype)
    weight = None if weight is None else weight.to(dtype).contiguous()
    cos, sin, positions = cos.float().contiguous(), sin.float().contiguous(), positions.contiguous()
    with torch.cuda.device(x.device):
        _cuda.qk_norm_rope(
            x=x.data_ptr(),
            x_stride=x.stride(0),
            weight=_pointer(weight),
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
            positions=positions.data_ptr(),
            out=target.data_ptr(),
            out_stride=target.stride(0),
            rows=x.shape[0],
            heads=x.shape[1],
            pairs=x.shape[2] // 2,
            eps=eps,
            norm_projection=weight is not None and weight.shape[0] != x.shape[2],
            dtype=_DTYPES[dtype],
            stream=torch.cuda.current_stream().cuda_stream,
        )
    return _finish(out, target)


def silu_mul(gate: Tensor, up: Tensor, out: Tensor) -> Tensor:
    dtype = _common_dtype(gate, up)
    gate, up, target = _dense_rows(gate, dtype), _dense_rows(up, dtype), _target(out, dtype)
    with torch.cuda.device(gate.device):
        _cuda.silu_mul(
            gate=gate.data_ptr(),
            gate_stride=gate.stride(0),
            up=up.data_ptr(),
            up_stride=up.stride(0),
            out=target.data_ptr(),
            out_stride=target.stride(0),
            rows=gate.shape[0],
            columns=gate.shape[1],
            dtype=_DTYPES[dtype],
            stream=torch.cuda.current_stream().cuda_stream,
        )
    return _finish(out, target)


def gather_rows(source: Tensor, rows: Tensor, out: Tensor) -> Tensor:
    if out.numel() == 0:
        return out
    source, rows = source.contiguous(), rows.contiguous()
    target = out if out.is_contiguous() else torch.empty(out.shape, dtype=out.dtype, device=out.device)
    with torch.cuda.device(source.device):
        _cuda.gather_rows(
            source=source.data_ptr(),
            rows=rows.data_ptr(),
            out=target.data_ptr(),
            batches=source.shape[0],
            count=rows.shape[0],
            row_bytes=source[0, 0].nbytes,
            source_batch_bytes=source[0].nbytes,
            out_batch_bytes=target[0].nbytes,
            stream=torch.cuda.current_stream().cuda_stream,
        )
    return _finish(out, target)


def _common_dtype(*tensors: Tensor | None) -> torch.dtype:
    dtype = reduce(torch.promote_types, (t.dtype for t in tensors if t is not None))
    if dtype not in _DTYPES:
        raise ValueError(f"inputs: expected float32, bfloat16 or float16, got {dtype}")
    return dtype


def _dense_rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` in ``dtype``, itself where each of its rows is dense and they do not overlap, else a copy."""
    x = x.to(dtype)
    if x.is_contiguous() or (x[0].is_contiguous() and (x.shape[0] == 1 or x.stride(0) >= x[0].numel())):
        return x
    return x.contiguous()


def _target(out: Tensor, dtype: torch.dtype) -> Tensor:
    """``out`` itself where the kernel can write it, else a dense array that is copied to it afterwards."""
    return out if _dense_rows(out, dtype) is out else torch.empty(out.shape, dtype=dtype, device=out.device)


def _finish(out: Tensor, target: Tensor) -> Tensor:
    return out if target is out else out.copy_(target)


def _pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)
