"""GPTQ, in the layout of AutoGPTQ and GPTQModel, ``gptq`` and ``gptq_v2``.

``qweight`` [in * bits / 32, out] holds codes packed along the input, ``qzeros`` [groups, out * bits / 32] along the
output; a number is ``(code - zero) * scales[g_idx[column]]``. ``gptq`` stores zeros less one; GPTQModel takes the ones
from whole words and adds them so, which carries where a zero is 0. Source: gptqmodel/utils/model.py and
nn_modules/qlinear.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from psykern.models.quantisation.blocks import dequantise, unpack
from psykern.models.quantisation.scheme import FLOATS, Dtypes, Parts, Scheme, Shape, misshaped

_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}  # 1 in each code of a word


@dataclass(frozen=True, slots=True)
class Gptq(Scheme):
    bits: int
    group_size: int  # inputs that share a scale; -1: all do
    has_order: bool  # groups are not runs of inputs, so g_idx is needed
    is_less_one: bool  # zeros are stored less one

    @property
    def suffixes(self) -> tuple[str, ...]:
        return "qweight", "qzeros", "scales", "g_idx"

    def needed(self, found: Parts) -> Dtypes:
        order = {"g_idx": (torch.int32,)} if self.has_order else {}
        return {"qweight": (torch.int32,), "qzeros": (torch.int32,), "scales": FLOATS, **order}

    def optional(self) -> Dtypes:
        return {"g_idx": (torch.int32,)}

    def problems(self, parts: Parts, shape: Shape) -> Iterator[str]:
        outputs, inputs = shape
        if outputs * self.bits % 32 or inputs * self.bits % 32:
            yield f"qweight: expected whole words of codes, got {list(shape)} of {self.bits} bits"
            return
        size = inputs if self.group_size == -1 else self.group_size
        groups = -(-inputs // size)
        expected: dict[str, Shape] = {
            "qweight": (inputs * self.bits // 32, outputs),
            "qzeros": (groups, outputs * self.bits // 32),
            "scales": (groups, outputs),
            "g_idx": (inputs,),
        }
        wrong = list(misshaped(parts, expected))
        yield from wrong
        if "g_idx" in parts and not wrong:
            low, high = (int(v) for v in parts["g_idx"].aminmax())
            if low < 0 or high >= groups:
                yield f"g_idx: expected numbers of {groups} groups, got {low} to {high}"

    def shape(self, parts: Parts) -> Shape:
        words, outputs = parts["qweight"].shape
        return outputs, words * 32 // self.bits

    def weight(self, parts: Parts) -> Tensor:
        packed, (outputs, inputs) = parts["qweight"].t().contiguous(), self.shape(parts)
        zeros = self._zeros(parts["qzeros"]).t()
        low, high = (int(v) for v in zeros.aminmax())
        size = inputs if self.group_size == -1 else self.group_size
        order = parts.get("g_idx")
        in_runs = order is None or torch.equal(order, torch.arange(inputs, dtype=torch.int32) // size)
        return dequantise(
            lambda i, j: unpack(packed[i:j], self.bits, low if low == high else 0),
            (outputs, inputs),
            parts["scales"].t().float(),
            None if low == high else zeros,  # symmetric ones are all alike, which saves a pass
            block=(1, size),
            columns=None if in_runs or order is None else order.long(),
        )

    def label(self, parts: Parts) -> str:
        return f"gptq {self.bits} bits"

    def _zeros(self, words: Tensor) -> Tensor:
        """[groups, out] float32."""
        if not self.is_less_one:
            return unpack(words, self.bits)
        if self.bits == 3:  # codes straddle words, so that each is added to alone
            return (unpack(words, self.bits) + 1) % 8
        return unpack(words + _ONES[self.bits], self.bits)
