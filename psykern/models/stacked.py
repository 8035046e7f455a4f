"""Experts whose weights a file has stacked, all of a layer in one tensor, as a model names them: each by itself.

mlp.experts.gate_up_proj  [E, 2F, D]   mlp.experts.7.gate_proj.weight, up_proj  [F, D] each
mlp.experts.down_proj     [E, D, F]    mlp.experts.7.down_proj.weight           [D, F]

As Qwen3-VL's are published, the last two sizes of both stacks are exchanged.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from psykern.core.errors import CheckpointError
from psykern.models.experts import ExpertsSpec
from psykern.models.source import Source
from psykern.models.spec import ModelSpec

_ONE = re.compile(r"(.*\.mlp\.experts\.)(\d+)\.(gate|up|down)_proj\.weight")
_STACKS = ("gate_up_proj", "down_proj")


class _Layer(NamedTuple):
    """How one layer's stacks stand in the file."""

    spec: ExpertsSpec
    is_transposed: bool


class Stacked(Source):
    """The tensors of ``source``, and for each stack those of its experts instead."""

    def __init__(self, source: Source, spec: ModelSpec) -> None:
        """Raises :class:`CheckpointError` for a stack of another shape, and for one of two that is not there."""
        self.folder = source.folder
        self._source = source
        self._layers: dict[str, _Layer] = {}  # by what stands in front of an expert's number
        for layer in spec.layers:
            begin = f"{layer.prefix}mlp.experts."
            if isinstance(layer.ffn, ExpertsSpec) and any(begin + stack in source.names for stack in _STACKS):
                self._layers[begin] = _Layer(layer.ffn, self._is_transposed(begin, layer.ffn))
        stacks = {begin + stack for begin in self._layers for stack in _STACKS}
        singles = (
            f"{layer.prefix}{name}"
            for layer in spec.layers
            if f"{layer.prefix}mlp.experts." in self._layers
            for name in layer.ffn.tensors()
        )
        self._names = frozenset(source.names) - stacks | frozenset(name for name in singles if self._place(name))

    @property
    def names(self) -> Collection[str]:
        return self._names

    @property
    def changes(self) -> tuple[str, ...]:
        return self._source.changes

    def shape(self, name: str) -> tuple[int, ...]:
        if (place := self._place(name)) is None:
            return self._source.shape(name)
        spec, is_down = place.layer.spec, place.stack.endswith("down_proj")
        shape = spec.intermediate_size, spec.hidden_size
        return shape[::-1] if is_down else shape

    def dtype(self, name: str) -> torch.dtype:
        return self._source.dtype(place.stack if (place := self._place(name)) else name)

    def tensor(self, name: str) -> Tensor:
        if (place := self._place(name)) is None:
            return self._source.tensor(name)
        weight = self._source.tensor(place.stack)[place.expert]
        weight = weight.T if place.layer.is_transposed else weight
        if place.half is not None:
            weight = weight.chunk(2)[place.half]
        return weight.contiguous()

    def is_mapped(self, name: str) -> bool:
        if (place := self._place(name)) is None:
            return self._source.is_mapped(name)
        return self._source.is_mapped(place.stack) and not place.layer.is_transposed

    def stored_name(self, name: str) -> str:
        place = self._place(name)
        return self._source.stored_name(name if place is None else place.stack)

    def stored_bytes(self, name: str) -> int:
        if (place := self._place(name)) is None:
            return self._source.stored_bytes(name)
        parts = place.layer.spec.num_experts * (1 if place.half is None else 2)
        return self._source.stored_bytes(place.stack) // parts

    def stored(self, name: str) -> Sequence[Tensor]:
        """Of what is exchanged all of a stack with its first expert, and nothing with the others."""
        if (place := self._place(name)) is None:
            return self._source.stored(name)
        if self.is_mapped(name):
            return (self.tensor(name),)
        return self._source.stored(place.stack) if place.expert == 0 and not place.half else ()

    def _place(self, name: str) -> _Place | None:
        """Where an expert's weight is; None for a name that is no part of a stack."""
        found = _ONE.fullmatch(name)
        layer = self._layers.get(found[1]) if found else None
        if found is None or layer is None or int(found[2]) >= layer.spec.num_experts:
            return None
        if found[3] == "down":
            return _Place(layer, f"{found[1]}down_proj", int(found[2]), None)
        return _Place(layer, f"{found[1]}gate_up_proj", int(found[2]), ("gate", "up").index(found[3]))

    def _is_transposed(self, begin: str, spec: ExpertsSpec) -> bool:
        """Whether the stacks of a layer have inputs in front of outputs. Both say the same, one of them clearly: gate
        and up are square where 2F = D, down where F = D."""
        e, f, d = spec.num_experts, spec.intermediate_size, spec.hidden_size
        expected = ((e, 2 * f, d), (e, d, f))
        names = [begin + stack for stack in _STACKS]
        got = tuple(self._source.shape(name) if name in self._source.names else () for name in names)
        if got == expected:
            return False
        if got == tuple((e, inputs, outputs) for e, outputs, inputs in expected):
            return True
        found = ", ".join(
            f"{self._source.stored_name(name)} {list(shape) if shape else 'is missing'}"
            for name, shape in zip(names, got, strict=True)
        )
        gate_up, down = map(list, expected)
        raise CheckpointError(
            f"{self.folder}: experts do not fit the config: expected {gate_up} and {down}, or both with the last two "
            f"sizes exchanged, got {found}"
        )


class _Place(NamedTuple):
    layer: _Layer
    stack: str  # the stored tensor's name
    expert: int
    half: int | None  # of gate and up; None: all
