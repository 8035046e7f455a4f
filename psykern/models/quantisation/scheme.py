"""What all formats have in common: a weight [out, in] is stored as parts, tensors named after its module.

Of ``model.layers.0.mlp.up_proj.weight`` GPTQ has ``model.layers.0.mlp.up_proj.qweight``, ``….scales`` and more. A part
is known by its suffix, what stands behind the module's name and a dot. bitsandbytes has ``weight`` itself among them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # dtypes of scales

Parts = Mapping[str, Tensor]  # of one weight, by suffix
Dtypes = Mapping[str, Sequence[torch.dtype]]  # that a part may have, by suffix
Shape = tuple[int, ...]


class Scheme(ABC):
    """One format with its settings, as a model's config has them."""

    @property
    @abstractmethod
    def suffixes(self) -> tuple[str, ...]:
        """Of all parts that a weight may have."""

    @abstractmethod
    def needed(self, found: Parts) -> Dtypes:
        """Parts that a weight must have, of which those in ``found`` are there."""

    def optional(self) -> Dtypes:
        """Parts that it may have beside these."""
        return {}

    @abstractmethod
    def problems(self, parts: Parts, shape: Shape) -> Iterator[str]:
        """What is wrong with the parts of a weight ``shape`` [out, in]: all are there, in their dtypes."""

    @abstractmethod
    def shape(self, parts: Parts) -> Shape:
        """Of the weight, as the parts have it."""

    @abstractmethod
    def weight(self, parts: Parts) -> Tensor:
        """[out, in] float32, of parts without problems."""

    @abstractmethod
    def label(self, parts: Parts) -> str:
        """Of the format, for the manifest; ``parts``: of one weight."""


def misshaped(parts: Parts, expected: Mapping[str, Shape]) -> Iterator[str]:
    """Of each part that is there in another shape."""
    for suffix, shape in expected.items():
        if suffix in parts and tuple(parts[suffix].shape) != shape:
            yield f"{suffix}: expected {list(shape)}, got {list(parts[suffix].shape)}"
