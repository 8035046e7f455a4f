"""bitsandbytes, as ``transformers`` saves it.

4 bits: ``weight`` holds the codes of the flattened weight, two in a byte, the first in its upper half; a number is
``quant_map[code] * absmax[block]``, blocks being runs of numbers. With double quantisation ``absmax`` is itself codes,
of 8 bits, and means ``nested_quant_map[absmax] * nested_absmax[block] + nested_offset``. Block sizes, the offset and
the shape are JSON in the bytes of a tensor. Source: ``QuantState`` in bitsandbytes/functional.py.

int8: ``weight[i, j] * SCB[i] / 127``. LLM.int8() computes with activations of 8 bits; here they are as they are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from psykern.models.quantisation.blocks import dequantise, look_up, widened
from psykern.models.quantisation.scheme import Dtypes, Parts, Scheme, Shape, misshaped

_STORAGE = (torch.uint8, torch.int8, torch.bfloat16, torch.float16, torch.float32)  # bnb_4bit_quant_storage
_CODES, _ABSMAX, _MAP = "weight", "weight.absmax", "weight.quant_map"
_NESTED_ABSMAX, _NESTED_MAP = "weight.nested_absmax", "weight.nested_quant_map"
_LARGEST = 4096  # block that the library makes
_ROWS = 0  # the weight_format in which rows lie as they are


@dataclass(frozen=True, slots=True)
class _State:
    """What the JSON of a weight says."""

    shape: Shape
    block_size: int
    nested_block_size: int | None  # None: absmax is not quantised
    nested_offset: float

    @classmethod
    def of(cls, part: Tensor, quant_type: str) -> _State:
        """Raises ValueError for what is no such JSON."""
        said = json.loads(bytes(part.tolist()))
        if not isinstance(said, dict) or said.get("quant_type") != quant_type:
            raise ValueError(f"expected an object with quant_type {quant_type!r}, got {said!r:.80}")
        nested = "nested_blocksize" in said
        shape, offset = said.get("shape"), said.get("nested_offset", 0.0)
        sizes = [said.get("blocksize"), *([said["nested_blocksize"]] if nested else [])]
        if not isinstance(shape, list) or not all(map(_is_size, shape)) or not all(map(_is_block, sizes)):
            raise ValueError(f"expected a shape, and a blocksize of 2 to {_LARGEST}, even, got {said!r:.160}")
        if not isinstance(offset, (int, float)) or not math.isfinite(offset):
            raise ValueError(f"expected a number as nested_offset, got {offset!r:.80}")
        return cls(tuple(shape), sizes[0], sizes[1] if nested else None, float(offset))


@dataclass(frozen=True, slots=True)
class FourBits(Scheme):
    quant_type: Literal["nf4", "fp4"]

    @property
    def suffixes(self) -> tuple[str, ...]:
        return _CODES, _ABSMAX, _MAP, _NESTED_ABSMAX, _NESTED_MAP, self._state

    def needed(self, found: Parts) -> Dtypes:
        always = {_CODES: _STORAGE, _MAP: (torch.float32,), self._state: (torch.uint8,)}
        if not _is_nested(found):
            return {**always, _ABSMAX: (torch.float32,)}
        nested = {_NESTED_ABSMAX: (torch.float32,), _NESTED_MAP: (torch.float32,)}
        return {**always, _ABSMAX: (torch.uint8,), **nested}

    def problems(self, parts: Parts, shape: Shape) -> Iterator[str]:
        try:
            state = _State.of(parts[self._state], self.quant_type)
        except (ValueError, RecursionError) as error:
            yield f"{self._state}: damaged: {error}"
            return
        if state.shape != shape:
            yield f"{self._state}: expected the shape {list(shape)}, got {list(state.shape)}"
            return
        num_numbers = math.prod(shape)
        if parts[_CODES].nbytes != -(-num_numbers // 2):
            yield f"{_CODES}: expected {-(-num_numbers // 2)} bytes, got {parts[_CODES].nbytes}"
        blocks = -(-num_numbers // state.block_size)
        expected: dict[str, Shape] = {_ABSMAX: (blocks,), _MAP: (16,)}
        if _is_nested(parts):
            if state.nested_block_size is None:
                yield f"{self._state}: expected nested_blocksize, as {_ABSMAX} is quantised"
            else:
                expected |= {_NESTED_ABSMAX: (-(-blocks // state.nested_block_size),), _NESTED_MAP: (256,)}
        yield from misshaped(parts, expected)

    def shape(self, parts: Parts) -> Shape:
        return _State.of(parts[self._state], self.quant_type).shape

    def weight(self, parts: Parts) -> Tensor:
        state = _State.of(parts[self._state], self.quant_type)
        code = parts[_MAP]
        pairs = torch.stack((code.repeat_interleave(16), code.repeat(16)), dim=1)  # [256, 2]
        stored, absmax = parts[_CODES].contiguous().view(torch.uint8).flatten(), parts[_ABSMAX]
        if state.nested_block_size is not None and _is_nested(parts):
            nested = _blockwise(absmax, parts[_NESTED_MAP][:, None], parts[_NESTED_ABSMAX], state.nested_block_size)
            absmax = nested[: absmax.numel()].add_(state.nested_offset)
        numbers = _blockwise(stored, pairs, absmax, state.block_size)
        return numbers[: math.prod(state.shape)].view(state.shape)

    def label(self, parts: Parts) -> str:
        return f"bitsandbytes {self.quant_type}" + (", double quantised" if _is_nested(parts) else "")

    @property
    def _state(self) -> str:
        return f"weight.quant_state.bitsandbytes__{self.quant_type}"


@dataclass(frozen=True, slots=True)
class Int8(Scheme):
    @property
    def suffixes(self) -> tuple[str, ...]:
        return "weight", "SCB", "weight_format"

    def needed(self, found: Parts) -> Dtypes:
        return {"weight": (torch.int8,), "SCB": (torch.float32,)}

    def optional(self) -> Dtypes:
        return {"weight_format": (torch.uint8,)}

    def problems(self, parts: Parts, shape: Shape) -> Iterator[str]:
        yield from misshaped(parts, {"weight": shape, "SCB": shape[:1]})
        kind = parts.get("weight_format")
        if kind is not None and kind.flatten().tolist() != [_ROWS]:
            yield f"weight_format: expected {_ROWS}, rows as they are, got {kind.tolist()}"

    def shape(self, parts: Parts) -> Shape:
        return tuple(parts["weight"].shape)

    def weight(self, parts: Parts) -> Tensor:
        weight, scales = parts["weight"], parts["SCB"][:, None]
        rows, columns = weight.shape
        scaled = dequantise(lambda i, j: widened(weight[i:j]), (rows, columns), scales, block=(1, columns))
        return scaled.mul_(1 / 127)  # last, so that it is rounded as there

    def label(self, parts: Parts) -> str:
        return "bitsandbytes int8, activations not quantised"


def _blockwise(stored: Tensor, table: Tensor, scales: Tensor, block_size: int) -> Tensor:
    """Flat float32: what ``table`` [256, k] has for each byte, times the scale of its run of ``block_size`` numbers,
    the last filled up. Runs are rows here, as they need not be of one row of a weight."""
    width = block_size // table.shape[1]
    filled = torch.nn.functional.pad(stored, (0, -stored.numel() % width)).view(-1, width)
    shape = filled.shape[0], block_size
    return dequantise(lambda i, j: look_up(table, filled[i:j]), shape, scales[:, None], block=(1, block_size)).flatten()


def _is_nested(parts: Parts) -> bool:
    return _ABSMAX in parts and parts[_ABSMAX].dtype == torch.uint8


def _is_block(value: object) -> bool:
    return isinstance(value, int) and _is_size(value) and value % 2 == 0 and value <= _LARGEST


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31
