"""A small model that transformers saved: as one file, in shards, and copies of both to be damaged."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import transformers
from support.model_folders import SINGLE


@pytest.fixture(scope="module")
def model() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=199,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    return transformers.LlamaForCausalLM(config).to(torch.bfloat16)


@pytest.fixture(scope="module")
def saved(model: transformers.PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The model in one file and in shards."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in ("single", "sharded")}
    model.save_pretrained(folders["single"])
    model.save_pretrained(folders["sharded"], max_shard_size="20KB")
    assert (folders["single"] / SINGLE).is_file()
    assert len(list(folders["sharded"].glob("*.safetensors"))) >= 3
    return folders


@pytest.fixture
def single(saved: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the one-file model, to be damaged."""
    return Path(shutil.copytree(saved["single"], tmp_path / "single"))


@pytest.fixture
def sharded(saved: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the sharded model, to be damaged."""
    return Path(shutil.copytree(saved["sharded"], tmp_path / "sharded"))


@pytest.fixture
def shapes(model: transformers.PreTrainedModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
