"""The families that psykern computes, each a function from ``config.json`` to a :class:`ModelSpec`.

They differ in where norms stand, in biases, in rotary embeddings and in sliding windows, and nowhere else. What an
absent key means is transformers' own default of the family. A model that sees is its language model here: on text its
other parts have no say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from psykern.core.errors import CheckpointError
from psykern.models.attention import AttentionSpec
from psykern.models.checkpoint import read_config
from psykern.models.experts import ExpertsSpec
from psykern.models.fields import LAYER_TYPES, Fields
from psykern.models.harmless import is_harmless, refuse_unknown
from psykern.models.layer import LayerSpec, NormsSpec
from psykern.models.mlp import MlpSpec
from psykern.models.names import MLLAMA, QWEN_VL
from psykern.models.spec import ModelSpec

_DEFAULTS: Mapping[str, Any] = {
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
_QWEN2_DEFAULTS = {
    **_DEFAULTS,
    "max_position_embeddings": 32_768,
    "num_key_value_heads": 32,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_QWEN3_DEFAULTS = {**_QWEN2_DEFAULTS, "head_dim": 128}
_QWEN3_MOE_DEFAULTS = {
    **_DEFAULTS,
    "max_position_embeddings": 32_768,
    "num_key_value_heads": 4,
    "sliding_window": 4096,
    "decoder_sparse_step": 1,
    "moe_intermediate_size": 768,
    "num_experts_per_tok": 8,
    "num_experts": 128,
}
_OLMO2_DEFAULTS = {**_DEFAULTS, "rms_norm_eps": 1e-5}
_OLMO3_DEFAULTS = {**_OLMO2_DEFAULTS, "sliding_window": 4096, "rope_theta": 500_000.0}
_QWEN2_5_VL_DEFAULTS = {"rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_key_value_heads": 8, "max_window_layers": 80}
_QWEN3_VL_DEFAULTS = {"max_position_embeddings": 128_000, "rope_theta": 500_000.0}
_QWEN3_VL_MOE_DEFAULTS = {
    **_QWEN3_VL_DEFAULTS,
    "norm_topk_prob": True,
    "num_key_value_heads": 16,
    "moe_intermediate_size": 1408,
    "num_experts_per_tok": 4,
    "num_experts": 60,
}
_MLLAMA_DEFAULTS = {
    **_DEFAULTS,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "num_key_value_heads": 8,
}
_MLLAMA_CROSSING = (3, 8, 13, 18, 23, 28, 33, 38)
_MLLAMA_CROSSING_TENSORS = ("cross_attn*", "mlp.*", "input_layernorm.weight", "post_attention_layernorm.weight")
_MLLAMA_IMAGE_TOKENS = 8  # rows of the embedding behind the vocabulary


# What transformers obeys in any config and psykern does not.
_NOT_COMPUTED: Mapping[str, str] = {
    "per_layer_config": "layers with settings of their own are not supported",
    "configuration_files": "another config file is not read",
    "transformers_weights": "weights under another name are not read",
}


def llama(c: Fields) -> ModelSpec:
    c = c.or_else(_DEFAULTS)
    bias = c.boolean("attention_bias")
    mixer = AttentionSpec.of(c, "full_attention", qkv_bias=bias, o_bias=bias)
    return decoder(c, [mixer] * c.positive("num_hidden_layers"), MlpSpec.of(c, has_bias=c.boolean("mlp_bias")))


def qwen2(c: Fields) -> ModelSpec:
    c = c.or_else(_QWEN2_DEFAULTS)
    return decoder(c, by_type(_qwen_types(c), partial(AttentionSpec.of, c, qkv_bias=True)), MlpSpec.of(c))


def qwen3(c: Fields) -> ModelSpec:
    c = c.or_else(_QWEN3_DEFAULTS)
    bias = c.boolean("attention_bias")
    mixer = partial(AttentionSpec.of, c, qk_norm="head", qkv_bias=bias, o_bias=bias)
    return decoder(c, by_type(_qwen_types(c), mixer), MlpSpec.of(c))


def qwen3_moe(c: Fields) -> ModelSpec:
    c = c.or_else(_QWEN3_MOE_DEFAULTS)
    bias = c.boolean("attention_bias")
    c.asked.update(("max_window_layers", "sliding_window", "intermediate_size"))  # of no layer, perhaps
    # Of all layers or of none, unlike Qwen3's.
    has_windows = _asks_for_windows(c) and c.get("sliding_window") is not None
    mixer = AttentionSpec.of(c, LAYER_TYPES[has_windows], qk_norm="head", qkv_bias=bias, o_bias=bias)
    experts = ExpertsSpec.of(c, is_normalised=c.boolean("norm_topk_prob"))
    return decoder(c, [mixer] * c.positive("num_hidden_layers"), _experts_or_mlp(c, experts))


def olmo2(c: Fields) -> ModelSpec:
    c = c.or_else(_OLMO2_DEFAULTS)
    bias = c.boolean("attention_bias")
    mixer = AttentionSpec.of(c, "full_attention", qk_norm="projection", qkv_bias=bias, o_bias=bias)
    return decoder(c, [mixer] * c.positive("num_hidden_layers"), MlpSpec.of(c), norms="after")


def olmo3(c: Fields) -> ModelSpec:
    c = c.or_else(_OLMO3_DEFAULTS)
    bias = c.boolean("attention_bias")
    mixer = partial(AttentionSpec.of, c, qk_norm="projection", qkv_bias=bias, o_bias=bias, rope_by_type=True)
    return decoder(c, by_type(layer_types(c, lambda i: (i + 1) % 4 != 0), mixer), MlpSpec.of(c), norms="after")


def qwen2_5_vl(root: Fields) -> ModelSpec:
    """Before transformers 4.52 the keys of the language model stood at the root."""
    c = language(root, may_be_flat=True).or_else(_QWEN2_5_VL_DEFAULTS)
    return replace(qwen2(c), naming=QWEN_VL)


def qwen3_vl(root: Fields) -> ModelSpec:
    return replace(qwen3(_without_windows(language(root).or_else(_QWEN3_VL_DEFAULTS))), naming=QWEN_VL)


def qwen3_vl_moe(root: Fields) -> ModelSpec:
    c = _without_windows(language(root).or_else(_QWEN3_VL_MOE_DEFAULTS))
    if not c.boolean("norm_topk_prob"):
        raise c.error("norm_topk_prob: expected true, as transformers takes it for, got false")
    return replace(qwen3_moe(c), naming=QWEN_VL)


def mllama(root: Fields) -> ModelSpec:
    """Llama 3.2 Vision. Where there is no image, its cross-attention layers let everything pass as it is."""
    c = language(root).or_else(_MLLAMA_DEFAULTS)
    num_layers, crossing = c.positive("num_hidden_layers"), c.get("cross_attention_layers")
    if crossing is None:
        crossing = [i for i in _MLLAMA_CROSSING if i < num_layers]
    is_numbers = isinstance(crossing, list) and all(isinstance(i, int) and 0 <= i < num_layers for i in crossing)
    if not is_numbers or len(set(crossing)) == num_layers:
        expected = f"numbers of some of the layers, 0 to {num_layers - 1}"
        raise c.error(f"cross_attention_layers: expected {expected}, got {crossing!r:.80}")
    spec = decoder(c, [AttentionSpec.of(c, "full_attention")] * num_layers, MlpSpec.of(c))
    if spec.has_tied_head:
        raise c.error("tie_word_embeddings: expected false, as the embedding has more rows than the head, got true")
    return replace(
        spec,
        layers=tuple(layer for i, layer in enumerate(spec.layers) if i not in crossing),
        skipped=tuple(spec.layers[i].prefix + name for i in crossing for name in _MLLAMA_CROSSING_TENSORS),
        embedding_rows=spec.vocab_size + _MLLAMA_IMAGE_TOKENS,
        naming=MLLAMA,
    )


FAMILIES: Mapping[str, Callable[[Fields], ModelSpec]] = {
    "llama": llama,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "qwen3_moe": qwen3_moe,
    "olmo2": olmo2,
    "olmo3": olmo3,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "qwen3_vl_moe": qwen3_vl_moe,
    "mllama": mllama,
}


def read_spec(folder: Path) -> ModelSpec:
    """From ``folder/config.json``. Raises ``CheckpointError`` for what psykern does not know how to compute."""
    return parse_spec(read_config(folder), str(folder / "config.json"))


def parse_spec(config: Mapping[str, Any], name: str) -> ModelSpec:
    """Of a parsed ``config.json``; ``name`` is used in errors."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise CheckpointError(f"{name}: model_type: expected one of {', '.join(FAMILIES)}, got {model_type!r}")
    return FAMILIES[model_type](Fields(config, name))


