"""A PEFT LoRA adapter, merged into a base's tensors as they are asked for.

The rule, in fp32, for a weight W [M, K] of the base, A [r, K] and B [M, r] of the adapter:

    W' = W + s B A,    with magnitudes m [M] (DoRA):  W' = m (W + s B A) / |W + s B A|,  the norm of each row

s is alpha / r, or alpha / sqrt(r) where ranks are stabilised. An embedding [V, D] has A [r, V], B [D, r], the change
s (B A)ᵀ and a norm for each column. What ``modules_to_save`` names is there whole and takes the base's place.
Sources: Hu et al. 2021, arXiv 2106.09685; Kalajdzievski 2023, arXiv 2312.03732; Liu et al. 2024, arXiv 2402.09353;
peft's code.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from psykern import kernels
from psykern.core.errors import CheckpointError
from psykern.models.checkpoint import Checkpoint, hash_files
from psykern.models.lora import CONFIG, LoraConfig
from psykern.models.names import Spelling
from psykern.models.parts import Shapes
from psykern.models.source import DTYPES, Source, listed, refusal
from psykern.models.spec import EMBEDDING, HEAD, ModelSpec

WEIGHTS = "adapter_model.safetensors"
_PICKLED = "adapter_model.bin"
_FRONT = re.compile(r"(?:_orig_mod\.|module\.)*base_model\.model\.")
_LOW_RANK = re.compile(r"(.+)\.(lora_(?:embedding_)?[AB]|lora_magnitude_vector)(?:\.default)?(?:\.(weight|bias))?")
_WHOLE = re.compile(r"(.+?)(?:\.modules_to_save(?:\.default)?|\.base_layer)?\.(weight|bias)")
_FACTORS = {
    False: ("lora_A", "lora_B"),
    True: ("lora_embedding_A", "lora_embedding_B"),
}  # by whether it is an embedding
_MAGNITUDES, _BIAS = "lora_magnitude_vector", "lora_B.bias"


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """An adapter's folder: its config, and its tensors as a file of their own. Made by :meth:`open`."""

    folder: Path
    config: LoraConfig
    file: Checkpoint

    @classmethod
    def open(cls, folder: Path) -> Adapter:
        """Reads ``adapter_config.json`` and ``adapter_model.safetensors``. Raises :class:`CheckpointError`."""
        config, path = LoraConfig.read(folder), folder / WEIGHTS
        if not path.is_file():
            if (folder / _PICKLED).exists():
                raise CheckpointError(
                    f"{folder / _PICKLED}: pickled weights are refused, because loading them can run code; "
                    f"convert them to {WEIGHTS}"
                )
            raise CheckpointError(f"{path}: no such file; an adapter needs it beside {CONFIG}")
        file = Checkpoint.of_file(path)
        if refused := {name: file.dtype(name) for name in file.names if file.dtype(name) not in DTYPES}:
            name, dtype = min(refused.items())
            raise CheckpointError(f"{path}: {name} is {dtype}: {refusal(dtype)}")
        return cls(folder, config, file)

    def untied(self, spec: ModelSpec) -> ModelSpec:
        """``spec``, whose head is a weight of its own where the adapter holds the embedding or the head whole, as in
        peft."""
        modules = {_own_module(EMBEDDING), _own_module(HEAD)}
        is_saved = any(name.endswith(saved) for name in modules for saved in self.config.saved)
        return replace(spec, has_tied_head=False) if spec.has_tied_head and is_saved else spec


def hash_adapter(folder: Path) -> str:
    """``sha256:…`` over config and weights."""
    return hash_files([folder / CONFIG, folder / WEIGHTS])


@dataclass(frozen=True, slots=True, eq=False)
class _Change:
    """What an adapter does to one tensor of the model; its parts by the adapter's own names."""

    files: Mapping[str, str]  # lora_A, lora_B, …, whole: each the name in the adapter's file
    scale: float
    is_embedding: bool

    @property
    def is_whole(self) -> bool:
        """The tensor is the adapter's as it stands in the file."""
        return set(self.files) == {"whole"}


