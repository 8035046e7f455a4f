"""What the weights take of memory, and when copying a layer hides: by hand, from the models' published sizes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import psykern
from psykern.models.checkpoint import stored_dtype
from psykern.models.families import parse_spec
from psykern.models.parts import Flops
from psykern.models.spec import ModelSpec
from psykern.runs.plan_text import format_estimate
from psykern.runs.streaming import WeightsPlan

LLAMA_70B: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 80,
    "hidden_size": 8192,
    "intermediate_size": 28_672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128_256,
    "rope_theta": 500_000.0,
    "max_position_embeddings": 131_072,
}


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    return parse_spec(LLAMA_70B, "config.json")


def test_the_plan_of_70_billion_weights(spec: ModelSpec) -> None:
    """70,553,706,496 weights, as published. A layer has 8192 * (2 * 8192 + 2 * 1024) weights of attention and
    3 * 8192 * 28,672 of the MLP, 855,638,016, of 2 bytes and 2 FLOPs a token each, and two norms of 8192: a byte a
    FLOP, so that 704e12 / 51.2e9 tokens hide the copy."""
    plan = WeightsPlan.of(spec, torch.float32, torch.bfloat16)
    assert (plan.stored_bytes, plan.compute_bytes) == (2 * 70_553_706_496, 4 * 70_553_706_496)
    assert (plan.gpu.layer_bytes, plan.gpu.is_resident) == (2 * (855_638_016 + 2 * 8192), False)
    assert plan.gpu.rows == 13_751  # 13,750 and the norms
    assert format_estimate(psykern.Estimate((), (), plan)).splitlines()[-2:] == [
        "weights: 141 GB as stored (bfloat16), 282 GB in float32",
        "one H100 80GB, bfloat16: the weights do not fit its memory; streamed: a wave of 13,751 tokens or more hides "
        "the copy of a layer (1.71 GB at 51 GB/s) behind its arithmetic (704 TFLOP/s)",
    ]


def test_rows_follow_from_what_is_computed_and_not_from_the_weights(
    spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a mixture of experts: an eighth of the FLOPs, eight times the rows."""
    one = WeightsPlan.of(spec, torch.bfloat16, None).gpu
    kind = type(spec.layers[0])
    whole = spec.layers[0].flops()
    part = Flops(whole.per_row // 8, whole.per_query // 8, whole.per_visible_key)
    monkeypatch.setattr(kind, "flops", lambda self: part)
    assert WeightsPlan.of(spec, torch.bfloat16, None).gpu == replace(one, rows=pytest.approx(8 * one.rows, abs=8))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"torch_dtype": "bfloat16"}, torch.bfloat16),
        ({"dtype": "float16"}, torch.float16),
        ({"text_config": {"dtype": "float32"}}, torch.float32),
        ({"torch_dtype": "bfloat16", "quantization_config": {"quant_method": "gptq"}}, None),
        ({"torch_dtype": "auto"}, None),
        ({"torch_dtype": "nn"}, None),
        ({}, None),
    ],
    ids=["older", "newer", "nested", "quantised", "auto", "no-dtype", "absent"],
)
def test_the_dtype_that_a_config_says(config: dict[str, Any], expected: torch.dtype | None, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert stored_dtype(tmp_path) == expected