def decoder(
    c: Fields,
    mixers: Sequence[AttentionSpec],
    ffn: MlpSpec | Sequence[MlpSpec | ExpertsSpec],
    norms: Literal["before", "after"] = "before",
) -> ModelSpec:
    """One layer for each mixer, with its feed-forward part or one for all, and the same norms. To be called when all
    else is read."""
    _refuse_what_is_not_computed(c)
    types = c.get("layer_types")  # of other families too, which have one type
    if isinstance(types, list) and len(types) != len(mixers):
        raise c.error(f"layer_types has {len(types)} entries and num_hidden_layers is {len(mixers)}")
    hidden_size, eps = c.positive("hidden_size"), c.number("rms_norm_eps")
    if eps < 0:
        raise c.error(f"rms_norm_eps: expected no negative number, got {eps}")
    both = NormsSpec(norms, hidden_size, eps)
    ffns = [ffn] * len(mixers) if isinstance(ffn, MlpSpec) else ffn
    spec = ModelSpec(
        model_type=c.get("model_type"),
        vocab_size=c.positive("vocab_size"),
        hidden_size=hidden_size,
        eps=eps,
        max_positions=c.positive("max_position_embeddings"),
        has_tied_head=c.boolean("tie_word_embeddings"),
        layers=tuple(
            LayerSpec(f"model.layers.{i}.", mixer, own, both)
            for i, (mixer, own) in enumerate(zip(mixers, ffns, strict=True))
        ),
    )
    refuse_unknown(c)
    return spec


