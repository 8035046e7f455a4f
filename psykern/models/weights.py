"""From a model folder to the source of its tensors: the mapped files, and around them what changes weights."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from psykern.core.errors import CheckpointError
from psykern.models.checkpoint import Checkpoint, hash_model
from psykern.models.experts import ExpertsSpec
from psykern.models.families import read_spec
from psykern.models.names import Names
from psykern.models.quantisation.config import read_scheme
from psykern.models.quantised import Dequantised
from psykern.models.source import Source
from psykern.models.spec import EMBEDDING, HEAD, ModelSpec
from psykern.models.stacked import Stacked


@dataclass(frozen=True, eq=False)
class ModelFolder:
    """A model folder, which is hashed once, whatever adapters are merged into it."""

    folder: Path

    @cached_property
    def hash(self) -> str:
        """``sha256:…`` of config and weights, which are read for it."""
        return hash_model(self.folder)

    def hash_with(self, adapter_hash: str) -> str:
        """The same of the base with an adapter."""
        return f"sha256:{hashlib.sha256(f'{self.hash} {adapter_hash}'.encode()).hexdigest()}"


@dataclass(frozen=True, eq=False)
class Base(ModelFolder):
    """One that is open: mapped and checked."""

    spec: ModelSpec
    source: Source

    @classmethod
    def open(cls, folder: Path) -> Base:
        """Raises ``CheckpointError`` where the folder's config, tensors or shapes are not as they must be."""
        spec = read_spec(folder)
        return cls(folder, spec, open_weights(folder, spec))


def open_weights(folder: Path, spec: ModelSpec) -> Source:
    """The tensors of ``spec``, checked. Raises :class:`CheckpointError` where they are not as they must be."""
    source = _open_files(folder, spec.names())
    if any(isinstance(layer.ffn, ExpertsSpec) for layer in spec.layers):
        source = Stacked(source, spec)
    source.check(spec.tensors(), spec.unused())
    if spec.has_tied_head:
        source.check_tied(HEAD, EMBEDDING)
    return source


def _open_files(folder: Path, names: Names) -> Source:
    """The files' tensors in floats."""
    scheme, must_be = read_scheme(folder)
    if scheme is None:
        return Checkpoint.open(folder, names)
    checkpoint = Checkpoint.open(folder, replace(names, parts=scheme.suffixes))
    source = Dequantised(scheme, checkpoint)
    if source.num_quantised:
        return source
    if must_be:
        raise CheckpointError(
            f"{folder / 'config.json'}: quantization_config: expected quantised weights, got none; where they are "
            "plain, remove it"
        )
    return checkpoint