@dataclass(frozen=True, slots=True, eq=False)
class Merged(Source):
    """The tensors of a base with an adapter. Made by :meth:`of`. A changed tensor is made anew each time, in fp32."""

    folder: Path
    _base: Source
    _adapter: Adapter
    _changes: Mapping[str, _Change]  # by the model's own names
    _tied: Mapping[str, str]  # a name that the base has under another one

    @classmethod
    def of(cls, adapter: Adapter, base: Source, spec: ModelSpec) -> Merged:
        """``spec``: of the base. Raises :class:`CheckpointError` where the adapter does not fit it, or itself."""
        shapes = adapter.untied(spec).tensors()
        reading = _Reading(adapter, spec, shapes)
        changes = reading.changes()
        return cls(
            base.folder, base, adapter, changes, {HEAD: EMBEDDING} if spec.has_tied_head and HEAD in shapes else {}
        )

    @property
    def names(self) -> Collection[str]:
        return {*self._base.names, *self._tied}

    @property
    def changes(self) -> tuple[str, ...]:
        """Of the base; a run's manifest names the adapter itself."""
        return self._base.changes

    def shape(self, name: str) -> tuple[int, ...]:
        return self._base.shape(self._of_base(name))

    def dtype(self, name: str) -> torch.dtype:
        change = self._changes.get(name)
        if change is None:
            return self._base.dtype(self._of_base(name))
        return self._adapter.file.dtype(change.files["whole"]) if change.is_whole else torch.float32

    def is_mapped(self, name: str) -> bool:
        change = self._changes.get(name)
        if change is None:
            return self._base.is_mapped(self._of_base(name))
        return change.is_whole and self._adapter.file.is_mapped(change.files["whole"])

    def stored_name(self, name: str) -> str:
        stored, change = self._base.stored_name(self._of_base(name)), self._changes.get(name)
        if change is None:
            return stored
        return f"{stored} with {' and '.join(change.files.values())} of the adapter {self._adapter.folder}"

    def stored_bytes(self, name: str) -> int:
        change = self._changes.get(name)
        own = 0 if change is None else sum(map(self._adapter.file.stored_bytes, change.files.values()))
        is_instead = change is not None and "whole" in change.files
        return own if is_instead else own + self._base.stored_bytes(self._of_base(name))

    def stored(self, name: str) -> Sequence[Tensor]:
        """Of the base; an adapter is small."""
        change = self._changes.get(name)
        return () if change is not None and change.is_whole else self._base.stored(self._of_base(name))

    def tensor(self, name: str) -> Tensor:
        change = self._changes.get(name)
        if change is None:
            return self._base.tensor(self._of_base(name))
        parts = {part: self._adapter.file.tensor(stored) for part, stored in change.files.items()}
        weight = parts["whole"] if "whole" in parts else self._base.tensor(self._of_base(name))
        return weight if change.is_whole else _merge(weight, parts, change)

    def _of_base(self, name: str) -> str:
        return self._tied.get(name, name)


def _merge(weight: Tensor, parts: Mapping[str, Tensor], change: _Change) -> Tensor:
    """The changed tensor in fp32; ``weight`` stays as it is."""
    merged = weight.to(torch.float32, copy=True)
    if _BIAS in parts:
        return merged.add_(parts[_BIAS].float(), alpha=change.scale)
    down, up = (parts[name].float() for name in _FACTORS[change.is_embedding])
    left, right = (down.T, up) if change.is_embedding else (up, down.T)  # [M, r] and [K, r]
    # Its bits do not depend on the number of threads, as a vendor's product's may.
    kernels.linear((left * change.scale).contiguous(), [(right.contiguous(), None)], [merged], add=True, backend="cpu")
    if _MAGNITUDES in parts:
        numbers = merged.numpy()
        norms = np.sqrt(np.einsum("ij,ij->j" if change.is_embedding else "ij,ij->i", numbers, numbers))
        factors = parts[_MAGNITUDES].float() / torch.from_numpy(norms)
        merged *= factors if change.is_embedding else factors[:, None]
    return merged


