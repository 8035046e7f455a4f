"""Models that transformers computes, tiny: how psykern goes about each. ``psykern models`` has a line for each kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

VOCABULARY = 320
DECODED: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
GROUPED = {**DECODED, "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 256}
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}


@dataclass(frozen=True)
class Case:
    config: Mapping[str, Any]
    windows: tuple[int | None, ...] = ()
    reason: str | None = None  # of one pass for each sequence
    is_plain: bool = True  # the head is a product and nothing else


CASES: Mapping[str, Case] = {
    "gpt2": Case({**GPT2, "scale_attn_by_inverse_layer_idx": True}, (None, None)),
    "gpt_neox": Case({"model_type": "gpt_neox", "max_position_embeddings": 256, **DECODED}, (None,) * 3),
    "opt": Case(
        {"model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 16, "max_position_embeddings": 256, **DECODED},
        (None,) * 3,
    ),
    "mistral": Case({"model_type": "mistral", "sliding_window": 16, **GROUPED}, (16,) * 3),
    "phi3": Case({"model_type": "phi3", "sliding_window": 24, **GROUPED, "head_dim": 8}, (24,) * 3),
    "gemma3": Case(
        {"model_type": "gemma3_text", "sliding_window": 16, "query_pre_attn_scalar": 20, **GROUPED}
        | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
        (16, None, 16),
    ),
    "olmoe": Case(
        {"model_type": "olmoe", "num_experts": 6, "num_experts_per_tok": 2, **GROUPED, "head_dim": 8}, (None,) * 3
    ),
    "cohere": Case({"model_type": "cohere", "logit_scale": 0.7, **GROUPED}, (None,) * 3, is_plain=False),
    "phi": Case({"model_type": "phi", **GROUPED, "head_dim": 8}, (None,) * 3, is_plain=False),
    "llama": Case({"model_type": "llama", **GROUPED}, (None,) * 3),
    "gemma2": Case(
        {"model_type": "gemma2", "sliding_window": 16, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
        | GROUPED,
        (16, None, 16),
        is_plain=False,
    ),
    "bloom": Case({"model_type": "bloom", "hidden_size": 32, "n_layer": 2, "n_head": 4}, reason="its attention cannot"),
    "mamba": Case(
        {"model_type": "mamba", "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
        reason="layer 0 has a convolution over tokens",
    ),
    "gpt_oss": Case(
        {"model_type": "gpt_oss", "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16, **GROUPED},
        (16, None, 16),
    ),
    "phi3 longrope": Case(
        {"model_type": "phi3", **GROUPED, "head_dim": 8, "original_max_position_embeddings": 32}
        | {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}},
        reason="rotary angles that follow from the length of a text",
    ),
}
