"""Fine-grained FP8, as in DeepSeek-V3 and Qwen3-FP8: ``weight * weight_scale_inv`` of the block that a number is in.

The models' own kernels quantise activations too, to 8 bits; here they are as they are.
Source: transformers/integrations/finegrained_fp8.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from psykern.models.quantisation.blocks import dequantise, widened
from psykern.models.quantisation.scheme import FLOATS, Dtypes, Parts, Scheme, Shape, misshaped


@dataclass(frozen=True, slots=True)
class BlockFp8(Scheme):
    block: tuple[int, int]  # rows and columns that share a scale; blocks at the edges are cut

    @property
    def suffixes(self) -> tuple[str, ...]:
        return "weight", "weight_scale_inv"

    def needed(self, found: Parts) -> Dtypes:
        return {"weight": (torch.float8_e4m3fn,), "weight_scale_inv": (*FLOATS, torch.float8_e8m0fnu)}

    def problems(self, parts: Parts, shape: Shape) -> Iterator[str]:
        rows, columns = (-(-size // each) for size, each in zip(shape, self.block, strict=True))
        yield from misshaped(parts, {"weight": shape, "weight_scale_inv": (rows, columns)})

    def shape(self, parts: Parts) -> Shape:
        return tuple(parts["weight"].shape)

    def weight(self, parts: Parts) -> Tensor:
        weight, scales = parts["weight"], parts["weight_scale_inv"].float()
        rows, columns = weight.shape
        return dequantise(lambda i, j: widened(weight[i:j]), (rows, columns), scales, block=self.block)

    def label(self, parts: Parts) -> str:
        return f"fp8 in blocks of {self.block[0]} x {self.block[1]}, activations not quantised"