@dataclass(frozen=True, slots=True, eq=False)
class _Reading:
    """From the names in an adapter's file to what is changed."""

    adapter: Adapter
    spec: ModelSpec  # of the base
    shapes: Shapes  # of the tensors of the model with the adapter

    def changes(self) -> dict[str, _Change]:
        """By the model's own names."""
        found: dict[str, dict[str, str]] = {}  # by the tensor's name as the file spells it
        for stored in sorted(self.adapter.file.names):
            tensor, part = _parsed(stored)
            if part in found.setdefault(tensor, {}):
                raise self._error(f"{found[tensor][part]} and {stored} are one tensor: expected it once")
            found[tensor][part] = stored
        names = replace(self.spec.names(), twins={})  # an adapter of a tied head alone is none of the embedding
        found = {name: found[name] for name in sorted(names.wanted(found))}  # without those of a vision tower
        try:
            spelling = names.read(found)
        except ValueError as error:
            raise self._error(str(error)) from error
        self._check_known(found, spelling)
        own = {spelling.own(name): (name, parts) for name, parts in found.items() if spelling.own(name) in self._known}
        self._check_tied(own)
        changes = {name: self._change(name, *of) for name, of in own.items()}
        self._check_whole_adapter(changes, spelling)
        return changes

    @property
    def _known(self) -> set[str]:
        return {*self.shapes, *([HEAD] if self.spec.has_tied_head else [])}

    def _check_known(self, found: Mapping[str, Mapping[str, str]], spelling: Spelling) -> None:
        """Of what the model's table of names passes over, as a vision tower, a change is passed over, too."""
        unknown = [stored for name, parts in found.items() if name not in spelling.meaning for stored in parts.values()]
        if unknown:
            layers = f"{self.spec.num_layers} layers, as {spelling.stored(next(iter(self.shapes)))}"
            raise self._error(
                f"it changes what this base has not: {listed(unknown)}; expected tensors of a {self.spec.model_type} "
                f"model with {layers}; is it the adapter of another base?"
            )

    def _check_tied(self, own: Mapping[str, tuple[str, Mapping[str, str]]]) -> None:
        if not self.spec.has_tied_head:
            return
        for name in (EMBEDDING, HEAD):
            spelled, parts = own.get(name, (name, {}))
            if set(parts) - {"whole"} or (parts and not self.adapter.config.is_saved(_own_module(spelled))):
                raise self._error(
                    f"{listed(list(parts.values()))}: tie_word_embeddings is true, and the adapter changes one of "
                    "embedding and head, or both, but not as modules_to_save: peft's merged model then changes the "
                    "weight that both share, which is not the model that was trained; score a model that you merged"
                )

    def _change(self, name: str, spelled: str, parts: Mapping[str, str]) -> _Change:
        """Raises :class:`CheckpointError` for parts that are not what the config says, and for other shapes."""
        config, module, is_embedding = self.adapter.config, _own_module(spelled), name == EMBEDDING
        first = next(iter(parts.values()))
        if set(parts) != {"whole"}:
            wanted = self._expected_parts(name, is_embedding)
            if not config.is_target(module):
                raise self._error(f"{first}: target_modules does not name {module}, and peft would pass over it")
            if (got := set(parts) - {"whole"}) != wanted:
                raise self._error(f"{first}: expected {listed(sorted(wanted))} of {module}, got {listed(sorted(got))}")
        for part, stored in parts.items():
            expected, got_shape = self._expected_shape(name, module, part), self.adapter.file.shape(stored)
            if got_shape != expected:
                raise self._error(
                    f"{stored}: expected {list(expected)}, as the base's {name} is {list(self.shapes[name])}"
                    f"{f' and r is {config.rank_of(module)}' if len(parts) > 1 else ''}, got {list(got_shape)}"
                )
        return _Change(dict(parts), config.scale(module), is_embedding)

    def _expected_parts(self, name: str, is_embedding: bool) -> set[str]:
        config = self.adapter.config
        if name.endswith(".bias"):
            return {_BIAS} if config.has_bias else set()
        return {*_FACTORS[is_embedding], *([_MAGNITUDES] if config.has_magnitudes else [])}

    def _expected_shape(self, name: str, module: str, part: str) -> tuple[int, ...]:
        shape, rank = self.shapes[name], self.adapter.config.rank_of(module)
        if part in ("whole", _BIAS) or len(shape) != 2:
            return shape
        if part == _MAGNITUDES:
            return (shape[1] if name == EMBEDDING else shape[0],)
        columns, rows = (shape[0], shape[1]) if name == EMBEDDING else (shape[1], shape[0])
        return (rank, columns) if part.endswith("A") else (rows, rank)

    def _check_whole_adapter(self, changes: Mapping[str, _Change], spelling: Spelling) -> None:
        """Raises :class:`CheckpointError` where the config names a module that the base has and the file has not."""
        config = self.adapter.config
        for name, shape in self.shapes.items():
            if ".experts." in name:  # a name of the targets may be meant for another part of the layer alone
                continue
            tensor = spelling.stored(name)
            module, parts = _own_module(tensor), changes[name].files.keys() if name in changes else set()
            if config.is_saved(module) and "whole" not in parts:
                raise self._error(f"modules_to_save names {module}, and {WEIGHTS} has no {tensor}")
            is_changed = len(shape) == 2 or (config.has_bias and name.endswith(".bias"))
            if is_changed and config.is_target(module) and not parts - {"whole"}:
                raise self._error(
                    f"target_modules names {module} of the base, and {WEIGHTS} has no change of {tensor}: expected one "
                    f"for each of the base's {self.spec.num_layers} layers; is it the adapter of another base?"
                )

    def _error(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.adapter.folder}: {problem}")


def _parsed(stored: str) -> tuple[str, str]:
    """The tensor that a stored name changes, as the file spells it, and what it is of it."""
    front = _FRONT.match(stored)
    rest = stored[front.end() :] if front else stored
    if (found := _LOW_RANK.fullmatch(rest)) is not None:
        module, part, kind = found.groups()
        return (f"{module}.bias", f"{part}.bias") if kind == "bias" else (f"{module}.weight", part)
    if (found := _WHOLE.fullmatch(rest)) is not None:
        return f"{found[1]}.{found[2]}", "whole"
    return rest, "whole"


def _own_module(tensor: str) -> str:
    return tensor.rpartition(".")[0]
