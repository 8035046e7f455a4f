"""The operations of ``psykern.kernels`` on arrays of NumPy, JAX, CuPy, or another library that has DLPack.

Memory is shared in both directions wherever that is possible: arrays are copied where a stride is negative, which torch
has not, and by the other library where it must. NumPy's bfloat16, which is of ``ml_dtypes`` and unknown to DLPack, is
passed as 16-bit integers.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

_WRITTEN = ("out", "outs", "normed", "summed", "total")  # what operations call the arrays that they write to
_IMMUTABLE = ("jax", "jaxlib")  # libraries whose arrays never change


def call(operation: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What ``operation``, a function of tensors, gives of arrays: ``call(kernels.silu_mul, gate, up)``.

    Arrays may be of several libraries and stand in lists and tuples; what is not an array is passed on. The results are
    of the library of the first array, an array that was written to (``out``) is given back itself, and what is no
    tensor, such as ``kernels.Segments``, stays as it is.
    Raises ``ValueError`` for an array to write to that cannot be written, or not without a copy, and ``TypeError`` for
    arrays that DLPack cannot hand over.
    """
    bound = inspect.signature(operation).bind(*args, **kwargs)
    given: list[tuple[Tensor, Any]] = []  # in the order of the call, each with the array whose memory it is
    for name, value in bound.arguments.items():
        bound.arguments[name] = _tensors(value, name, given)
    result = operation(*bound.args, **bound.kwargs)
    return _arrays(result, given) if given else result


def _tensors(value: Any, name: str, given: list[tuple[Tensor, Any]]) -> Any:
    if isinstance(value, (list, tuple)):
        return _group(value, [_tensors(item, name, given) for item in value])
    if not (isinstance(value, Tensor) or hasattr(value, "__dlpack__")):
        return value
    tensor = to_tensor(value, name, is_written=name in _WRITTEN)
    given.append((tensor, value))
    return tensor


def _arrays(result: Any, given: list[tuple[Tensor, Any]]) -> Any:
    if isinstance(result, Tensor):
        itself = next((array for tensor, array in given if tensor is result), None)
        return from_tensor(result, given[0][1]) if itself is None else itself
    is_group = isinstance(result, (list, tuple))
    return _group(result, [_arrays(item, given) for item in result]) if is_group else result


def _group(like: Any, items: list[Any]) -> Any:
    """A list, a tuple or a named tuple of other items."""
    return type(like)(*items) if hasattr(like, "_fields") else type(like)(items)


def to_tensor(array: Any, name: str = "array", *, is_written: bool = False) -> Tensor:
    """The array as a tensor on its own device and, but for negative strides, on its own memory; a tensor is given back.

    A tensor on an array that is read-only must not be written to; with ``is_written`` such an array is refused.
    """
    if isinstance(array, Tensor):
        return array
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(f"{name}: expected an array without a mask, got a masked one; fill it first")
    kind = f"{type(array).__module__}.{type(array).__name__}"
    has_negative = any(stride < 0 for stride in getattr(array, "strides", None) or ())
    if is_written and has_negative:
        raise ValueError(f"{name}: expected an array to write to without negative strides, got {array.strides}")
    if is_written and _is_read_only(array):
        raise ValueError(f"{name}: expected an array that can be written to, got a read-only {kind}")
    held = array.copy() if has_negative else array  # torch would end the process
    is_bfloat16 = isinstance(held, np.ndarray) and held.dtype.name == "bfloat16"
    try:
        return _shared(held.view(np.int16)).view(torch.bfloat16) if is_bfloat16 else _shared(held)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        dtype = getattr(array, "dtype", "unknown")
        raise TypeError(
            f"{name}: expected an array that DLPack can hand over, got {kind} of {dtype}: {error}"
        ) from error


def _shared(array: Any) -> Tensor:
    try:
        return torch.from_dlpack(array)
    except BufferError:  # older versions of numpy and torch hand over no array that is read-only
        if not (isinstance(array, np.ndarray) and _is_read_only(array)):
            raise
        return torch.from_numpy(array.copy())


def _is_read_only(array: Any) -> bool:
    if isinstance(array, np.ndarray):
        return not array.flags.writeable
    return type(array).__module__.partition(".")[0] in _IMMUTABLE


def from_tensor(tensor: Tensor, like: Any) -> Any:
    """The tensor as an array of the library of ``like``, on the tensor's memory where that library can."""
    if isinstance(like, Tensor):
        return tensor
    if isinstance(like, np.ndarray):
        host = tensor.detach().cpu()
        if host.dtype != torch.bfloat16:
            return host.numpy()
        return host.view(torch.int16).numpy().view(np.dtype("bfloat16"))  # which ml_dtypes has made known
    library = type(like).__module__.partition(".")[0]
    standard = like.__array_namespace__() if hasattr(like, "__array_namespace__") else None
    take = getattr(standard, "from_dlpack", None) or getattr(sys.modules.get(library), "from_dlpack", None)
    if take is None:
        raise TypeError(f"expected arrays of a library with from_dlpack, as NumPy, JAX and CuPy are, got {library}")
    return take(tensor.detach().contiguous())
