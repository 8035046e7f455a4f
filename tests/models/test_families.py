"""Configs against what transformers makes of the same file, tensor names against its models, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import CONFIGS, VISION, from_config, language_layers, language_model, make_model
from support.configs import (
    OLD_LLAMA3,
    OLD_YARN,
    assert_rope,
    read_both,
    ropes_of,
    rotary_of,
    windows_of,
    write,
)
from transformers import AutoConfig, PreTrainedConfig

from psykern.core.errors import CheckpointError
from psykern.models.families import FAMILIES, parse_spec, read_spec
from psykern.models.spec import ModelSpec


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_sliding_window": False, "sliding_window": 16, "max_window_layers": 2},
        {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 2},
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0},
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 3},
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 8},
        {"use_sliding_window": True, "sliding_window": 16},  # 28 layers without a window
        {"use_sliding_window": True, "sliding_window": 16, "num_hidden_layers": 30},
        {
            "use_sliding_window": True,
            "sliding_window": 16,
            "max_window_layers": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 4,
        },
    ],
    ids=["absent", "off", "null", "all", "from-3", "none", "from-28-of-8", "from-28-of-30", "layer-types"],
)
def test_qwen_windows_equal_transformers(model_type: str, config: dict[str, Any], tmp_path: Path) -> None:
    assert_windows(*read_both(tmp_path, model_type=model_type, **config))


@pytest.mark.parametrize(
    "config",
    [
        {"sliding_window": 16},
        {"sliding_window": 16, "num_hidden_layers": 3},  # not one full layer
        {"sliding_window": 16, "layer_types": ["full_attention", *["sliding_attention"] * 6, "full_attention"]},
        {"sliding_window": 16, "layer_types": ["full_attention"] * 8},
    ],
    ids=["every-fourth", "three-layers", "layer-types", "all-full"],
)
def test_olmo3_windows_equal_transformers(config: dict[str, Any], tmp_path: Path) -> None:
    assert_windows(*read_both(tmp_path, model_type="olmo3", **config))


@pytest.mark.parametrize("model_type", ["llama", "olmo2"])
def test_families_without_windows_have_none(model_type: str, tmp_path: Path) -> None:
    spec, _ = read_both(tmp_path, model_type=model_type, sliding_window=16, use_sliding_window=True)
    assert windows_of(spec) == [None] * 8


def assert_windows(spec: ModelSpec, theirs: PreTrainedConfig) -> None:
    assert windows_of(spec) == [theirs.sliding_window if t == "sliding_attention" else None for t in theirs.layer_types]


@pytest.mark.parametrize("name", CONFIGS)
def test_config_and_tensors_equal_transformers(name: str, tmp_path: Path) -> None:
    """As transformers saves them: sizes, windows, ropes; names and shapes of all tensors but a tied head."""
    oracle = make_model(tmp_path, **CONFIGS[name])
    theirs = oracle.config.get_text_config()
    spec = read_spec(tmp_path)
    num_layers = len(language_layers(oracle))
    all_alike = "sliding_attention" if getattr(theirs, "sliding_window", None) else "full_attention"  # Qwen3's experts
    layer_types = getattr(theirs, "layer_types", None) or [all_alike] * num_layers
    assert windows_of(spec) == [theirs.sliding_window if t == "sliding_attention" else None for t in layer_types]
    assert spec.num_layers == num_layers
    for rope, kind in zip(ropes_of(spec), layer_types, strict=True):
        assert_rope(rope, *rotary_of(theirs, kind))
    assert spec.has_tied_head == getattr(oracle.config, "tie_word_embeddings", False)
    assert {spec.eps, *(eps for layer in spec.layers for eps in (layer.norms.eps, layer.mixer.eps))} == {
        theirs.rms_norm_eps
    }
    assert spec.max_positions == theirs.max_position_embeddings
    own = {f"model.{name}": tensor for name, tensor in language_model(oracle).state_dict().items()}
    if not spec.has_tied_head:
        own["lm_head.weight"] = oracle.lm_head.weight
    skipped = [f"model.layers.{i}." for i in getattr(theirs, "cross_attention_layers", [])]
    shapes = {n: tuple(t.shape) for n, t in own.items() if not n.startswith(tuple(skipped))}
    assert spec.tensors() == one_by_one(shapes)


def one_by_one(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """With each expert's weights in place of the stacks that transformers computes with."""
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        begin, is_stack, stack = name.partition(".mlp.experts.")
        if not is_stack:
            found[name] = shape
            continue
        rows = shape[1] // 2 if stack == "gate_up_proj" else shape[1]
        products = ("gate_proj", "up_proj") if stack == "gate_up_proj" else (stack,)
        for i in range(shape[0]):
            found |= {f"{begin}.mlp.experts.{i}.{product}.weight": (rows, shape[2]) for product in products}
    return found


