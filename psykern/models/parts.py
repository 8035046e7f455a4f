"""What the parts of a layer have in common: products with a weight, and what a part says of its tensors and its cost.

A part is two classes. Its spec (``AttentionSpec``) is read from ``config.json`` and knows the names and shapes of its
tensors and what computing it takes, before there is a weight. The part itself (``Attention``) holds the weights of one
layer. Nothing else knows a part's tensors by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

Shapes = dict[str, tuple[int, ...]]  # of tensors, by their names within a layer: "mlp.up_proj.weight"
Fused = dict[str, tuple[str, ...]]  # products of one input that can be one: its name, and their names in order


@dataclass(frozen=True, slots=True)
class Flops:
    """Floating-point operations; a multiply-add counts two. Norms and other work by element are not counted."""

    per_row: int = 0  # of every row
    per_query: int = 0  # of a row that needs an output
    per_visible_key: int = 0  # of each pair of a query and a key that it sees

    def __add__(self, other: Flops) -> Flops:
        return Flops(
            self.per_row + other.per_row,
            self.per_query + other.per_query,
            self.per_visible_key + other.per_visible_key,
        )


class Linear(NamedTuple):
    """A weight [out, in] and its bias [out]: what ``kernels.linear`` takes as a layer."""

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], name: str) -> Linear:
        return cls(tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))

    @classmethod
    def find(cls, tensors: Mapping[str, Tensor], name: str) -> Linear | None:
        """None where ``tensors`` hold no such weight."""
        return cls.of(tensors, name) if f"{name}.weight" in tensors else None


def linear_shapes(name: str, outputs: int, inputs: int, has_bias: bool) -> Shapes:
    shapes: Shapes = {f"{name}.weight": (outputs, inputs)}
    return shapes | {f"{name}.bias": (outputs,)} if has_bias else shapes
