"""The names and shapes of a checkpoint's tensors, as ``transformers`` names them."""

from __future__ import annotations

from psykern.models.config import ModelConfig


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of every tensor of a checkpoint of ``config``, as ``transformers`` names them."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.tied_head:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    linear = {
        "self_attn.q_proj": (queries, hidden, config.qkv_bias),
        "self_attn.k_proj": (keys, hidden, config.qkv_bias),
        "self_attn.v_proj": (keys, hidden, config.qkv_bias),
        "self_attn.o_proj": (hidden, queries, config.o_bias),
        "mlp.gate_proj": (inner, hidden, config.mlp_bias),
        "mlp.up_proj": (inner, hidden, config.mlp_bias),
        "mlp.down_proj": (hidden, inner, config.mlp_bias),
    }
    norms: dict[str, tuple[int, ...]] = {"post_attention_layernorm": (hidden,)}
    norms["post_feedforward_layernorm" if config.family.norm_after else "input_layernorm"] = (hidden,)
    if config.family.qk_norm != "none":
        per_head = config.family.qk_norm == "head"
        norms["self_attn.q_norm"] = (config.head_dim if per_head else queries,)
        norms["self_attn.k_norm"] = (config.head_dim if per_head else keys,)
    for i in range(config.num_layers):
        for part, (rows, columns, bias) in linear.items():
            shapes[f"model.layers.{i}.{part}.weight"] = (rows, columns)
            if bias:
                shapes[f"model.layers.{i}.{part}.bias"] = (rows,)
        for part, shape in norms.items():
            shapes[f"model.layers.{i}.{part}.weight"] = shape
    return shapes
