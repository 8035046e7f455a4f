"""What the engine needs to know of a model that the library computes, before there is a weight."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from psykern.models.parts import Flops, Shapes

Mode = Literal["shared", "whole"]  # common beginnings are computed once; or one pass for each sequence


@dataclass(frozen=True, slots=True)
class ForeignMixer:
    """The attention of one layer; without keys where nothing of it is kept."""

    num_kv_heads: int
    head_dim: int
    window: int | None  # tokens, the query's own included; None: all earlier tokens are seen
    is_own: bool = False  # computed by the library's own function, path by path: psykern's has not what it does

    @property
    def kv_size(self) -> int:
        """Numbers of a row's keys, and as many of its values."""
        return self.num_kv_heads * self.head_dim

    @property
    def kv_shape(self) -> tuple[int, int]:
        return self.num_kv_heads, self.head_dim


NO_KEYS = ForeignMixer(0, 0, None)


@dataclass(frozen=True, slots=True)
class ForeignLayer:
    prefix: str  # of its modules and tensors: "model.layers.7."
    mixer: ForeignMixer
    per_row: int  # FLOPs of its products with weights
    per_visible_key: int
    most_memory: int  # numbers that a row of a batch needs, about
    spread: float  # over so many products the rows of a batch are spread: experts, by those that one row has
    shapes: Shapes  # of its tensors, by their names within it

    def flops(self) -> Flops:
        # All layers compute all rows: the library's forward knows nothing of rows that nobody asks for.
        return Flops(per_row=self.per_row, per_visible_key=self.per_visible_key)

    def tensors(self) -> Shapes:
        return self.shapes


@dataclass(frozen=True)
class ForeignSpec:
    model_type: str
    vocab_size: int  # rows of the head: tokens that can be predicted
    hidden_size: int  # of what the head takes
    max_positions: int  # 2**31 - 1: as many as there are
    mode: Mode
    reason: str | None  # why the mode is "whole", in words; None: it is not
    layers: tuple[ForeignLayer, ...]
    shapes: Shapes  # of all tensors

    @property
    def implementation(self) -> str:
        """Whose modules compute the layers and how, in words."""
        if self.reason is None:
            whose = "its own" if any(layer.mixer.is_own for layer in self.layers) else "psykern's"
            return f"transformers: {whose} attention, prefixes shared"
        return f"transformers: one pass per sequence, because {self.reason}"

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @cached_property
    def wave_numbers(self) -> int:
        """Keys and values of a row that a wave holds at a time: those of all layers, as a batch passes through all."""
        return sum(2 * layer.mixer.kv_size for layer in self.layers)

    def as_whole(self, reason: str) -> ForeignSpec:
        """The same without sharing."""
        layers = (replace(layer, mixer=NO_KEYS, per_visible_key=0) for layer in self.layers)
        return replace(self, mode="whole", reason=reason, layers=tuple(layers))

    def tensors(self) -> Shapes:
        return self.shapes
