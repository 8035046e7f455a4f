"""The numbers of a ``config.json`` that the forward pass needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from psykern.core.errors import CheckpointError
from psykern.models.checkpoint import read_config
from psykern.models.families import _DEFAULTS, FAMILIES, Family
from psykern.models.fields import _boolean, _number, _positive
from psykern.models.rope import Rope, _rope


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The numbers of a ``config.json`` that the forward pass needs."""

    model_type: str
    family: Family
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_positions: int
    tied_head: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    windows: tuple[int | None, ...]  # [layers] sliding window in tokens, None: all earlier tokens are seen
    ropes: tuple[Rope, ...]  # [layers]

    @property
    def num_layers(self) -> int:
        return len(self.windows)

    @classmethod
    def read(cls, folder: Path) -> ModelConfig:
        """From ``folder/config.json``. Raises ``CheckpointError`` for what psykern does not know how to compute."""
        return parse_config(read_config(folder), str(folder / "config.json"))


def parse_config(config: Mapping[str, Any], name: str) -> ModelConfig:
    """``ModelConfig`` of a parsed ``config.json``; ``name`` is used in errors."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise CheckpointError(f"{name}: model_type: expected one of {', '.join(FAMILIES)}, got {model_type!r}")
    family = FAMILIES[model_type]
    config = {**_DEFAULTS, **family.defaults, **config}
    sizes = {}
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers"):
        sizes[key] = _positive(config, key, name)
    num_heads = sizes["num_attention_heads"]
    num_kv_heads = _positive(config, "num_key_value_heads", name, default=num_heads)
    head_dim = _positive(config, "head_dim", name, default=sizes["hidden_size"] // num_heads)
    if head_dim % 2:
        raise CheckpointError(f"{name}: head_dim: expected an even number, as pairs are rotated, got {head_dim}")
    if num_heads % num_kv_heads:
        raise CheckpointError(f"{name}: {num_heads} attention heads are not a multiple of {num_kv_heads} key heads")
    if config["hidden_act"] != "silu":
        raise CheckpointError(f"{name}: hidden_act: expected 'silu', got {config['hidden_act']!r}")
    if config.get("quantization_config"):
        raise CheckpointError(f"{name}: quantization_config: quantised weights are not supported")
    layer_types = _layer_types(config, family, sizes["num_hidden_layers"], name)
    max_positions = _positive(config, "max_position_embeddings", name)
    ropes = {kind: _rope(config, family, kind, head_dim, max_positions, name) for kind in set(layer_types)}

    def has(bias: bool | str) -> bool:
        return _boolean(config, bias, name) if isinstance(bias, str) else bias

    window = config.get("sliding_window")
    return ModelConfig(
        model_type=model_type,
        family=family,
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["intermediate_size"],
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=_number(config, "rms_norm_eps", name),
        max_positions=max_positions,
        tied_head=_boolean(config, "tie_word_embeddings", name),
        qkv_bias=has(family.qkv_bias),
        o_bias=has(family.o_bias),
        mlp_bias=has(family.mlp_bias),
        windows=tuple(window if kind == "sliding_attention" else None for kind in layer_types),
        ropes=tuple(ropes[kind] for kind in layer_types),
    )


def _layer_types(config: Mapping[str, Any], family: Family, num_layers: int, name: str) -> list[str]:
    """'sliding_attention' or 'full_attention' for each layer."""
    if family.window_switch is None or not config.get(family.window_switch) or config.get("sliding_window") is None:
        return ["full_attention"] * num_layers
    _positive(config, "sliding_window", name)
    layer_types = config.get("layer_types")
    if layer_types is None and family.full_every is not None:
        layer_types = [
            "full_attention" if (i + 1) % family.full_every == 0 else "sliding_attention" for i in range(num_layers)
        ]
    elif layer_types is None:
        first = _number(config, "max_window_layers", name)
        layer_types = ["sliding_attention" if i >= first else "full_attention" for i in range(num_layers)]
    kinds = ("full_attention", "sliding_attention")
    if not isinstance(layer_types, list) or len(layer_types) != num_layers or any(t not in kinds for t in layer_types):
        raise CheckpointError(
            f"{name}: layer_types: expected {num_layers} of {' or '.join(kinds)}, got {layer_types!r:.80}"
        )
    return list(layer_types)
