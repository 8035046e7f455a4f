"""A model's parts: embedding, layers, head, and weights that do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import CONFIGS, make_model
from transformers import PreTrainedModel

from psykern.core.errors import CheckpointError
from psykern.kernels.compute import Compute
from psykern.models.model import Model


@pytest.mark.parametrize(
    ("stored", "dtype", "expected"),
    [
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.bfloat16),  # as it is: widened tile by tile, without loss
    ],
    ids=["fp32-in-bf16", "bf16-in-bf16", "bf16-in-fp32"],
)
def test_the_head_of_a_device_is_in_half_precision_where_its_rows_are(
    stored: torch.dtype, dtype: torch.dtype, expected: torch.dtype, tmp_path: Path
) -> None:
    make_model(tmp_path, dtype=stored, **CONFIGS["llama"])
    model = Model(tmp_path, Compute(torch.device("cpu"), dtype, "cpu"))
    assert model.head().dtype == stored
    model.compute = Compute(torch.device("meta"), dtype, "cpu")
    assert model.head().dtype == expected


def opened(folder: Path, dtype: torch.dtype = torch.float32, **config: Any) -> tuple[Model, PreTrainedModel]:
    """A model and its oracle in fp32; ``dtype`` is that of the saved weights."""
    oracle = make_model(folder, dtype=dtype, **config)
    return Model(folder, Compute.resolve("cpu")), oracle


def test_a_tied_head_is_the_embedding(tmp_path: Path) -> None:
    model, oracle = opened(tmp_path, **CONFIGS["qwen3"])
    assert torch.equal(model.head(), oracle.model.embed_tokens.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_weights_are_as_the_file_has_them(dtype: torch.dtype, tmp_path: Path) -> None:
    model, oracle = opened(tmp_path, dtype, **CONFIGS["llama"])
    ids = torch.tensor([3, 319, 3, 0], dtype=torch.int32)
    assert torch.equal(model.embed(ids), oracle.model.embed_tokens.weight[ids.long()])
    assert {t.dtype for t in model.tensors(0).values()} == {dtype}
    assert model.head().dtype == dtype
    assert torch.equal(model.head().float(), oracle.lm_head.weight)
    hidden = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model.final_norm(hidden), oracle.model.norm(hidden), rtol=1e-6, atol=1e-6)


def test_each_layer_has_its_own_weights(tmp_path: Path) -> None:
    model, oracle = opened(tmp_path, **CONFIGS["olmo3"])
    for i in range(model.num_layers):
        theirs = oracle.model.layers[i].state_dict()
        mine = model.tensors(i)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_weights_that_do_not_fit_the_config_are_refused(tmp_path: Path) -> None:
    make_model(tmp_path, **CONFIGS["llama"])
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 95, "num_hidden_layers": 2}))
    with pytest.raises(CheckpointError) as error:
        Model(tmp_path, Compute.resolve("cpu"))
    assert "model.layers.2.mlp.up_proj.weight" in str(error.value)
    assert "model.layers.0.mlp.gate_proj.weight (expected [95, 64], got [96, 64])" in str(error.value)


def test_tensors_that_are_not_finite_are_found_by_layer(tmp_path: Path) -> None:
    oracle = make_model(tmp_path, **CONFIGS["llama"])
    with torch.no_grad():
        oracle.model.layers[1].mlp.up_proj.weight[3, 4] = torch.inf
        oracle.model.norm.weight[0] = torch.nan
    oracle.save_pretrained(tmp_path)
    model = Model(tmp_path, Compute.resolve("cpu"))
    found = [model.non_finite_tensors(layer) for layer in (-1, 0, 1, 2)]
    assert found == [["model.norm.weight"], [], ["model.layers.1.mlp.up_proj.weight"], []]
