"""The operations in C++ (csrc/cpu), for fp32 and bf16 tensors on the CPU, on as many threads as torch uses.

Tensors reach C++ as numpy arrays on the same memory. Rows may lie apart, as in a slice of a projection; a row itself
must be dense, else an input is copied and an output is written by way of a dense array. bf16 is read and written as it
is, and where the processor can, multiplied so; sums and all else are fp32. fp16 is widened here and rounded at the end,
but for weights of products. Shapes are checked by ``psykern.kernels``, where the operations are described, and again by
the binding.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from psykern import _cpu
from psykern.kernels.routes import Routes
from psykern.kernels.segments import Segments

# weight, bias, up, its bias (of swiglu alone), out
_Part = tuple[np.ndarray, np.ndarray | None, np.ndarray | None, np.ndarray | None, np.ndarray]


def linear(x: Tensor, layers: Sequence[tuple[Tensor, Tensor | None]], outs: Sequence[Tensor], add: bool) -> None:
    targets = [_held(out) if add else _target(out) for out in outs]
    parts: list[_Part] = [
        (_weight(weight), _bias(bias), None, None, _floats(target))
        for (weight, bias), target in zip(layers, targets, strict=True)
    ]
    _multiply(x, parts, "add" if add else "store")
    for out, target in zip(outs, targets, strict=True):
        _finish(out, target)


def swiglu(x: Tensor, gate: tuple[Tensor, Tensor | None], up: tuple[Tensor, Tensor | None], out: Tensor) -> None:
    target = _target(out)
    (weight, bias), (up_weight, up_bias) = gate, up
    part: _Part = (_weight(weight), _bias(bias), _weight(up_weight), _bias(up_bias), _floats(target))
    _multiply(x, [part], "silu_mul")
    _finish(out, target)


def expert_swiglu(x: Tensor, gates: Sequence[Tensor], ups: Sequence[Tensor], routes: Routes, out: Tensor) -> Tensor:
    target = _target(out)
    _cpu.expert_swiglu(
        _floats(x),
        [_weight(weight) for weight in gates],
        [_weight(weight) for weight in ups],
        _array(routes.slots),
        _array(routes.offsets),
        _floats(target),
        top_k=routes.top_k,
        num_threads=torch.get_num_threads(),
    )
    return _finish(out, target)


def expert_linear(x: Tensor, weights: Sequence[Tensor], routes: Routes, out: Tensor) -> Tensor:
    target = _target(out)
    _cpu.expert_linear(
        _floats(x),
        [_weight(weight) for weight in weights],
        _array(routes.slots),
        _array(routes.offsets),
        _floats(target),
        num_threads=torch.get_num_threads(),
    )
    return _finish(out, target)


def add_weighted(x: Tensor, weights: Tensor, total: Tensor) -> Tensor:
    target = _held(total)
    _cpu.add_weighted(_floats(x), _array(weights), _floats(target), num_threads=torch.get_num_threads())
    return _finish(total, target)


def _multiply(x: Tensor, parts: Sequence[_Part], epilogue: str) -> None:
    _cpu.linear(_floats(x), parts, epilogue=epilogue, num_threads=torch.get_num_threads())


def _finish(out: Tensor, target: Tensor) -> Tensor:
    return out if target is out else out.copy_(target)


def _floats(x: Tensor) -> np.ndarray:
    """fp32 as it is, bf16 as int16, fp16 widened; each row dense."""
    dense = _dense_rows((x.float() if x.dtype == torch.float16 else x).detach())
    return dense.view(torch.int16).numpy() if dense.dtype == torch.bfloat16 else dense.numpy()


def _weight(weight: Tensor) -> np.ndarray:
    """As it is stored, bf16 as int16; each row dense."""
    return _dense_rows(weight.detach()).numpy() if weight.dtype == torch.float16 else _floats(weight)


def _bias(bias: Tensor | None) -> np.ndarray | None:
    return None if bias is None else _vector(bias)


def option_logprobs(
    hidden: Tensor, weight: Tensor, token_offsets: Tensor, token_ids: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_rows, num_tokens = hidden.shape[0], token_ids.shape[0]
    lse, entropy = torch.empty(num_rows), torch.empty(num_rows)
    logits, argmax = torch.empty(num_tokens), torch.empty(num_rows, dtype=torch.int64)
    _cpu.option_logprobs(
        _floats(hidden),
        _floats(weight),
        _array(token_offsets),
        _array(token_ids),
        lse.numpy(),
        logits.numpy(),
        argmax.numpy(),
        entropy.numpy(),
        num_threads=torch.get_num_threads(),
    )
    return lse, logits, argmax, entropy


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    softmax_scale: float,
    window: int | None,
    out: Tensor,
) -> Tensor:
    target = _target(out)
    _cpu.prefix_attention(
        _floats(q),
        _floats(k),
        _floats(v),
        _array(segments.positions),
        _array(segments.query_offsets),
        _array(segments.range_offsets),
        _array(segments.key_ranges),
        _floats(target),
        softmax_scale=softmax_scale,
        window=window,
        num_threads=torch.get_num_threads(),
    )
    return _finish(out, target)


def add_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    norm_first: bool,
    normed: Tensor,
    summed: Tensor | None,
) -> None:
    targets = [None if out is None else _target(out) for out in (normed, summed)]
    _cpu.add_rms_norm(
        _floats(x),
        None if residual is None else _floats(residual),
        _vector(weight),
        *(None if target is None else _floats(target) for target in targets),
        eps=eps,
        norm_first=norm_first,
        num_threads=torch.get_num_threads(),
    )
    for out, target in zip((normed, summed), targets, strict=True):
        if out is not None and target is not None:
            _finish(out, target)


def qk_norm_rope(
    x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, positions: Tensor, eps: float, out: Tensor
) -> Tensor:
    target = _target(out)
    _cpu.qk_norm_rope(
        _floats(x),
        None if weight is None else _vector(weight),
        _array(cos),
        _array(sin),
        _array(positions),
        _floats(target),
        eps=eps,
        num_threads=torch.get_num_threads(),
    )
    return _finish(out, target)


def silu_mul(gate: Tensor, up: Tensor, out: Tensor) -> Tensor:
    target = _target(out)
    _cpu.silu_mul(_floats(gate), _floats(up), _floats(target), num_threads=torch.get_num_threads())
    return _finish(out, target)


def gather_rows(source: Tensor, rows: Tensor, out: Tensor) -> Tensor:
    return torch.index_select(source, 1, rows, out=out)


def _target(out: Tensor) -> Tensor:
    """``out`` itself where the kernel can write it, else an array that is copied to it afterwards."""
    return torch.empty(out.shape) if out.dtype == torch.float16 else _dense_rows(out)


def _held(out: Tensor) -> Tensor:
    """As :func:`_target`, with what ``out`` holds."""
    return out.float() if out.dtype == torch.float16 else _dense_rows(out)


def _dense_rows(x: Tensor) -> Tensor:
    """``x`` itself where each of its rows is dense and they do not overlap, else an array of the same values."""
    if x.is_contiguous() or (x[0].is_contiguous() and (x.shape[0] == 1 or x.stride(0) >= x[0].numel())):
        return x
    return x.contiguous()


def _array(x: Tensor) -> np.ndarray:
    return (x if x.is_contiguous() else x.contiguous()).detach().numpy()


def _vector(weight: Tensor) -> np.ndarray:
    return _array(weight if weight.dtype == torch.float32 else weight.float())  # [D]
