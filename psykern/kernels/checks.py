"""The checks of arguments that the operations share. Each error names the argument, what was expected and what was got.

Values are read only where they are on the CPU: to read them from a device would make it wait. A tensor that is traced
has none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

# By names of this module, as each call of an operation asks, and a small one takes but ten microseconds.
_num_tracers = torch._C._len_torch_dispatch_stack
_innermost_transform = torch._C._functorch.peek_interpreter_stack


def is_traced(x: Tensor) -> bool:
    """Whether ``x`` stands for a tensor, or what is done to it is recorded: under ``torch.compile``, ``torch.export``
    and other tracers, in the transforms of ``torch.func``, for fake and meta tensors, and for those of a library's own
    kind."""
    # In the order in which dynamo, which follows this, needs it: to it all tensors are of the plain type.
    return (
        is_dynamo_compiling()
        or type(x) is not Tensor
        or _num_tracers() > 0
        or _innermost_transform() is not None
        or x.is_meta
    )


def tensors_of(value: Any) -> Sequence[Tensor]:
    """Those in an argument: itself, or those in its lists and tuples."""
    if isinstance(value, Tensor):
        return (value,)
    return [x for item in value for x in tensors_of(item)] if isinstance(value, (list, tuple)) else ()


def expect_no_gradients(names: Sequence[str], values: Sequence[Any]) -> None:
    """That autograd, in neither direction, has a part in any of these arguments: it would take the result for a
    constant."""
    is_backward, is_forward = torch.is_grad_enabled(), forward_ad._current_level >= 0
    for name, value in zip(names, values, strict=False):
        for x in tensors_of(value):
            if (is_backward and x.requires_grad) or (is_forward and forward_ad.unpack_dual(x).tangent is not None):
                raise ValueError(
                    f"{name}: expected no tensor that requires gradients, as psykern's operations have none, got one; "
                    "give its .detach(), or call within torch.no_grad()"
                )


def expect(name: str, holds: bool, expected: str | Callable[[], str], got: Tensor) -> None:
    """``holds``: whether the shape of ``got`` is as ``expected``, which is made into words only where it is not."""
    if not holds:
        words = expected if isinstance(expected, str) else expected()
        raise ValueError(f"{name}: expected {words}, got {list(got.shape)}")


def expect_dtype(name: str, got: Tensor, expected: tuple[torch.dtype, ...]) -> None:
    if got.dtype not in expected:
        raise ValueError(f"{name}: expected {' or '.join(map(str, expected))}, got {got.dtype}")


def expect_offsets(name: str, offsets: Tensor, end: int) -> None:
    """CSR offsets of ``end`` values in all."""
    if not offsets.is_cpu or is_traced(offsets):
        return
    values = offsets.numpy()  # whose small operations are a tenth of torch's
    if not len(values) or values[0] != 0 or values[-1] != end or (values[1:] < values[:-1]).any():
        raise ValueError(f"{name}: expected to ascend from 0 to {end}, got {offsets.tolist()!s:.80}")


def span(values: Tensor) -> tuple[int, int] | None:
    """The least and the largest of ``values``; None where there is none, or where they are on a device or traced."""
    if not values.is_cpu or is_traced(values) or not values.numel():
        return None
    array = values.numpy()
    return int(array.min()), int(array.max())


def expect_span(name: str, got: tuple[int, int] | None, last: int, of_what: str) -> None:
    """Values from 0 to ``last``; ``got`` is what :func:`span` gives."""
    # A graph would be compiled anew for other numbers in ``got``.
    if not is_dynamo_compiling() and got is not None and (got[0] < 0 or got[1] > last):
        raise ValueError(f"{name}: expected {of_what}, 0 to {last}, got {got[0]} to {got[1]}")


def out_like(name: str, out: Tensor | None, like: Tensor) -> Tensor:
    """``out`` checked against ``like``, or a new array like it."""
    if out is None:
        return torch.empty_like(like)
    expect_out(name, out, tuple(like.shape), like)
    return out


def expect_out(name: str, out: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    """An array to write to: of ``shape``, in the dtype and on the device of ``like``."""
    expect(name, out.shape == shape, lambda: f"{list(shape)}", out)
    if out.dtype != like.dtype or out.device != like.device:
        raise ValueError(f"{name}: expected {like.dtype} on {like.device}, got {out.dtype} on {out.device}")
