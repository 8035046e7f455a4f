"""How the families differ, as a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Family:
    """How one ``model_type`` differs. A bias is there always, never, or as a key of ``config.json`` says."""

    norm_after: bool = False  # norms stand after the sublayers (OLMo), not before them
    qk_norm: Literal["none", "head", "projection"] = "none"
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    window_switch: str | None = None  # key that turns sliding windows on; None: never
    full_every: int | None = None  # where `layer_types` is absent: every n-th layer has no window
    scaled_rope_layers: Literal["all", "full_attention"] = "all"  # layers that old-style `rope_scaling` applies to
    defaults: Mapping[str, Any] = field(default_factory=dict)  # of absent keys, beside _DEFAULTS


# What absent keys of `config.json` mean in every family that does not say otherwise: transformers' own defaults.
_DEFAULTS: Mapping[str, Any] = {
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}

_QWEN_DEFAULTS: Mapping[str, Any] = {
    "max_position_embeddings": 32_768,
    "num_key_value_heads": 32,
    "sliding_window": 4096,
    "max_window_layers": 28,
}

FAMILIES: Mapping[str, Family] = {
    "llama": Family(qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias="mlp_bias"),
    "qwen2": Family(qkv_bias=True, window_switch="use_sliding_window", defaults=_QWEN_DEFAULTS),
    "qwen3": Family(
        qk_norm="head",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        window_switch="use_sliding_window",
        defaults={**_QWEN_DEFAULTS, "head_dim": 128},
    ),
    "olmo2": Family(
        norm_after=True,
        qk_norm="projection",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        defaults={"rms_norm_eps": 1e-5},
    ),
    "olmo3": Family(
        norm_after=True,
        qk_norm="projection",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        window_switch="sliding_window",
        full_every=4,
        scaled_rope_layers="full_attention",
        defaults={"rms_norm_eps": 1e-5, "sliding_window": 4096, "rope_theta": 500_000.0},
    ),
}
