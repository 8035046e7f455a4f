"""The shapes of the published study's models: what their ``config.json`` say, for random weights and for the roofline.

Sizes are those of the checkpoints' own configs; ``tests/benchmarks/test_roofline.py`` holds the weights that they come
to against the published counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from psykern.models.families import parse_spec
from psykern.models.spec import ModelSpec

QWEN_VOCABULARY, LLAMA_VOCABULARY, OLMO_VOCABULARY = 151_936, 128_256, 100_278


def _shape(
    model_type: str, layers: int, hidden: int, inner: int, heads: int, kv_heads: int, head_dim: int, **more: object
) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        **more,
    }


def _qwen2(*sizes: int, vocabulary: int = 152_064) -> dict[str, Any]:
    tied = vocabulary == QWEN_VOCABULARY
    more = {"vocab_size": vocabulary, "tie_word_embeddings": tied, "max_position_embeddings": 131_072}
    return _shape("qwen2", *sizes, rope_theta=1_000_000.0, **more)


def _qwen3(*sizes: int, tied: bool) -> dict[str, Any]:
    more = {"vocab_size": QWEN_VOCABULARY, "tie_word_embeddings": tied, "max_position_embeddings": 40_960}
    return _shape("qwen3", *sizes, 128, rope_theta=1_000_000.0, **more)


def _llama(*sizes: int, tied: bool = False) -> dict[str, Any]:
    more = {"vocab_size": LLAMA_VOCABULARY, "tie_word_embeddings": tied, "max_position_embeddings": 131_072}
    return _shape("llama", *sizes, rope_theta=500_000.0, rms_norm_eps=1e-5, **more)


def _olmo3(*sizes: int) -> dict[str, Any]:
    more = {"vocab_size": OLMO_VOCABULARY, "sliding_window": 4096, "max_position_embeddings": 65_536}
    return _shape("olmo3", *sizes, 128, rope_theta=500_000.0, **more)


SHAPES: Mapping[str, Mapping[str, Any]] = {
    "Qwen2.5-0.5B": _qwen2(24, 896, 4864, 14, 2, 64, vocabulary=QWEN_VOCABULARY),
    "Qwen2.5-1.5B": _qwen2(28, 1536, 8960, 12, 2, 128, vocabulary=QWEN_VOCABULARY),
    "Qwen2.5-3B": _qwen2(36, 2048, 11_008, 16, 2, 128, vocabulary=QWEN_VOCABULARY),
    "Qwen2.5-7B": _qwen2(28, 3584, 18_944, 28, 4, 128),
    "Qwen2.5-14B": _qwen2(48, 5120, 13_824, 40, 8, 128),
    "Qwen2.5-32B": _qwen2(64, 5120, 27_648, 40, 8, 128),
    "Qwen2.5-72B": _qwen2(80, 8192, 29_568, 64, 8, 128),
    "Qwen3-0.6B": _qwen3(28, 1024, 3072, 16, 8, tied=True),
    "Qwen3-1.7B": _qwen3(28, 2048, 6144, 16, 8, tied=True),
    "Qwen3-4B": _qwen3(36, 2560, 9728, 32, 8, tied=True),
    "Qwen3-8B": _qwen3(36, 4096, 12_288, 32, 8, tied=False),
    "Qwen3-14B": _qwen3(40, 5120, 17_408, 40, 8, tied=False),
    "Qwen3-32B": _qwen3(64, 5120, 25_600, 64, 8, tied=False),
    "Llama-3.2-1B": _llama(16, 2048, 8192, 32, 8, 64, tied=True),
    "Llama-3.2-3B": _llama(28, 3072, 8192, 24, 8, 128, tied=True),
    "Llama-3.1-8B": _llama(32, 4096, 14_336, 32, 8, 128),
    "Llama-3.1-70B": _llama(80, 8192, 28_672, 64, 8, 128),
    "OLMo-3-7B": _olmo3(32, 4096, 11_008, 32, 32),
    "OLMo-3-32B": _olmo3(64, 5120, 27_648, 40, 8),
}


def model_spec(name: str) -> ModelSpec:
    """psykern's own reading of the shape ``name``."""
    return parse_spec(SHAPES[name], name)


def num_weights(spec: ModelSpec) -> int:
    """Numbers of a checkpoint of ``spec``; a tied head counts once."""
    total = 0
    for shape in spec.tensors().values():
        size = 1
        for side in shape:
            size *= side
        total += size
    return total
