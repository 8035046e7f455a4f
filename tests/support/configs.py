"""The same ``config.json`` read by psykern and by transformers, the outside oracle of the tests of configs."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import LLAMA3_ROPE, VISION, YARN_ROPE
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from psykern.models.families import read_spec
from psykern.models.rope import Rope
from psykern.models.spec import ModelSpec

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


def write(folder: Path, absent: str | None = None, **config: Any) -> Path:
    """SIZES and ``config`` as config.json, without the key ``absent``; of a model that sees in its text_config."""
    keys = {key: value for key, value in (SIZES | config).items() if key != absent}
    if (kind := str(keys.get("model_type"))) in VISION:
        keys = {"model_type": kind, "text_config": keys | {"model_type": f"{kind}_text", "bos_token_id": 0}}
    (folder / "config.json").write_text(json.dumps(keys), encoding="utf-8")
    return folder


def read_both(folder: Path, absent: str | None = None, **config: Any) -> tuple[ModelSpec, PreTrainedConfig]:
    """The same config.json as psykern and as transformers read it, of which the language model's."""
    write(folder, absent, **config)
    return read_spec(folder), AutoConfig.from_pretrained(folder).get_text_config()


def rotary_of(config: PreTrainedConfig, layer_type: str) -> tuple[Tensor, float]:
    """Inverse frequencies and attention scaling of transformers' own module for layers of this type."""
    name = config.model_type.partition("_text")[0]
    modeling = import_module(f"transformers.models.{name}.modeling_{name}")
    (kind,) = (name for name in dir(modeling) if name.endswith("RotaryEmbedding") and "Vision" not in name)
    module = getattr(modeling, kind)(config)
    prefix = f"{layer_type}_" if hasattr(module, f"{layer_type}_inv_freq") else ""
    return getattr(module, f"{prefix}inv_freq"), getattr(module, f"{prefix}attention_scaling")


def ropes_of(spec: ModelSpec) -> tuple[Rope, ...]:
    return tuple(layer.mixer.rope for layer in spec.layers)


def windows_of(spec: ModelSpec) -> list[int | None]:
    return [layer.mixer.window for layer in spec.layers]


def assert_rope(rope: Rope, frequencies: Tensor, scale: float) -> None:
    torch.testing.assert_close(torch.tensor(rope.inverse_frequencies), frequencies, rtol=1e-6, atol=0)
    assert rope.scale == pytest.approx(scale, rel=1e-7)


OLD_LLAMA3 = {k: v for k, v in LLAMA3_ROPE.items() if k != "rope_theta"}
OLD_YARN = {k: v for k, v in YARN_ROPE.items() if k != "rope_theta"}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": OLD_LLAMA3,
    "llama3-of-Llama-3.1": OLD_LLAMA3 | {"original_max_position_embeddings": 1024},
    "llama3-low-freq-2": OLD_LLAMA3 | {"low_freq_factor": 2.0, "factor": 32.0},
    "yarn": OLD_YARN,
    "yarn-own-attention-factor": {k: v for k, v in OLD_YARN.items() if k != "attention_factor"},
    "yarn-mscale": {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 1.3},
    "yarn-not-truncated": OLD_YARN | {"truncate": False},
    "yarn-factor-1": {"rope_type": "yarn", "factor": 1.0},
    "yarn-of-Qwen2.5": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
}
THETA = 500_000.0
