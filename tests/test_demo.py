"""The demo's assets: small, unseen, consistent, loadable without psykern, and better than guessing."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from psykern.demo import MODEL, POSTTRAINED, SAMPLE, build_posttrained
from psykern.demo.posttrain import CHANGED
from psykern.demo.train import RESPONSE, STUDIES, Study, encode, losses, per_response, read, split, with_options

MAX_BYTES = 6 * 10**6
SHIPPED = [study for study in STUDIES if study.in_sample]
CLOSED = [study for study in SHIPPED if study.name != "guenther2024substitutions"]


def rows(study: Study) -> list[dict[str, Any]]:
    """The sample's rows of a study."""
    with gzip.open(SAMPLE / f"{study.name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def options(row: dict[str, Any]) -> list[list[str]]:
    """The options of each response of a row."""
    return per_response(row.get("options"), len(RESPONSE.findall(row["text"])))


@pytest.fixture(scope="module")
def model() -> transformers.Qwen3ForCausalLM:
    return transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    return transformers.AutoTokenizer.from_pretrained(MODEL)


def test_size() -> None:
    files = [path for folder in (SAMPLE, MODEL) for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in (*files, POSTTRAINED)) <= MAX_BYTES


def test_posttrained_model_differs_in_its_last_layer_alone(
    tmp_path: Path, model: transformers.Qwen3ForCausalLM
) -> None:
    folder = build_posttrained(tmp_path / "posttrained")
    second = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    first = model.state_dict()
    assert first.keys() == second.keys()
    differing = {name for name in first if not torch.equal(first[name], second[name])}
    assert differing == {name for name in first if name.startswith(CHANGED)} != set()
    assert (folder / "tokenizer.json").read_bytes() == (MODEL / "tokenizer.json").read_bytes()


def test_every_study_has_a_file_and_an_attribution() -> None:
    names = {study.name for study in SHIPPED}
    assert {path.name.removesuffix(".jsonl.gz") for path in SAMPLE.glob("*.jsonl.gz")} == names
    attribution = (SAMPLE / "ATTRIBUTION.md").read_text()
    assert [name for name in names | {"Apache License 2.0", "Binz et al. (2026)"} if name not in attribution] == []


@pytest.mark.parametrize("study", SHIPPED, ids=lambda study: study.name)
def test_sample_is_unseen(study: Study, shared: Path) -> None:
    sample, training = split(read(shared / "psych", study), study.num_held_out)
    stored = gzip.decompress((SAMPLE / f"{study.name}.jsonl.gz").read_bytes()).splitlines()
    assert stored == [with_options(row, study) for row in sample]
    assert not {row["text"] for row in rows(study)} & {row.text for row in training}
    assert not {row.key for row in sample} & {row.key for row in training}
    assert all(line.startswith(row.line.rstrip()[:-1]) for line, row in zip(stored, sample, strict=True))


@pytest.mark.parametrize("study", CLOSED, ids=lambda study: study.name)
def test_every_response_is_among_its_options(study: Study) -> None:
    for row in rows(study):
        responses = RESPONSE.findall(row["text"])
        assert len(responses) == len(options(row)) > 0
        for response, choices in zip(responses, options(row), strict=True):
            assert response in choices
            assert len(set(choices)) == len(choices) >= 2


def test_marks_are_tokens(tokenizer: transformers.PreTrainedTokenizerFast) -> None:
    assert tokenizer.tokenize("You chose <<B>>.\n") == ["You", "Ġchose", "Ġ<<", "B", ">>", ".Ċ"]
    assert len(tokenizer(" <<").input_ids) == len(tokenizer(">>").input_ids) == 1


def test_tokenizer_is_lossless_and_fits_the_model(
    tokenizer: transformers.PreTrainedTokenizerFast, model: transformers.Qwen3ForCausalLM
) -> None:
    assert len(tokenizer) == model.config.vocab_size
    for study in SHIPPED:
        for row in rows(study):
            token_ids = tokenizer(row["text"]).input_ids
            assert tokenizer.decode(token_ids) == row["text"]
            assert len(token_ids) <= model.config.max_position_embeddings


@pytest.mark.parametrize("study", CLOSED, ids=lambda study: study.name)
def test_beats_uniform_guessing(
    study: Study, tokenizer: transformers.PreTrainedTokenizerFast, model: transformers.Qwen3ForCausalLM
) -> None:
    scored = rows(study)
    with torch.no_grad():
        nll = [losses(model, [encode(tokenizer.backend_tokenizer, row["text"])])[1] for row in scored]
    uniform = [math.log(len(choices)) for row in scored for choices in options(row)]
    assert len(torch.cat(nll)) == len(uniform)  # one token each
    assert torch.cat(nll).mean().item() < sum(uniform) / len(uniform)
