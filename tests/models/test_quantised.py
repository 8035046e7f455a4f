"""Quantised weights against packers written from the formats' specifications, and their models against transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import quantised
from support.checkpoints import make_model, oracle_logprobs
from support.groups import random_group, wanted
from support.model_folders import SINGLE
from support.quantised import quantise
from support.quantised_cases import CASES, DOWN, SIZES, UP, config, stored
from torch import Tensor
from transformers import PreTrainedModel

from psykern.core.errors import CheckpointError
from psykern.core.types import EncodedTranscript
from psykern.engine.engine import Engine
from psykern.engine.plan import plan
from psykern.kernels.compute import Compute
from psykern.models.checkpoint import hash_model
from psykern.models.families import read_spec
from psykern.models.model import Model
from psykern.models.quantisation import blocks
from psykern.models.quantisation.bitsandbytes import FourBits, Int8
from psykern.models.quantisation.compressed import Packed, Sharing
from psykern.models.quantisation.config import read_scheme
from psykern.models.weights import open_weights


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    folder = tmp_path_factory.mktemp("base")
    return folder, make_model(folder, **SIZES)


@pytest.fixture(scope="module")
def group() -> list[EncodedTranscript]:
    return random_group(np.random.default_rng(3), 1, 320, 1)


@pytest.fixture
def folder(base: tuple[Path, PreTrainedModel], tmp_path: Path) -> Path:
    """A copy, to be quantised."""
    return Path(shutil.copytree(base[0], tmp_path / "model"))


def logprobs(folder: Path, group: Sequence[EncodedTranscript], **how: Any) -> np.ndarray:
    compute = Compute.resolve("cpu", backend=how.pop("backend", "auto"))
    planned = plan(group, wave_tokens=128, batch_tokens=64, min_share=4)
    return Engine(Model(folder, compute, **how)).run(planned).logprob


def oracle(model: PreTrainedModel, meant: dict[str, Tensor], group: Sequence[EncodedTranscript]) -> np.ndarray:
    """transformers' scores with the dequantised weights as plain floats."""
    model.load_state_dict(meant)
    contexts = wanted(group)
    tables = {context: oracle_logprobs(model, np.array(context))[-1] for context in {tuple(c) for c, _ in contexts}}
    return np.array([tables[tuple(context)][token] for context, token in contexts])


