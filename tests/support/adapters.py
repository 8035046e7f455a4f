"""Random adapters, made, saved and merged by ``peft``: the outside oracle of the tests."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

WEIGHTS = "adapter_model.safetensors"


def make_adapter(folder: Path, base: PreTrainedModel, seed: int = 0, **config: Any) -> PreTrainedModel:
    """Save a random adapter of ``base``, which is used up, to ``folder``; gives peft's own merged model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about embeddings and tied heads
        model = peft.get_peft_model(base, peft.LoraConfig(**config))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:  # not as it began, when B is zero and a saved module is the base's
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        model.save_pretrained(folder)
        merged: PreTrainedModel = model.merge_and_unload()
    return merged.eval()


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)
