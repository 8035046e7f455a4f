"""Small random checkpoints of the real architectures, made by ``transformers``: the outside oracle of the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "attention_factor": 1.2,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}

EXPERTS = {"moe_intermediate_size": 48, "num_experts_per_tok": 2, "head_dim": 16}
QWEN_VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 64}
VISION: dict[str, dict[str, Any]] = {  # of models that see: a small tower, which no text passes through
    "qwen2_5_vl": QWEN_VISION | {"fullatt_block_indexes": [0]},
    "qwen3_vl": QWEN_VISION | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
    "qwen3_vl_moe": QWEN_VISION | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
    "mllama": {
        **{"hidden_size": 16, "num_hidden_layers": 1, "num_global_layers": 1, "attention_heads": 2, "image_size": 28},
        **{"intermediate_size": 16, "vision_output_dim": 32, "intermediate_layers_indices": [0]},
    },
}

# One entry per way in which the families differ; window and rope scaling act within the tests' transcripts.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama-rope3-bias": {
        "model_type": "llama",
        "rope_parameters": LLAMA3_ROPE,
        "attention_bias": True,
        "mlp_bias": True,
        "head_dim": 32,
    },
    "llama-rope-linear-tied": {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        "tie_word_embeddings": True,
    },
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2-window": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 16,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 24, "tie_word_embeddings": True},
    "qwen3-one-kv-head": {"model_type": "qwen3", "head_dim": 16, "num_key_value_heads": 1},
    "qwen3-moe": {"model_type": "qwen3_moe", "num_experts": 8, "norm_topk_prob": True} | EXPERTS,
    "qwen3-moe-some-layers": {
        "model_type": "qwen3_moe",
        "num_experts": 5,
        "mlp_only_layers": [0],
        "use_sliding_window": True,
        "sliding_window": 16,
        "tie_word_embeddings": True,
    }
    | EXPERTS,
    "olmo2": {"model_type": "olmo2", "num_key_value_heads": 4},
    "olmo3": {"model_type": "olmo3", "sliding_window": 16, "num_hidden_layers": 4},
    "olmo3-yarn": {
        "model_type": "olmo3",
        "sliding_window": 20,
        "num_hidden_layers": 4,
        "rope_parameters": {
            "full_attention": YARN_ROPE,
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    },
    "qwen2_5_vl-window": {
        "model_type": "qwen2_5_vl",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        "use_sliding_window": True,
        "sliding_window": 16,
        "max_window_layers": 1,
    },
    "qwen2_5_vl-yarn-tied": {
        "model_type": "qwen2_5_vl",
        "rope_parameters": YARN_ROPE | {"mrope_section": [2, 3, 3]},
        "tie_word_embeddings": True,
    },
    "qwen3_vl": {"model_type": "qwen3_vl", "rope_parameters": {"rope_theta": 10000.0}, "attention_bias": True},
    "qwen3_vl-tied": {
        "model_type": "qwen3_vl",
        "rope_parameters": {
            **{"rope_type": "default", "rope_theta": 20000.0, "mrope_interleaved": True, "mrope_section": [4, 4, 4]},
        },
        "head_dim": 24,
        "tie_word_embeddings": True,
    },
    "qwen3_vl_moe": {
        "model_type": "qwen3_vl_moe",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        "num_experts": 6,
    }
    | EXPERTS,
    "mllama": {
        "model_type": "mllama",
        "rope_parameters": LLAMA3_ROPE,
        "num_hidden_layers": 6,
        "cross_attention_layers": [0, 2, 5],
        "bos_token_id": 0,  # its config class takes no null
    },
}

# Whose layers differ from each other: a model that sees has those of one of these.
LAYERS = {name: config for name, config in CONFIGS.items() if config["model_type"] not in VISION}


SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "initializer_range": 0.2,  # large enough that the distributions are far from uniform
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


def make_model(folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> PreTrainedModel:
    """Save a random model of ``config`` to ``folder`` and return it, in fp32 and with transformers' own attention."""
    torch.manual_seed(seed)
    model = from_config(config_of(SIZES | config)).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:  # not ones and zeros, so that a forgotten one shows
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    if dtype != torch.float32:  # not model.float(): its rotary frequencies were rounded too
        model = type(model).from_pretrained(folder, dtype=torch.float32)
    if "num_experts" in config:
        model.set_experts_implementation("eager")  # torch's grouped product has no fp64
    return model.eval()


def config_of(settings: dict[str, Any]) -> PreTrainedConfig:
    """transformers' own; in one that sees, ``settings`` are those of the language model."""
    kind = settings["model_type"]
    if kind not in VISION:
        return AutoConfig.for_model(**settings)
    text = {key: value for key, value in settings.items() if key != "model_type"}
    root = {key: value for key, value in text.items() if key == "tie_word_embeddings"}
    return AutoConfig.for_model(kind, text_config=text, vision_config=VISION[kind], **root)


def from_config(config: PreTrainedConfig) -> PreTrainedModel:
    auto = AutoModelForImageTextToText if config.model_type in VISION else AutoModelForCausalLM
    return auto.from_config(config)


def language_model(model: PreTrainedModel) -> PreTrainedModel:
    """Without head, and without what else sees."""
    inside = getattr(model.model, "language_model", model.model)
    assert isinstance(inside, PreTrainedModel)
    return inside


def language_layers(model: PreTrainedModel) -> list[torch.nn.Module]:
    """Those that a text passes through."""
    return [layer for layer in language_model(model).layers if hasattr(layer, "self_attn")]


@torch.inference_mode()
def oracle_logprobs(model: PreTrainedModel, token_ids: np.ndarray) -> torch.Tensor:
    """[T, V] log-probabilities of the token after each, in fp64 from transformers' fp32 logits."""
    ids = torch.from_numpy(token_ids.astype(np.int64))[None].to(model.device)
    return model(ids, use_cache=False).logits[0].double().log_softmax(-1)
