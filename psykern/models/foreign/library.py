"""Configs and models by ``transformers`` itself, from a folder: nothing of the folder is executed, and weights are
safetensors alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from psykern.core.errors import CheckpointError

_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "n_ctx")


def read_config(folder: Path) -> Any:
    """The library's config of a causal language model. Raises CheckpointError, by name, for what is none, or needs code
    of its own."""
    path = folder / "config.json"
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    kind = written.get("model_type") if isinstance(written, dict) else None
    if not isinstance(kind, str):
        raise CheckpointError(f"{path}: expected an object with model_type, got {kind!r:.80}")
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
    if getattr(config, "quantization_config", None) is not None:
        raise CheckpointError(f"{path}: quantised weights are read with implementation 'native' alone")
    return config


def max_positions(config: Any) -> int:
    """Tokens that the model takes; 2**31 - 1: as many as there are."""
    text = config.get_text_config()
    found = (getattr(text, name, None) for name in _POSITIONS)
    return next((n for n in found if isinstance(n, int) and n > 0), 2**31 - 1)


def on_meta(config: Any) -> PreTrainedModel:
    """The model without weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False).eval()


def load_weights(folder: Path, dtype: torch.dtype, device: torch.device) -> tuple[PreTrainedModel, list[str]]:
    """The model, and the names of the tensors in the files that it does not use."""
    try:
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


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
