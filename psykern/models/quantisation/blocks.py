"""Codes to numbers: ``(code - zero) * scale``, with one zero and one scale for each block of a weight.

All is exact but the last product, which is rounded once, to fp32. A weight is gone through by chunks of rows that fit a
cache: beside the result no more than a few of them are held. Words are little-endian, as on all processors of today.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Codes = Callable[[int, int], Tensor]  # rows start to stop of the codes: [stop - start, in] float32, own memory

_CHUNK = 1 << 20  # numbers at a time
ROWS = 8  # chunks begin at a multiple of so many rows

# Of as many floats as a byte has codes: a dtype in which they are one element, which is looked up several times faster.
_ONE_ELEMENT = {1: torch.float32, 2: torch.int64, 4: torch.complex128}


def dequantise(
    codes: Codes,
    shape: tuple[int, int],
    scales: Tensor,
    zeros: Tensor | None = None,
    *,
    block: tuple[int, int],
    columns: Tensor | None = None,
) -> Tensor:
    """float32 of ``shape`` [out, in].

    scales, zeros: of each block, float32 [ceil(out / block[0]), ceil(in / block[1])]; no zeros: all are 0. columns:
    [in] int64, the column of scales and zeros for each of the weight's; None: as ``block`` has it.
    """
    num_rows, num_columns = shape
    out = torch.empty(shape, dtype=torch.float32)
    step = max(_CHUNK // max(num_columns, 1) // ROWS * ROWS, ROWS)
    for start in range(0, num_rows, step):
        stop = min(start + step, num_rows)
        x = codes(start, stop)
        rows = torch.arange(start, stop) // block[0] if block[0] > 1 else slice(start, stop)
        if zeros is not None:
            _apply(torch.sub, x, zeros[rows], block[1], columns, x)
        _apply(torch.mul, x, scales[rows], block[1], columns, out[start:stop])
    return out


def _apply(op: Callable[..., Tensor], x: Tensor, y: Tensor, width: int, columns: Tensor | None, out: Tensor) -> None:
    """``op`` of x [n, in] and y [n, blocks] to ``out``, which may be x."""
    if columns is not None:
        op(x, y.index_select(1, columns), out=out)
        return
    full = x.shape[1] // width
    if whole := full * width:
        op(x[:, :whole].unflatten(1, (full, width)), y[:, :full, None], out=out[:, :whole].unflatten(1, (full, width)))
    if whole < x.shape[1]:  # the last block is cut
        op(x[:, whole:], y[:, full:], out=out[:, whole:])


def unpack(words: Tensor, bits: int, zero: int = 0) -> Tensor:
    """Codes of ``bits`` (2, 3, 4, 8) that lie in int32 words [n, w] one behind another, the lowest bits first, less
    ``zero``: float32 [n, 32 w / bits]. With 3 bits, 32 codes are 3 words."""
    stored = words.contiguous().view(torch.uint8)
    if bits != 3:
        each = torch.arange(256)[:, None] >> torch.arange(0, 8, bits)
        return look_up((each % (1 << bits) - zero).float(), stored)
    triple = stored.view(words.shape[0], -1, 3).int()  # 8 codes
    joined = triple[..., 0] | triple[..., 1] << 8 | triple[..., 2] << 16
    return ((joined[..., None] >> torch.arange(0, 24, 3, dtype=torch.int32)) & 7).flatten(1).float() - zero


def widened(codes: Tensor) -> Tensor:
    """int8 or fp8 [n, m] in float32. torch converts fp8 number by number, half as fast as a table."""
    if codes.dtype == torch.int8:
        return codes.float()
    table = torch.arange(256, dtype=torch.uint8).view(codes.dtype).float()
    return look_up(table[:, None], codes.contiguous().view(torch.uint8))


def look_up(table: Tensor, stored: Tensor) -> Tensor:
    """The k floats that ``table`` [256, k] has for each byte of ``stored`` [n, m]: float32 [n, k m]."""
    elements = table.contiguous().view(_ONE_ELEMENT[table.shape[1]]).flatten()
    found = elements.index_select(0, stored.reshape(-1).int())
    return found.view(torch.float32).view(stored.shape[0], -1)
