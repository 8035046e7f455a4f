"""From a model folder to the source of its tensors: the mapped files, and around them what changes weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from psykern.core.errors import CheckpointError
from psykern.models.checkpoint import Checkpoint
from psykern.models.experts import ExpertsSpec
from psykern.models.names import Names
from psykern.models.quantisation.config import read_scheme
from psykern.models.quantised import Dequantised
from psykern.models.source import Source
from psykern.models.spec import EMBEDDING, HEAD, ModelSpec
from psykern.models.stacked import Stacked


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
