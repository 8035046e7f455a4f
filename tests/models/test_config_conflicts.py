"""Keys of a config that say different things about one number, and keys that transformers obeys: each config either
scores as transformers does or is refused by the names of the keys. Nothing is left out in silence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from support.checkpoints import CONFIGS, make_model, oracle_logprobs
from support.configs import OLD_LLAMA3, OLD_YARN
from support.groups import encoded
from transformers import AutoModelForCausalLM

from psykern.core.errors import CheckpointError
from psykern.engine.engine import Engine
from psykern.engine.plan import plan
from psykern.kernels.compute import Compute
from psykern.models.model import Model

TOKENS = np.random.default_rng(3).integers(320, size=100)  # more than the windows of 16 and the original length of 64
TOLERANCE = 1e-4  # nats per token, against fp32 transformers; a key that is overlooked costs 0.7 to 5

DEFAULT = {"rope_type": "default"}
LINEAR = {"rope_type": "linear", "factor": 4.0}
OLD = {"type": "linear", "factor": 4.0}
YARN = {key: value for key, value in OLD_YARN.items() if key != "attention_factor"}
WINDOWS = ["full_attention", "sliding_attention", "full_attention"]
ROPE, BOTH = ("rope_parameters",), ("rope_scaling", "rope_parameters")


def by_type(full: Any, sliding: Any, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"full_attention": full, "sliding_attention": sliding, **more}}


class Case(NamedTuple):
    family: str  # of CONFIGS
    keys: dict[str, Any]  # of config.json
    absent: tuple[str, ...] = ()  # what transformers wrote there and is taken out
    refused: tuple[str, ...] = ()  # what the error says; nothing: the scores are those of transformers


CASES: dict[str, Case] = {
    # rope_parameters, rope_scaling and rope_theta beside each other
    "scaling": Case("llama", {"rope_scaling": LINEAR, "rope_theta": 2e4}, ROPE),
    "scaling-and-default": Case("llama", {"rope_scaling": LINEAR}, (), (*BOTH, "'linear'", "'default'")),
    "scaling-and-another-factor": Case(
        "llama", {"rope_scaling": LINEAR, "rope_parameters": LINEAR | {"factor": 8.0}}, (), (*BOTH, "4.0", "8.0")
    ),
    "scaling-without-the-theta": Case(
        "llama",
        {"rope_scaling": LINEAR, "rope_parameters": LINEAR | {"rope_theta": 2e4}},
        (),
        ("rope_scaling.rope_theta is 10000.0", "rope_parameters.rope_theta is 20000.0"),
    ),
    "scaling-without-a-parameter": Case(
        "llama", {"rope_scaling": YARN, "rope_parameters": OLD_YARN}, (), ("attention_factor is None", "1.2")
    ),
    "scaling-without-a-kind": Case("llama", {"rope_scaling": {"factor": 4.0}}, (), (*BOTH, "factor is 4.0")),
    "scaling-and-the-same": Case(
        "llama",
        {"rope_scaling": OLD, "rope_parameters": LINEAR | {"rope_theta": 2e4}, "rope_theta": 20000},
    ),
    "scaling-and-original-length-by-default": Case(
        "llama",
        {
            "rope_scaling": YARN | {"original_max_position_embeddings": 4096},
            "rope_parameters": {key: value for key, value in YARN.items() if key != "original_max_position_embeddings"},
        },
    ),
    "scaling-and-nothing": Case("qwen2", {"rope_scaling": LINEAR, "rope_parameters": {}, "rope_theta": 1e5}),
    "nothing-and-parameters": Case("qwen3", {"rope_scaling": {}, "rope_parameters": LINEAR, "rope_theta": 1e5}),
    "null-and-parameters": Case("olmo2", {"rope_scaling": None, "rope_parameters": LINEAR | {"rope_theta": 1e5}}),
    "theta-twice": Case(
        "llama",
        {"rope_parameters": LINEAR | {"rope_theta": 2e4}, "rope_theta": 5e5},
        (),
        ("rope_parameters.rope_theta is 20000.0", "rope_theta is 500000.0"),
    ),
    "theta-twice-old": Case(
        "qwen2",
        {"rope_scaling": LINEAR | {"rope_theta": 2e4}, "rope_theta": 5e5},
        ROPE,
        ("rope_scaling.rope_theta is 20000.0", "rope_theta is 500000.0"),
    ),
    "theta-twice-the-same": Case("qwen2", {"rope_parameters": LINEAR | {"rope_theta": 2e4}, "rope_theta": 20000}),
    "theta-outside": Case("qwen2", {"rope_parameters": LINEAR, "rope_theta": 1e5}),
    "kind-twice": Case(
        "llama",
        {"rope_parameters": LINEAR | {"type": "default"}},
        (),
        ("rope_parameters.rope_type is 'linear'", "rope_parameters.type is 'default'"),
    ),
    "kind-twice-old": Case(
        "llama", {"rope_scaling": OLD | {"rope_type": "default"}}, ROPE, ("rope_scaling.rope_type", "rope_scaling.type")
    ),
    "kind-twice-the-same": Case("llama", {"rope_parameters": LINEAR | {"type": "linear"}}),
    "original-length-outside-goes-first": Case(
        "llama", {"rope_parameters": OLD_LLAMA3, "original_max_position_embeddings": 32}
    ),
    "original-length-of-nothing": Case(
        "llama",
        {"rope_parameters": OLD_LLAMA3 | {"original_max_position_embeddings": 0}},
        (),
        ("original_max_position_embeddings", "positive", "0"),
    ),
    "original-length-outside-of-nothing": Case(
        "llama",
        {"rope_parameters": OLD_LLAMA3, "original_max_position_embeddings": 0},
        (),
        ("original_max_position_embeddings", "positive", "0"),
    ),
    "factor-goes-before-the-lengths": Case("llama", {"rope_parameters": YARN | {"factor": 3.0}}),
    "not-truncated": Case("llama", {"rope_parameters": YARN | {"truncate": False}}),
    "part-rotated-outside": Case(
        "llama",
        {"rope_parameters": DEFAULT | {"partial_rotary_factor": 1.0}, "partial_rotary_factor": 0.5},
        (),
        ("partial_rotary_factor", "0.5"),
    ),
    "part-rotated-none": Case("llama", {"partial_rotary_factor": 0.0}, (), ("partial_rotary_factor", "0.0")),
    # One rope for all layers, or one for each type
    "types-where-there-is-one": Case(
        "llama", {"rope_parameters": {"full_attention": LINEAR}}, (), ("rope_parameters", "full_attention")
    ),
    "types-in-qwen": Case("qwen2-window", by_type(LINEAR, DEFAULT), (), ("rope_parameters", "sliding_attention")),
    "one-where-there-are-types": Case(
        "olmo3", {"rope_parameters": LINEAR}, (), ("rope_parameters", "sliding_attention", "factor")
    ),
    "types-and-more": Case("olmo3", by_type(LINEAR, DEFAULT, truncate=False), (), ("rope_parameters", "truncate")),
    "types-not-truncated": Case("olmo3", by_type(YARN | {"truncate": False}, DEFAULT), (), ("truncate",)),
    "types-by-default": Case("olmo3", {"rope_parameters": {"full_attention": LINEAR}}),
    "types-and-scaling": Case(
        "olmo3", {"rope_scaling": YARN}, (), ("rope_scaling.rope_type", "rope_parameters.full_attention.rope_type")
    ),
    "types-and-the-same": Case("olmo3", by_type(YARN, DEFAULT) | {"rope_scaling": YARN, "rope_theta": 5e5}),
    "types-scaling-alone": Case("olmo3", {"rope_scaling": YARN, "rope_theta": 5e5}, ROPE),
    "types-scaling-by-the-oldest-key": Case(
        "olmo3",
        {"rope_scaling": OLD, "rope_theta": 5e5},
        ROPE,
        ("rope_scaling.type is 'linear'", "rope_scaling.rope_type (absent, so by default) is 'default'"),
    ),
    "types-of-full-by-the-oldest-key": Case("olmo3", by_type(OLD, DEFAULT)),
    "types-theta-of-full-alone": Case(
        "olmo3",
        {"rope_theta": 1e4},
        ROPE,
        ("rope_theta is 10000.0", "sliding_attention.rope_theta (absent, so by default) is 500000.0"),
    ),
    "types-theta-twice": Case(
        "olmo3",
        by_type(LINEAR | {"rope_theta": 1e4}, LINEAR | {"rope_theta": 2e4}) | {"rope_theta": 2e4},
        (),
        ("full_attention.rope_theta is 10000.0", "rope_theta is 20000.0"),
    ),
    "types-original-length-outside": Case(
        "olmo3-yarn",
        {"original_max_position_embeddings": 32},
        (),
        ("original_max_position_embeddings is 32", "full_attention.original_max_position_embeddings is 64"),
    ),
    # Windows
    "windows-off": Case(
        "qwen2", {"layer_types": WINDOWS, "sliding_window": 16}, (), ("use_sliding_window", "layer_types")
    ),
    "windows-without-a-size": Case(
        "qwen3",
        {"layer_types": WINDOWS, "use_sliding_window": True, "sliding_window": None},
        (),
        ("sliding_window", "layer_types"),
    ),
    "windows-without-a-size-by-default": Case(
        "olmo3", {"sliding_window": None}, ("layer_types",), ("sliding_window", "layer_types")
    ),
    "windows-go-before-their-first-layer": Case(
        "qwen2",
        {"layer_types": WINDOWS, "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 3},
    ),
    "windows-by-a-word": Case(
        "qwen2",
        {"use_sliding_window": "false", "sliding_window": 16, "max_window_layers": 1},
        ("layer_types",),
        ("use_sliding_window", "'false'"),
    ),
    "windows-of-a-family-without": Case("llama", {"layer_types": ["sliding_attention"] * 3, "sliding_window": 16}),
    "types-of-other-layers": Case(
        "qwen2", {"layer_types": ["full_attention"] * 5}, (), ("layer_types", "num_hidden_layers", "3")
    ),
    "types-of-other-layers-of-a-family-without": Case(
        "olmo2", {"layer_types": ["full_attention"] * 5}, (), ("layer_types", "num_hidden_layers", "3")
    ),
    # What transformers obeys in any config
    "not-causal": Case("llama", {"is_causal": False}, (), ("is_causal",)),
    "causal": Case("qwen3", {"is_causal": True}),
    "layers-of-their-own": Case("llama", {"per_layer_config": {"1": {"rms_norm_eps": 0.1}}}, (), ("per_layer_config",)),
    "nested": Case("llama", {"text_config": {"rms_norm_eps": 0.1}}, (), ("text_config",)),
    "other-weights": Case("llama", {"transformers_weights": "b.safetensors"}, (), ("transformers_weights",)),
    "other-config": Case("llama", {"configuration_files": ["config.5.0.json"]}, (), ("configuration_files",)),
    # What it does not
    "known-to-change-nothing": Case(
        "llama",
        {
            **{
                "pretraining_tp": 2,
                "torch_dtype": "float16",
                "unsloth_version": "2026.3",
                "_attn_implementation": "sdpa",
            },
            **{"temperature": 0.5, "id2label": {"0": "a"}, "pruned_heads": {}, "residual_dropout": 0.5, "top_k": 20},
            **{"image_token_id": 7, "mtp_layers": 1, "final_logit_softcapping": None, "use_mrope": False},
        },
    ),
    "unknown": Case("llama", {"attn_scale": 2.0, "clip_qkv": 1}, (), ("attn_scale (2.0), clip_qkv (1)", "remove it")),
    "other-models-keys": Case("qwen2", {"final_logit_softcapping": 3.0}, (), ("final_logit_softcapping (3.0)",)),
    "other-families-keys": Case("qwen2", {"mlp_bias": True}, (), ("mlp_bias (True)",)),
    "harmless-as-it-mostly-is": Case("qwen3", {"pruned_heads": {"0": [1]}}, (), ("pruned_heads ({'0': [1]})",)),
    "unknown-within-a-rope": Case(
        "llama", {"rope_parameters": LINEAR | {"attn_factor": 2.0}}, (), ("rope_parameters.attn_factor", "2.0")
    ),
    "activation-by-its-other-name": Case("llama", {"hidden_act": "swish"}),
    "activation": Case("qwen2", {"hidden_act": "gelu"}, (), ("hidden_act", "'gelu'")),
    # Against the weights
    "untied": Case("qwen2", {"tie_word_embeddings": False}, (), ("missing", "lm_head.weight")),
    "tied-with-a-head": Case(
        "llama",
        {"tie_word_embeddings": True},
        (),
        ("tie_word_embeddings", "lm_head.weight", "model.embed_tokens.weight"),
    ),
    "vocabulary": Case("llama", {"vocab_size": 300}, (), ("model.embed_tokens.weight", "300", "320")),
    "heads": Case("llama", {"head_dim": 8}, (), ("self_attn.q_proj.weight",)),
    "key-heads": Case(
        "qwen3", {}, ("num_key_value_heads",), ("num_attention_heads is 4", "num_key_value_heads is 32", "multiple")
    ),
    "biases": Case("llama", {"attention_bias": True}, (), ("missing", "q_proj.bias")),
    "no-biases": Case("llama-rope3-bias", {"mlp_bias": False}, (), ("unused", "mlp.up_proj.bias")),
}


@pytest.mark.parametrize("name", CASES)
def test_a_config_scores_as_under_transformers_or_is_refused_by_its_keys(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    make_model(tmp_path, **CONFIGS[case.family])
    path = tmp_path / "config.json"
    config = json.loads(path.read_text()) | case.keys
    path.write_text(json.dumps({key: value for key, value in config.items() if key not in case.absent}))
    if case.refused:
        with pytest.raises(CheckpointError) as error:
            Model(tmp_path, Compute.resolve("cpu"))
        assert all(part in str(error.value) for part in (str(tmp_path), *case.refused)), str(error.value)
    else:
        assert np.abs(score(tmp_path) - oracle(tmp_path)).max() <= TOLERANCE


def score(folder: Path) -> np.ndarray:
    """Log-probabilities of TOKENS after the first, under psykern."""
    transcript = encoded(TOKENS.tolist(), [(1, len(TOKENS))])
    return (
        Engine(Model(folder, Compute.resolve("cpu")))
        .run(plan([transcript], wave_tokens=4096, batch_tokens=512))
        .logprob
    )


def oracle(folder: Path) -> np.ndarray:
    """The same under transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    table = oracle_logprobs(model, TOKENS)
    return table[torch.arange(len(TOKENS) - 1), torch.from_numpy(TOKENS[1:])].numpy()


@pytest.mark.parametrize("place", ["outside", "within"])
def test_a_key_that_is_there_twice_is_refused(place: str, tmp_path: Path) -> None:
    """Python's reader takes the last one, others the first."""
    make_model(tmp_path, **CONFIGS["llama"])
    path = tmp_path / "config.json"
    key = '"rms_norm_eps": 1e-06' if place == "outside" else '"rope_theta": 10000.0'
    text = path.read_text()
    assert key in text
    path.write_text(text.replace(key, f"{key}, {key}"))
    assert np.abs(score(tmp_path) - oracle(tmp_path)).max() <= TOLERANCE
    path.write_text(text.replace(key, f"{key}, {key}1"))
    with pytest.raises(
        CheckpointError, match=f"config.json: .*'{key.split(chr(34))[1]}' is there twice, as .* and as .*1"
    ):
        Model(tmp_path, Compute.resolve("cpu"))
