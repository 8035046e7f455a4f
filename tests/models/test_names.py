"""Checkpoints whose names are behind a wrapper's or a bare decoder's prefix."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.checkpoints import CONFIGS, make_model
from support.model_folders import EMBEDDING, INDEX, SINGLE

from psykern.core.errors import CheckpointError
from psykern.kernels.compute import Compute
from psykern.models.checkpoint import hash_model
from psykern.models.model import Model

HEAD, NORM = "lm_head.weight", "model.layers.1.input_layernorm.weight"


def bare(name: str) -> str:
    return name.removeprefix("model.")


SPELLINGS = {
    "as-transformers": "{}",
    "compiled": "_orig_mod.{}",
    "parallel": "module.{}",
    "parallel-of-compiled": "module._orig_mod.{}",
    "compiled-of-parallel": "_orig_mod.module.{}",
}
each_spelling = pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS)
each_decoder = pytest.mark.parametrize("is_bare", [False, True], ids=["with-head", "bare-decoder"])


def spell(folder: Path, spelling: str, is_bare: bool) -> None:
    """Names the tensors of the folder's files and index anew."""

    def name(old: str) -> str:
        return spelling.format(bare(old) if is_bare else old)

    for path in folder.glob("*.safetensors"):
        save_file({name(old): tensor for old, tensor in load_file(path).items()}, path)
    if (folder / INDEX).exists():
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"] = {name(old): place for old, place in index["weight_map"].items()}
        (folder / INDEX).write_text(json.dumps(index))


@each_spelling
@each_decoder
@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_every_tensor_is_found(
    kind: str, is_bare: bool, spelling: str, saved: dict[str, Path], tmp_path: Path, model: transformers.PreTrainedModel
) -> None:
    folder = Path(shutil.copytree(saved[kind], tmp_path / kind))
    spell(folder, spelling, is_bare)
    ours = Model(folder, Compute.resolve("cpu", "float32"))
    state = {name: tensor.float() for name, tensor in model.state_dict().items()}
    for i in range(3):
        for name, tensor in ours.tensors(i).items():
            assert torch.equal(tensor.float(), state[f"model.layers.{i}.{name}"]), name
    assert torch.equal(ours.head().float(), state[HEAD])
    assert torch.equal(ours.embed(torch.arange(199)), state[EMBEDDING])


def test_a_decoder_that_transformers_saved_without_its_head(tmp_path: Path) -> None:
    """A tied head is the embedding, which is there."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = transformers.Qwen2Config(**sizes, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True)
    whole = transformers.Qwen2ForCausalLM(config)
    whole.model.save_pretrained(tmp_path)
    assert "layers.0.self_attn.q_proj.weight" in load_file(tmp_path / SINGLE)
    assert torch.equal(Model(tmp_path, Compute.resolve("cpu")).head(), whole.lm_head.weight)


@each_spelling
def test_a_tied_embedding_that_is_stored_as_the_head(spelling: str, tmp_path: Path) -> None:
    """Of two tensors that are one, safetensors' ``save_model`` keeps the first in the alphabet; transformers ties the
    other to it. Errors have the file's name."""
    make_model(tmp_path, **CONFIGS["qwen2"])
    whole = load_file(tmp_path / SINGLE)
    assert HEAD not in whole
    tensors = {spelling.format(HEAD if name == EMBEDDING else name): tensor for name, tensor in whole.items()}
    save_file(tensors, tmp_path / SINGLE)
    model, ids = Model(tmp_path, Compute.resolve("cpu")), torch.tensor([0, 3])
    assert torch.equal(model.head(), whole[EMBEDDING])
    assert torch.equal(model.embed(ids), whole[EMBEDDING][ids])
    tensors[spelling.format(HEAD)] = torch.zeros(3, 4)
    save_file(tensors, tmp_path / SINGLE)
    assert f"wrongly shaped tensors: {spelling.format(HEAD)} (expected [320, 64], got [3, 4])" in refusal(tmp_path)


def test_the_hash_is_of_the_bytes(single: Path) -> None:
    before = hash_model(single)
    spell(single, "module.{}", False)
    assert hash_model(single) != before


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        Model(folder, Compute.resolve("cpu"))
    return str(error.value)


@each_decoder
@each_spelling
def test_errors_have_the_names_of_the_file(spelling: str, is_bare: bool, single: Path) -> None:
    spell(single, spelling, is_bare)
    tensors = load_file(single / SINGLE)
    missing, misshaped, bad = (
        spelling.format(bare(name) if is_bare else name) for name in (NORM, HEAD, "model.norm.weight")
    )
    del tensors[missing]
    tensors[misshaped] = torch.zeros(3, 4)
    tensors[spelling.format("visual.a")] = torch.zeros(1)
    tensors[bad] = tensors[bad].double()
    save_file(tensors, single / SINGLE)
    assert refusal(single) == (
        f"{single}: weights do not fit the config: float64 weights are not supported, expected float32, bfloat16 or "
        f"float16; convert them, as model.to(torch.float32) does: {bad} is torch.float64; missing tensors: {missing}; "
        f"unused tensors: {spelling.format('visual.a')}; "
        f"wrongly shaped tensors: {misshaped} (expected [199, 32], got [3, 4])"
    )


@pytest.mark.parametrize("copy", ["norm.weight", "module.model.norm.weight", "_orig_mod.norm.weight"])
def test_one_tensor_under_two_names(copy: str, single: Path) -> None:
    tensors = load_file(single / SINGLE)
    save_file(tensors | {copy: tensors["model.norm.weight"].clone()}, single / SINGLE)
    one, two = sorted([copy, "model.norm.weight"])
    assert f"{single}: {one} and {two} are one tensor, model.norm.weight: expected it once" in refusal(single)


@pytest.mark.parametrize("other", ["layers.1.input_layernorm.weight", f"module.{NORM}", f"_orig_mod.{bare(NORM)}"])
def test_tensors_named_in_two_ways(other: str, single: Path) -> None:
    tensors = load_file(single / SINGLE)
    tensors[other] = tensors.pop(NORM)
    save_file(tensors, single / SINGLE)
    found = re.fullmatch(
        rf"{re.escape(str(single))}: (.+) and (.+) are named in two ways: expected one for all tensors", refusal(single)
    )
    assert found and other in found.groups() and len(set(found.groups())) == 2
