"""Configs and models by ``transformers`` itself, from a folder: nothing of the folder is executed, and weights are
safetensors alone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from psykern.core.errors import CheckpointError
from psykern.models.checkpoint import check_weights, read_object

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "n_ctx")


def read_config(folder: Path) -> Any:
    """The library's config of a causal language model. Raises CheckpointError, by name, for what is none, or needs code
    of its own."""
    from transformers import AutoConfig, AutoModelForCausalLM  # here, because the import takes long

    path = folder / "config.json"
    written = read_object(path)
    kind = written.get("model_type")
    if not isinstance(kind, str):
        raise CheckpointError(f"{path}: expected an object with model_type, got {kind!r:.80}")
    _check_kernels(path, written)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # the library's own are of many kinds
        needs_code = isinstance(written.get("auto_map"), dict)
        why = "its code is in the folder, and is never executed" if needs_code else first_line(error)
        raise CheckpointError(f"{path}: model_type {kind!r} is none of transformers': {why}") from error
    if config.is_encoder_decoder:
        raise CheckpointError(f"{path}: {kind} has an encoder and a decoder: expected a causal language model")
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise CheckpointError(f"{path}: {kind} is no causal language model of transformers (AutoModelForCausalLM)")
    if any(getattr(of, "quantization_config", None) for of in (config, config.get_text_config())):
        raise CheckpointError(f"{path}: quantised weights are read with implementation 'native' alone")
    return config


def _check_kernels(path: Path, config: Mapping[str, Any]) -> None:
    """Raises CheckpointError for a kernel of the hub: its code would be downloaded and run."""
    for key, value in config.items():
        if isinstance(value, dict):
            _check_kernels(path, value)
        elif re.fullmatch("_?(attn|experts)_implementation(_internal)?", key) and re.search("[/:]", str(value)):
            raise CheckpointError(f"{path}: {key} {value!r}: code from the hub is never executed; remove the key")


def is_foreign(folder: Path) -> bool:
    """Whether transformers has a causal language model of the folder's kind."""
    try:
        read_config(folder)
    except CheckpointError:
        return False
    return True


def max_positions(config: Any) -> int:
    """Tokens that the model takes; 2**31 - 1: as many as there are."""
    text = config.get_text_config()
    found = (getattr(text, name, None) for name in _POSITIONS)
    return next((n for n in found if isinstance(n, int) and n > 0), 2**31 - 1)


def on_meta(config: Any) -> PreTrainedModel:
    """The model without weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False).eval()


def load_weights(folder: Path, dtype: torch.dtype, device: torch.device) -> tuple[PreTrainedModel, list[str]]:
    """The model, and the names of the tensors in the files that it does not use."""
    from transformers import AutoModelForCausalLM

    check_weights(folder)
    try:
        with quiet():
            model, info = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
            )
    except Exception as error:
        raise CheckpointError(f"{folder}: transformers cannot load it: {first_line(error)}") from error
    for kind, names in (("are missing", info["missing_keys"]), ("have other shapes", info["mismatched_keys"])):
        if names:
            raise CheckpointError(f"{folder}: tensors that {kind}: {', '.join(sorted(map(str, names))[:5])}")
    return model.eval().to(device), sorted(info["unexpected_keys"])


@contextmanager
def quiet() -> Iterator[None]:
    """Without the library's progress bar, and its advice on what is psykern's to decide."""
    from transformers.utils import logging

    was_on, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if was_on:
            logging.enable_progress_bar()


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