def language(root: Fields, *, may_be_flat: bool = False) -> Fields:
    """The keys of the language model in one that sees: those of ``text_config``, else those at the root where they
    ``may_be_flat``.

    transformers 4.52 to 4.56 wrote them in both places and reads the former: those at the root are refused where they
    say something else. Whether the head is tied is asked of the root first, as transformers does.
    """
    root.asked.update(("vision_config", "model_type", "tie_word_embeddings"))
    inner = root.mapping("text_config")
    if inner is None and may_be_flat:
        return replace(root, values=_on_one_axis(root.values))
    if inner is None:
        raise root.error("text_config: expected an object, the config of the language model, got None")
    own = ("model_type", "tie_word_embeddings")
    of_root = {key: root.get(key) for key in own if root.get(key) is not None}
    text, outside = _on_one_axis(inner), _on_one_axis(root.values)
    for key, value in outside.items():
        if key in text and key not in own and None not in (value, text[key]) and not is_harmless(key, value):
            root.agreed({f"text_config.{key}": text[key], key: value})
    root.asked.update(text)
    _refuse_what_is_not_computed(root)
    refuse_unknown(root)
    return Fields({**text, **of_root}, f"{root.name}: text_config")


def _on_one_axis(values: Mapping[str, Any]) -> dict[str, Any]:
    """With plain ropes in place of those of several axes. A text's tokens have the same position on all axes
    (``position_ids.expand(3, …)`` in transformers), so that it is one which numbers of a head follow which axis."""
    plain = dict(values)
    for path in ("rope_scaling", "rope_parameters"):
        if isinstance(rope := values.get(path), dict):
            rope = {key: value for key, value in rope.items() if key not in ("mrope_section", "mrope_interleaved")}
            plain[path] = {key: "default" if value == "mrope" else value for key, value in rope.items()}
    return plain


def _refuse_what_is_not_computed(c: Fields) -> None:
    c.asked.add("quantization_config")  # models.quantisation reads it, with the weights
    for key, why in _NOT_COMPUTED.items():
        if c.get(key):
            raise c.error(f"{key}: {why}")
    if not c.get("is_causal", True):
        raise c.error(f"is_causal: expected true, got {c.get('is_causal')!r}")


def _experts_or_mlp(c: Fields, experts: ExpertsSpec) -> list[MlpSpec | ExpertsSpec]:
    """The feed-forward part of each layer: every n-th has experts, but for those that are named."""
    num_layers, step = c.positive("num_hidden_layers"), c.positive("decoder_sparse_step")
    named = c.get("mlp_only_layers") or []
    if not isinstance(named, list) or not all(type(i) is int and 0 <= i < num_layers for i in named):
        raise c.error(f"mlp_only_layers: expected numbers of layers, from 0 to {num_layers - 1}, got {named!r:.80}")
    dense = {i for i in range(num_layers) if i in named or (i + 1) % step != 0}
    mlp = MlpSpec.of(c) if dense else None
    return [experts if i not in dense or mlp is None else mlp for i in range(num_layers)]


def by_type(types: Sequence[str], mixer: Callable[[str], AttentionSpec]) -> list[AttentionSpec]:
    """The mixer of each layer; one for all layers of a type."""
    kinds = {kind: mixer(kind) for kind in dict.fromkeys(types)}
    return [kinds[kind] for kind in types]


def layer_types(c: Fields, has_window: Callable[[int], bool]) -> list[str]:
    """Of each layer, one of ``LAYER_TYPES``. ``has_window``: says it of layer i where ``layer_types`` is absent."""
    num_layers, types = c.positive("num_hidden_layers"), c.get("layer_types")
    if types is None:
        types = [LAYER_TYPES[has_window(i)] for i in range(num_layers)]
    if not isinstance(types, list) or len(types) != num_layers or any(t not in LAYER_TYPES for t in types):
        expected = f"{num_layers} of {' or '.join(LAYER_TYPES)}, as num_hidden_layers says"
        raise c.error(f"layer_types: expected {expected}, got {types!r:.80}")
    if "sliding_attention" in types and c.get("sliding_window") is None:
        raise c.error("sliding_window: expected a positive integer, as layer_types has sliding_attention, got None")
    return list(types)


def _without_windows(c: Fields) -> Fields:
    if _asks_for_windows(c):
        raise c.error("use_sliding_window: expected false, as transformers takes it for, got true")
    return c


def _asks_for_windows(c: Fields) -> bool:
    return c.get("use_sliding_window") is not None and c.boolean("use_sliding_window")


def _qwen_types(c: Fields) -> list[str]:
    is_on = _asks_for_windows(c)
    has_windows = is_on and c.get("sliding_window") is not None
    types = layer_types(c, lambda i: has_windows and i >= c.number("max_window_layers"))
    if "sliding_attention" in types and not is_on:
        raise c.error("use_sliding_window: expected true, as layer_types has sliding_attention, got false")
    return types