READ_AS: dict[str, tuple[Callable[[ModelSpec], object], Callable[[PreTrainedConfig], object]]] = {
    "rms_norm_eps": (lambda spec: spec.eps, lambda theirs: theirs.rms_norm_eps),
    "max_position_embeddings": (lambda spec: spec.max_positions, lambda theirs: theirs.max_position_embeddings),
    "tie_word_embeddings": (lambda spec: spec.has_tied_head, lambda theirs: theirs.tie_word_embeddings),
    "attention_bias": (
        lambda spec: spec.layers[0].mixer.o_bias,
        lambda theirs: getattr(theirs, "attention_bias", False),
    ),
    "mlp_bias": (
        lambda spec: getattr(spec.layers[0].ffn, "has_bias", False),
        lambda theirs: getattr(theirs, "mlp_bias", False),
    ),
    "num_key_value_heads": (lambda spec: spec.layers[0].mixer.num_kv_heads, lambda theirs: theirs.num_key_value_heads),
}


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("key", READ_AS)
def test_an_absent_key_means_what_transformers_takes_it_for(key: str, model_type: str, tmp_path: Path) -> None:
    spec, theirs = read_both(tmp_path, key, model_type=model_type, num_attention_heads=32)  # 32: Qwen's own default
    mine, wanted = READ_AS[key]
    assert mine(spec) == wanted(theirs)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_an_absent_rope_means_what_transformers_takes_it_for(model_type: str, tmp_path: Path) -> None:
    spec, theirs = read_both(tmp_path, model_type=model_type, sliding_window=16)
    for rope, kind in zip(
        ropes_of(spec), getattr(theirs, "layer_types", ["full_attention"] * spec.num_layers), strict=True
    ):
        assert_rope(rope, *rotary_of(theirs, kind))


@pytest.mark.parametrize(
    ("model_type", "switch"), [("olmo3", {}), ("qwen2", {"use_sliding_window": True, "max_window_layers": 2})]
)
def test_an_absent_window_means_what_transformers_takes_it_for(
    model_type: str, switch: dict[str, Any], tmp_path: Path
) -> None:
    assert_windows(*read_both(tmp_path, model_type=model_type, **switch))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_an_absent_head_size_means_what_transformers_takes_it_for(model_type: str, tmp_path: Path) -> None:
    """Qwen3's heads have 128 numbers whatever the hidden size, those of the others share it out."""
    spec, _ = read_both(tmp_path, "head_dim", model_type=model_type)
    config = AutoConfig.from_pretrained(tmp_path)
    if model_type in VISION:
        config.vision_config = AutoConfig.for_model(model_type, vision_config=VISION[model_type]).vision_config
    with torch.device("meta"):
        model = from_config(config)
    assert spec.layers[0].mixer.q_size == language_layers(model)[0].self_attn.q_proj.out_features


def as_id(config: dict[str, Any]) -> str:
    return json.dumps(config).translate(str.maketrans("", "", '{}"'))[:60]


