"""Tokens outside the vocabulary of tokenizer.json, and outside the model's embedding, scored and refused in runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from support.checkpoints import CONFIGS, make_model
from support.command import manifest, rejects
from support.scoring import records, score
from support.toy import TOLERANCE, Row, Toy, write_rows
from transformers import AutoTokenizer

import psykern

TURN = "<|turn|>"
VOCABULARY = 391  # tokens of the toy's tokenizer.json, so TURN gets this id


@pytest.fixture(scope="module")
def folder(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy model with a token that stands in tokenizer_config.json alone."""
    folder = shutil.copytree(toy.model, tmp_path_factory.mktemp("outside") / "model")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "extra_special_tokens": [TURN]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def rows(toy: Toy) -> list[Row]:
    """The second has TURN in what is read, the third in an option alone, the fourth behind the last response."""
    text = "You press <<J>>. You win."
    with_turn = text.replace("press", TURN)
    first: Row = {"participant": "1", "text": text, "options": ["J", "F"]}
    second: Row = {"participant": "2", "text": with_turn, "options": ["J", "F"]}
    third: Row = {"participant": "3", "text": text, "options": ["J", f"F{TURN}"]}
    fourth: Row = {"participant": "4", "text": text + TURN, "options": ["J", "F"]}
    return [first, second, third, fourth]


def test_a_token_outside_tokenizer_json_is_scored_as_transformers_does(
    toy: Toy, folder: Path, rows: list[Row], tmp_path: Path
) -> None:
    theirs = AutoTokenizer.from_pretrained(folder)
    run = score(folder, write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "run")
    every = {of[0]["participant"]: of[0] for of in records(run)}
    for participant, text in (("1", rows[0]["text"]), ("2", rows[1]["text"])):
        encoding = theirs(text, return_offsets_mapping=True)
        assert (VOCABULARY in encoding.input_ids) == (participant == "2")
        place = next(i for i, (start, _) in enumerate(encoding.offset_mapping) if text[start:].startswith("J>>"))
        with torch.inference_mode():
            logits = toy.oracle.model(torch.tensor([encoding.input_ids])).logits[0, place - 1]
        expected = logits.double().log_softmax(-1)[encoding.input_ids[place]].item()
        assert every[participant]["logprob"] == pytest.approx(expected, abs=TOLERANCE)
    # The option's own tokens are scored, TURN among them.
    assert every["3"]["option_logprobs"][1] < every["1"]["option_logprobs"][1] - 1


def test_a_token_without_a_row_in_the_embedding_costs_its_row_alone(
    folder: Path, rows: list[Row], tmp_path: Path
) -> None:
    """The tokenizer has one token more than the embedding has rows. Both models share a cache of tokens."""
    small = shutil.copytree(folder, tmp_path / "small")
    make_model(small, **(CONFIGS["qwen3"] | {"vocab_size": VOCABULARY}))
    data = write_rows(tmp_path / "rows.jsonl", rows)
    cache = tmp_path / "cache"
    settings = psykern.Settings(device="cpu")
    large_first = psykern.score(folder, data, tmp_path / "large", settings, cache=cache)
    run = psykern.score(small, data, tmp_path / "run", settings, cache=cache)
    again = psykern.score(small, data, tmp_path / "again", settings, cache=cache)
    assert large_first.manifest.counts.rejects == 0
    assert manifest(tmp_path / "large")["beyond_embedding"] is None
    assert manifest(tmp_path / "run")["beyond_embedding"] == VOCABULARY
    assert [of[0]["participant"] for of in records(run)] == ["1", "4"]
    assert records(again) == records(run)
    for name in ("run", "again"):
        refused = rejects(tmp_path / name)
        assert [reject["line"] for reject in refused] == [2, 3]
        message = "token 391 ('<|turn|>') is not among the 391 rows of the model's embedding"
        assert {reject["reason"] for reject in refused} == {message}
