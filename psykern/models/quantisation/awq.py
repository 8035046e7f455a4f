"""AWQ, in the layout of AutoAWQ's GEMM version.

``qweight`` [in, out / 8] and ``qzeros`` [groups, out / 8] hold codes of 4 bits packed along the output, in the order
that its kernels take them; a number is ``(code - zero) * scales``. Source: awq/utils/packing_utils.py of AutoAWQ.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from psykern.models.quantisation.blocks import ROWS, dequantise
from psykern.models.quantisation.scheme import FLOATS, Dtypes, Parts, Scheme, Shape, misshaped

_BITS, _EACH = 4, 8  # codes in a word
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of 8 outputs each code of a word belongs to, the lowest bits first


@dataclass(frozen=True, slots=True)
class Awq(Scheme):
    group_size: int  # inputs that share a scale; -1: all do

    @property
    def suffixes(self) -> tuple[str, ...]:
        return "qweight", "qzeros", "scales"

    def needed(self, found: Parts) -> Dtypes:
        return {"qweight": (torch.int32,), "qzeros": (torch.int32,), "scales": FLOATS}

    def problems(self, parts: Parts, shape: Shape) -> Iterator[str]:
        outputs, inputs = shape
        size = inputs if self.group_size == -1 else self.group_size
        if outputs % _EACH or inputs % size:
            yield f"qweight: expected whole words and groups of {size}, got {list(shape)}"
            return
        groups = inputs // size
        words = outputs // _EACH
        yield from misshaped(
            parts, {"qweight": (inputs, words), "qzeros": (groups, words), "scales": (groups, outputs)}
        )

    def shape(self, parts: Parts) -> Shape:
        inputs, words = parts["qweight"].shape
        return words * _EACH, inputs

    def weight(self, parts: Parts) -> Tensor:
        packed, (outputs, inputs) = parts["qweight"], self.shape(parts)
        size = inputs if self.group_size == -1 else self.group_size
        assert ROWS % _EACH == 0  # chunks begin at a word
        return dequantise(
            lambda i, j: _rows(packed[:, i // _EACH : j // _EACH]),
            (outputs, inputs),
            parts["scales"].t().float(),
            _rows(parts["qzeros"]),
            block=(1, size),
        )

    def label(self, parts: Parts) -> str:
        return f"awq {_BITS} bits"


def _rows(words: Tensor) -> Tensor:
    """Of int32 words [n, out / 8]: their codes, float32 [out, n]."""
    across = words.t().contiguous()
    out = torch.empty(across.shape[0], _EACH, across.shape[1])
    for place, output in enumerate(_ORDER):
        out[:, output] = (across >> _BITS * place) & 0xF
    return out.flatten(0, 1)