@pytest.mark.parametrize("name", CASES)
def test_tensors_and_scores(
    name: str,
    folder: Path,
    base: tuple[Path, PreTrainedModel],
    group: list[EncodedTranscript],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(blocks, "_CHUNK", 1500)  # several chunks of each weight
    case = CASES[name]
    meant = quantise(folder, case.quantiser, case.config, case.also)
    source = open_weights(folder, read_spec(folder))
    assert set(source.names) == set(meant)
    for own, numbers in meant.items():
        assert source.shape(own) == numbers.shape and source.dtype(own) == torch.float32
        assert source.tensor(own).is_contiguous() and torch.equal(source.tensor(own), numbers), own
    changed = {own for own in meant if own.endswith("_proj.weight")} | set(case.also)
    assert {own for own in meant if not source.is_mapped(own)} == changed
    assert source.changes == (f"{case.label}; {len(changed)} tensors dequantised",)
    stored = load_file(folder / SINGLE)
    assert sum(map(source.stored_bytes, source.names)) == sum(t.nbytes for t in stored.values())
    expected = oracle(base[1], meant, group)
    for how in ({}, {"num_slots": 2}, {"backend": "reference"}) if case.also else ({},):
        assert np.abs(logprobs(folder, group, **how) - expected).max() <= 1e-4


def names(folder: Path) -> dict[str, Tensor]:
    source = open_weights(folder, read_spec(folder))
    return {name: source.tensor(name) for name in source.names}


def assert_equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_parts_are_known_under_a_wrapper_s_and_a_bare_decoder_s_names(folder: Path) -> None:
    meant = quantise(folder, CASES["nf4-double"].quantiser, CASES["nf4-double"].config)

    def rename(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors["_orig_mod." + name.removeprefix("model.")] = tensors.pop(name)

    assert_equal(names(stored(folder, rename)), meant)


def test_gptq_s_zero_biases_are_passed_over_and_others_are_not(folder: Path) -> None:
    meant = quantise(folder, CASES["gptq-4"].quantiser, CASES["gptq-4"].config)
    biases = {f"{UP}bias": torch.zeros(96), f"{DOWN}bias": torch.zeros(32)}
    stored(folder, lambda tensors: tensors.update(biases))
    source = open_weights(folder, read_spec(folder))
    assert all(torch.equal(source.tensor(name), meant[name]) for name in meant)
    biases[f"{DOWN}bias"][3] = 1
    stored(folder, lambda tensors: tensors.update(biases))
    with pytest.raises(CheckpointError, match=rf"unused tensors: {DOWN}bias$"):
        open_weights(folder, read_spec(folder))


@pytest.mark.parametrize(
    ("name", "file", "renamed"),
    [
        ("gptq-4-order", "quantize_config.json", {}),
        ("awq", "quant_config.json", {"bits": "w_bit", "group_size": "q_group_size"}),
    ],
)
def test_files_that_early_versions_wrote_beside_the_config(
    name: str, file: str, renamed: dict[str, str], folder: Path
) -> None:
    meant = quantise(folder, CASES[name].quantiser, CASES[name].config)
    config(folder, lambda said: said.pop("quantization_config"))
    before = hash_model(folder)
    early = {renamed.get(k, k): v for k, v in CASES[name].config.items() if k not in ("quant_method", "version")}
    (folder / file).write_text(json.dumps(early))
    assert_equal(names(folder), meant)
    assert hash_model(folder) != before


def test_a_file_of_early_versions_beside_plain_weights_says_nothing(
    base: tuple[Path, PreTrainedModel], folder: Path
) -> None:
    (folder / "quantize_config.json").write_text('{"bits": 4, "group_size": 128}')
    assert open_weights(folder, read_spec(folder)).changes == ()
    config(folder, lambda said: said.update(quantization_config={"quant_method": "gptq", "bits": 4}))
    with pytest.raises(
        CheckpointError, match=r"config\.json: quantization_config: expected quantised weights, got none"
    ):
        open_weights(folder, read_spec(folder))


def test_the_config_of_a_nested_text_model(folder: Path) -> None:
    quantise(folder, CASES["int8"].quantiser, CASES["int8"].config)
    config(folder, lambda said: said.update(text_config={"quantization_config": said.pop("quantization_config")}))
    assert read_scheme(folder) == (Int8(), True)


def test_shapes_that_fill_no_byte_word_or_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_CHUNK", 1)
    generator = np.random.default_rng(4)
    odd = generator.standard_normal((3, 5)).astype(np.float32)
    parts, meant = quantised.bitsandbytes_4bit(odd, "nf4", double=True, block=4)
    for storage in (torch.uint8, torch.bfloat16):  # as bnb_4bit_quant_storage has it
        parts["weight"] = parts["weight"].flatten().view(storage)
        assert list(FourBits("nf4").problems(parts, (3, 5))) == []
        assert torch.equal(FourBits("nf4").weight(parts), torch.from_numpy(meant))
    wide = generator.standard_normal((11, 45)).astype(np.float32)
    parts, meant = quantised.pack_quantized(wide, 4, group=9, symmetric=False)
    scheme = Packed(4, Sharing("group", (1, 9)), is_symmetric=False, has_order=False)
    assert list(scheme.problems(parts, (11, 45))) == []
    assert torch.equal(scheme.weight(parts), torch.from_numpy(meant))
    parts["weight_g_idx"] = torch.full((45,), -1, dtype=torch.int32)  # no order
    assert torch.equal(scheme.weight(parts), torch.from_numpy(meant))