BY_LENGTH = "; its frequencies follow the sequence's length, so that a token's key would depend on what comes after it$"
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "gpt2"}, "model_type: expected one of llama, .*, got 'gpt2'"),
    ({"model_type": None}, "model_type: expected one of llama, .*, got None"),
    ({"model_type": ["llama"]}, "model_type: expected one of llama"),
    ({"vocab_size": None}, "vocab_size: expected a positive integer, got None"),
    ({"hidden_size": None}, "hidden_size: expected a positive integer, got None"),
    ({"intermediate_size": None}, "intermediate_size: expected a positive integer, got None"),
    ({"num_attention_heads": None}, "num_attention_heads: expected a positive integer, got None"),
    ({"num_hidden_layers": None}, "num_hidden_layers: expected a positive integer, got None"),
    ({"hidden_size": "64"}, "hidden_size: expected a positive integer, got '64'"),
    ({"hidden_size": 64.0}, "hidden_size: expected a positive integer, got 64.0"),
    ({"vocab_size": True}, "vocab_size: expected a positive integer, got True"),
    ({"num_hidden_layers": 0}, "num_hidden_layers: expected a positive integer, got 0"),
    ({"head_dim": -1}, "head_dim: expected a positive integer, got -1"),
    ({"head_dim": 15}, "head_dim: .*15"),  # a pair of numbers is rotated together
    ({"max_position_embeddings": "4096"}, "max_position_embeddings: expected a positive integer, got '4096'"),
    (
        {"num_key_value_heads": 3},
        "num_attention_heads is 4 and num_key_value_heads is 3: expected a multiple of the latter",
    ),
    ({"hidden_act": "gelu"}, "hidden_act: expected 'silu', got 'gelu'"),
    ({"rms_norm_eps": None}, "rms_norm_eps: "),
    ({"rms_norm_eps": "1e-6"}, "rms_norm_eps: "),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps: expected a number, got nan"),
    ({"rms_norm_eps": -1e-6}, "rms_norm_eps: expected no negative number, got -1e-06"),
    ({"rope_theta": 10**400}, "rope_theta: expected a number, got 1000"),
    ({"tie_word_embeddings": "false"}, "tie_word_embeddings: "),
    ({"rope_theta": "high"}, "rope_theta: "),
    (
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        f"rope_type: expected default, .*, got 'dynamic'{BY_LENGTH}",
    ),
    ({"rope_scaling": {"type": "longrope"}}, f"rope_type: expected default, .*, got 'longrope'{BY_LENGTH}"),
    (
        {"rope_scaling": {"type": "proportional"}},
        "rope_type: expected default, linear, llama3, yarn, got 'proportional'$",
    ),
    ({"rope_scaling": {"rope_type": ["yarn"]}}, r"rope_type: expected default, .*, got \['yarn'\]$"),
    ({"rope_scaling": {"rope_type": None}}, "rope_type: expected default, .*, got None$"),
    ({"rope_theta": 0}, "rope_theta: expected a number above 1, got 0"),
    ({"rope_theta": 1.0, "rope_scaling": OLD_YARN}, "rope_theta: expected a number above 1, got 1.0"),
    ({"rope_scaling": OLD_LLAMA3 | {"low_freq_factor": 0}}, "low_freq_factor: expected a positive number, got 0"),
    ({"rope_scaling": OLD_YARN | {"attention_factor": "1"}}, "attention_factor: expected a number, got '1'"),
    ({"rope_scaling": OLD_YARN | {"beta_fast": -1}}, "beta_fast: expected no negative number, got -1"),
    ({"rope_scaling": {"rope_type": "linear"}}, "rope_type 'linear' needs factor"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_type 'llama3' needs low_freq_factor"),
    ({"rope_scaling": {"rope_type": "yarn"}}, "rope_type 'yarn' needs factor"),
    ({"rope_scaling": {"rope_type": "linear", "factor": "four"}}, "factor"),
    ({"rope_scaling": OLD_LLAMA3 | {"factor": "eight"}}, "factor"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": "four"}}, "factor"),
    ({"rope_scaling": "yarn"}, "rope_scaling: "),
    ({"rope_parameters": ["yarn"]}, "rope_parameters: "),
    (
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
        f"rope_type: expected default, .*, got 'dynamic'{BY_LENGTH}",
    ),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: only 1.0 is supported"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor: only 1.0 is supported"),
]


@pytest.mark.parametrize(("config", "message"), REFUSED, ids=[as_id(config) for config, _ in REFUSED])
def test_a_config_that_cannot_be_computed_names_file_and_key(
    config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        read_spec(write(tmp_path, **({"model_type": "llama"} | config)))
    assert str(error.value).startswith(f"{tmp_path / 'config.json'}: ")


REFUSED_WINDOWS: list[tuple[dict[str, Any], str]] = [
    ({"layer_types": ["full_attention"] * 7}, "layer_types: expected 8 of full_attention or sliding_attention"),
    ({"layer_types": ["chunked_attention"] * 8}, "layer_types: expected 8 of full_attention or sliding_attention"),
    ({"layer_types": 8}, "layer_types: expected 8 of full_attention or sliding_attention"),
    ({"sliding_window": "16"}, "sliding_window: expected a positive integer, got '16'"),
    ({"sliding_window": -1}, "sliding_window: expected a positive integer, got -1"),
    ({"max_window_layers": "all"}, "max_window_layers: expected"),
]


@pytest.mark.parametrize(("config", "message"), REFUSED_WINDOWS, ids=[as_id(config) for config, _ in REFUSED_WINDOWS])
def test_windows_that_cannot_be_read_name_file_and_key(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    windowed: dict[str, Any] = {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 16,
        "max_window_layers": 2,
    }
    with pytest.raises(CheckpointError, match=message) as error:
        read_spec(write(tmp_path, **(windowed | config)))
    assert str(error.value).startswith(f"{tmp_path / 'config.json'}: ")


SMOLLM2: dict[str, Any] = {  # of the 135M base model, as it was published
    **{"architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 0},
    **{"eos_token_id": 0, "hidden_act": "silu", "hidden_size": 576, "initializer_range": 0.041666666666666664},
    **{"intermediate_size": 1536, "is_llama_config": True, "max_position_embeddings": 8192, "model_type": "llama"},
    **{"num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3, "pretraining_tp": 1},
    **{"rms_norm_eps": 1e-05, "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000},
    **{"tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.40.1", "use_cache": True},
    "vocab_size": 49152,
}


def test_a_key_may_be_harmless_with_one_value_alone() -> None:
    assert parse_spec(SMOLLM2, "config.json").num_layers == 30
    with pytest.raises(CheckpointError, match=r"rope_interleaved \(True\): expected no key that psykern does not know"):
        parse_spec(SMOLLM2 | {"rope_interleaved": True}, "config.json")
