"""Mixtures of experts as configs describe them, and how a row's experts are picked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.configs import read_both, write
from torch import Tensor
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from psykern.core.errors import CheckpointError
from psykern.models.batch import Scratch
from psykern.models.experts import ExpertsSpec
from psykern.models.families import read_spec
from psykern.models.mlp import MlpSpec

MOE: dict[str, Any] = {"model_type": "qwen3_moe"}


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"decoder_sparse_step": 3},
        {"decoder_sparse_step": 2, "mlp_only_layers": [1, 4, 5]},
        {"mlp_only_layers": [7, 0]},
        {"mlp_only_layers": None, "num_experts": 6, "num_experts_per_tok": 6},
    ],
    ids=["absent", "every-third", "both", "some", "all-experts"],
)
def test_which_layers_have_experts_equals_transformers(config: dict[str, Any], tmp_path: Path) -> None:
    spec, theirs = read_both(tmp_path, **MOE, **config)
    for i, layer in enumerate(spec.layers):
        sparse = i not in theirs.mlp_only_layers and (i + 1) % theirs.decoder_sparse_step == 0
        assert isinstance(layer.ffn, ExpertsSpec if sparse else MlpSpec)
        if isinstance(layer.ffn, ExpertsSpec):
            assert layer.ffn == ExpertsSpec(
                theirs.hidden_size,
                theirs.moe_intermediate_size,
                theirs.num_experts,
                theirs.num_experts_per_tok,
                theirs.norm_topk_prob,
            )
        else:
            assert layer.ffn.intermediate_size == theirs.intermediate_size


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"num_experts": 4, "num_experts_per_tok": 5}, "num_experts_per_tok: expected at most num_experts, 4, got 5"),
        ({"num_experts": 4, "num_local_experts": 8}, "num_experts is 4 and num_local_experts is 8"),
        ({"num_experts": 0}, "num_experts: expected a positive integer, got 0"),
        ({"mlp_only_layers": [8]}, r"mlp_only_layers: expected numbers of layers, from 0 to 7, got \[8\]"),
        ({"mlp_only_layers": 3}, "mlp_only_layers: expected numbers of layers, from 0 to 7, got 3"),
        ({"moe_intermediate_size": "48"}, "moe_intermediate_size: expected a positive integer, got '48'"),
        ({"norm_topk_prob": 1}, "norm_topk_prob: expected true or false, got 1"),
        ({"hidden_act": "gelu"}, "hidden_act: expected 'silu', got 'gelu'"),
    ],
)
def test_what_is_refused(config: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"config\.json: {said}"):
        read_spec(write(tmp_path, **MOE, **config))


def test_num_local_experts_is_another_name(tmp_path: Path) -> None:
    ffn = read_spec(write(tmp_path, **MOE, num_local_experts=12)).layers[0].ffn
    assert isinstance(ffn, ExpertsSpec)
    assert ffn.num_experts == 12


def block(normalised: bool) -> tuple[Qwen3MoeSparseMoeBlock, ExpertsSpec, dict[str, Tensor]]:
    """transformers' own, and its weights as a layer has them."""
    from transformers import Qwen3MoeConfig

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=24, moe_intermediate_size=20, num_experts=6, num_experts_per_tok=3, norm_topk_prob=normalised
    )
    config._experts_implementation = "eager"
    theirs = Qwen3MoeSparseMoeBlock(config)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    tensors = {"mlp.gate.weight": theirs.gate.weight}
    for expert in range(6):
        gate, up = theirs.experts.gate_up_proj[expert].chunk(2)
        parts = {"gate_proj": gate, "up_proj": up, "down_proj": theirs.experts.down_proj[expert]}
        tensors |= {f"mlp.experts.{expert}.{name}.weight": weight for name, weight in parts.items()}
    return theirs, ExpertsSpec(24, 20, 6, 3, normalised), tensors


@torch.inference_mode()
@pytest.mark.parametrize("normalised", [False, True], ids=["as-they-are", "normalised"])
def test_both_ways_to_call_it_equal_transformers(normalised: bool) -> None:
    theirs, spec, tensors = block(normalised)
    experts, x = spec.part(tensors, "cpu"), torch.randn(11, 24)
    scratch = Scratch(torch.full((11, 24), torch.nan), torch.empty(0), torch.full((11 * spec.scratch,), torch.nan))
    expected = theirs(x[None])[0]
    torch.testing.assert_close(experts(x, scratch), expected, rtol=1e-4, atol=1e-5)
    total = torch.ones(11, 24)
    experts.add(x, total, scratch)
    torch.testing.assert_close(total, 1 + expected, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_a_row_of_nan_spoils_no_other() -> None:
    _, spec, tensors = block(True)
    experts, x = spec.part(tensors, "cpu"), torch.randn(7, 24)
    scratch = Scratch(torch.empty(7, 24), torch.empty(0), torch.empty(7 * spec.scratch))
    clean = experts(x, scratch).clone()
    x[3] = torch.nan
    spoilt = experts(x, scratch)
    assert spoilt[3].isnan().all()
    others = [0, 1, 2, 4, 5, 6]
    assert torch.equal(spoilt[others], clean[others])
