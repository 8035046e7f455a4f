"""The checks of arguments that the operations share. Each error names the argument, what was expected and what was got.

Values are read only where they are on the CPU: to read them from a device would make it wait.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


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
    if not offsets.is_cpu:
        return
    values = offsets.detach().numpy()  # whose small operations are a tenth of torch's
    if not len(values) or values[0] != 0 or values[-1] != end or (values[1:] < values[:-1]).any():
        raise ValueError(f"{name}: expected to ascend from 0 to {end}, got {offsets.tolist()!s:.80}")


def span(values: Tensor) -> tuple[int, int] | None:
    """The least and the largest of ``values``; None where there is none, or where they are on a device."""
    if not values.is_cpu or not values.numel():
        return None
    array = values.detach().numpy()
    return int(array.min()), int(array.max())


def expect_span(name: str, got: tuple[int, int] | None, last: int, of_what: str) -> None:
    """Values from 0 to ``last``; ``got`` is what :func:`span` gives."""
    if got is not None and (got[0] < 0 or got[1] > last):
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
