"""From a model folder to the source of its tensors: the mapped files, and around them what changes weights."""

from __future__ import annotations

from pathlib import Path

from psykern.models.checkpoint import Checkpoint
from psykern.models.experts import ExpertsSpec
from psykern.models.source import Source
from psykern.models.spec import EMBEDDING, HEAD, ModelSpec
from psykern.models.stacked import Stacked


def open_weights(folder: Path, spec: ModelSpec) -> Source:
    """The tensors of ``spec``, checked. Raises :class:`CheckpointError` where they are not as they must be."""
    source: Source = Checkpoint.open(folder, spec.names())
    if any(isinstance(layer.ffn, ExpertsSpec) for layer in spec.layers):
        source = Stacked(source, spec)
    source.check(spec.tensors(), spec.unused())
    if spec.has_tied_head:
        source.check_tied(HEAD, EMBEDDING)
    return source
