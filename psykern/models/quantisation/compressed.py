"""compressed-tensors, as llm-compressor writes it, where weights alone are quantised.

A number is ``(code - zero) * scale``, with one scale for the tensor, a row, a group of a row's columns or a block.
pack-quantized: codes of 2, 4 or 8 bits packed along the columns in int32, with 2^(bits-1) added to them and to the
zeros, which are packed along the rows. Else codes are int8 or fp8 as they are. Source: compressed_tensors/compressors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from psykern.models.quantisation.blocks import dequantise, unpack, widened
from psykern.models.quantisation.scheme import FLOATS, Dtypes, Parts, Scheme, Shape, misshaped

Strategy = Literal["tensor", "channel", "group", "block"]

_ZEROS, _ORDER = "weight_zero_point", "weight_g_idx"


@dataclass(frozen=True, slots=True)
class Sharing:
    """Which numbers of a weight share a scale."""

    strategy: Strategy
    size: tuple[int, int] | None  # of a group (1, columns) or a block; None for the others

    def block(self, shape: Shape) -> tuple[int, int]:
        """Rows and columns of a weight ``shape`` that share one."""
        outputs, inputs = shape
        if self.size is not None:
            return self.size
        return (outputs, inputs) if self.strategy == "tensor" else (1, inputs)

    def scales(self, parts: Parts, shape: Shape) -> Shape:
        """The shape of scales. That of a whole tensor's is any that has one number."""
        if self.strategy == "tensor" and parts["weight_scale"].numel() == 1:
            return tuple(parts["weight_scale"].shape)
        rows, columns = (-(-size // each) for size, each in zip(shape, self.block(shape), strict=True))
        return rows, columns


@dataclass(frozen=True, slots=True)
class Packed(Scheme):
    bits: int
    sharing: Sharing  # not a block
    is_symmetric: bool  # zeros are 0
    has_order: bool  # groups are not runs of columns, so weight_g_idx is needed

    @property
    def suffixes(self) -> tuple[str, ...]:
        return "weight_packed", "weight_scale", "weight_shape", _ZEROS, _ORDER

    def needed(self, found: Parts) -> Dtypes:
        zeros = {} if self.is_symmetric else {_ZEROS: (torch.int32, torch.int8)}
        order = {_ORDER: (torch.int32,)} if self.has_order else {}
        return {
            "weight_packed": (torch.int32,), "weight_scale": FLOATS, "weight_shape": (torch.int64, torch.int32),
            **zeros, **order,
        }  # fmt: skip

    def optional(self) -> Dtypes:
        return {_ORDER: (torch.int32,)} if self.sharing.strategy == "group" else {}

    def problems(self, parts: Parts, shape: Shape) -> Iterator[str]:
        outputs, inputs = shape
        if parts["weight_shape"].tolist() != list(shape):
            yield f"weight_shape: expected {list(shape)}, got {parts['weight_shape'].tolist()}"
            return
        scales = self.sharing.scales(parts, shape)
        expected = {"weight_packed": (outputs, -(-inputs * self.bits // 32)), "weight_scale": scales, _ORDER: (inputs,)}
        if _ZEROS in parts:
            is_packed = parts[_ZEROS].dtype == torch.int32
            expected[_ZEROS] = (-(-outputs * self.bits // 32), *scales[1:]) if is_packed else scales
        wrong = list(misshaped(parts, expected))
        yield from wrong
        if not wrong and (order := _order(parts)) is not None:
            low, high = (int(v) for v in order.aminmax())
            if low < 0 or high >= scales[1]:
                yield f"{_ORDER}: expected numbers of {scales[1]} groups, got {low} to {high}"

    def shape(self, parts: Parts) -> Shape:
        return tuple(parts["weight_shape"].tolist())

    def weight(self, parts: Parts) -> Tensor:
        packed, (outputs, inputs) = parts["weight_packed"], self.shape(parts)
        block = self.sharing.block((outputs, inputs))
        scales = parts["weight_scale"].float().view(-(-outputs // block[0]), -1)
        offset = 0 if _ZEROS in parts else 1 << (self.bits - 1)
        return dequantise(
            lambda i, j: unpack(packed[i:j], self.bits, offset)[:, :inputs],
            (outputs, inputs),
            scales,
            self._zeros(parts, scales, outputs) if _ZEROS in parts else None,
            block=block,
            columns=_order(parts),
        )

    def label(self, parts: Parts) -> str:
        return f"compressed-tensors pack-quantized, {self.bits} bits, {self.sharing.strategy}"

    def _zeros(self, parts: Parts, scales: Tensor, outputs: int) -> Tensor:
        """Of each scale, as the codes have them."""
        if parts[_ZEROS].dtype == torch.int8:
            return parts[_ZEROS].float().view_as(scales) + (1 << (self.bits - 1))
        return unpack(parts[_ZEROS].t(), self.bits)[:, :outputs].t()


@dataclass(frozen=True, slots=True)
class Unpacked(Scheme):
    form: str  # as the config calls it
    kind: Literal["int", "float"]
    sharing: Sharing
    is_symmetric: bool  # zeros are 0

    @property
    def suffixes(self) -> tuple[str, ...]:
        return "weight", "weight_scale", _ZEROS

    def needed(self, found: Parts) -> Dtypes:
        dtypes = (self._dtype,)
        zeros = {} if self.is_symmetric else {_ZEROS: dtypes}
        return {"weight": dtypes, "weight_scale": FLOATS, **zeros}

    def problems(self, parts: Parts, shape: Shape) -> Iterator[str]:
        scales = self.sharing.scales(parts, shape)
        yield from misshaped(parts, {"weight": shape, "weight_scale": scales, _ZEROS: scales})

    def shape(self, parts: Parts) -> Shape:
        return tuple(parts["weight"].shape)

    def weight(self, parts: Parts) -> Tensor:
        weight = parts["weight"]
        rows, columns = weight.shape
        block = self.sharing.block((rows, columns))
        scales = parts["weight_scale"].float().view(-(-rows // block[0]), -1)
        zeros = parts[_ZEROS].float().view_as(scales) if _ZEROS in parts else None
        return dequantise(lambda i, j: widened(weight[i:j]), (rows, columns), scales, zeros, block=block)

    def label(self, parts: Parts) -> str:
        return f"compressed-tensors {self.form}, {'int8' if self.kind == 'int' else 'fp8'}, {self.sharing.strategy}"

    @property
    def _dtype(self) -> torch.dtype:
        return torch.int8 if self.kind == "int" else torch.float8_e4m3fn


def _order(parts: Parts) -> Tensor | None:
    """[in] int64, the group of each column; None: runs. A g_idx of -1 says so, too."""
    order = parts.get(_ORDER)
    return None if order is None or bool((order == -1).any()) else order.long()
