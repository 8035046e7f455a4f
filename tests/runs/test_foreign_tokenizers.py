"""Whole runs of models that transformers computes, with the tokenizers that they come with: every record against the
library's own tokenizer and its own forward in fp64."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.exactness import TOLERANCE
from support.foreign_folders import FOLDERS, ROWS
from support.scoring import records
from support.tiny import encode, transcript
from support.toy import Row, responses, write_rows
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

import psykern
from psykern import Scorer, Settings


class Library:
    """Transformers' own answer."""

    def __init__(self, model: PreTrainedModel, folder: Path) -> None:
        self.model = copy.deepcopy(model).double()
        whole = (folder / "tokenizer.json").is_file()  # which is taken as it stands, whatever a class makes of it
        self.tokenizer: Any = (PreTrainedTokenizerFast if whole else AutoTokenizer).from_pretrained(folder)

    def joint(self, text: str, span: tuple[int, int]) -> tuple[list[int], list[int]]:
        """Tokens of ``text``, and the places of those that overlap the characters of ``span``."""
        found = self.tokenizer(text, return_offsets_mapping=True)
        a, b = span
        return found.input_ids, [i for i, (s, e) in enumerate(found.offset_mapping) if s < b and e > a and e > s]

    @torch.inference_mode()
    def logprob(self, ids: Sequence[int], places: Sequence[int]) -> float | None:
        """None: a place is the first of all, or there is none."""
        if not places or places[0] == 0:
            return None
        table = self.model(torch.tensor([list(ids)])).logits[0].double().log_softmax(-1)
        return sum(table[place - 1, ids[place]].item() for place in places)


@pytest.fixture(params=FOLDERS, scope="module")
def loaded(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Scorer, Library]]:
    folder = tmp_path_factory.mktemp("folder")
    library = Library(FOLDERS[request.param].make(folder), folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", psykern.NoSharingWarning)
        scorer = psykern.load(folder, device="cpu", implementation="transformers")
    with scorer:
        yield scorer, library


def run_of(scorer: Scorer, folder: Path, **settings: Any) -> list[list[Row]]:
    run = psykern.score(scorer, write_rows(folder / "rows.jsonl", ROWS), folder / "run", Settings(**settings))
    assert run.manifest.counts.rejects == 0 and run.manifest.implementation.startswith("transformers: ")
    return records(run)


def test_joint(loaded: tuple[Scorer, Library], tmp_path: Path) -> None:
    scorer, theirs = loaded
    scored = 0
    for row, own in zip(ROWS, run_of(scorer, tmp_path), strict=True):
        for record, match in zip(own, responses(row["text"]), strict=True):
            ids, places = theirs.joint(row["text"], match.span(1))
            assert record["num_tokens"] == (0 if places[0] == 0 else len(places))  # before the first there is none
            assert_close(record["logprob"], theirs.logprob(ids, places), len(places))
            scored += check_options(record, row, match.span(1), theirs)
    assert scored >= 10


def check_options(record: Row, row: Row, span: tuple[int, int], theirs: Library) -> int:
    """Each option in the response's place, where no option begins another; how many were compared."""
    options = row["options"][record["response_index"]]
    own = [theirs.tokenizer(option, add_special_tokens=False).input_ids for option in options]
    if any(one != two and two[: len(one)] == one for one in own for two in own):
        return 0
    for option, logprob in zip(options, record["option_logprobs"] or [None] * len(options), strict=True):
        text = row["text"][: span[0]] + option + row["text"][span[1] :]
        ids, places = theirs.joint(text, (span[0], span[0] + len(option)))
        assert_close(logprob, theirs.logprob(ids, places), len(places))
    return len(options)


@pytest.mark.parametrize("settings", [{"boundary": "split"}, {"marks": "drop"}], ids=["split", "without marks"])
def test_pieces(loaded: tuple[Scorer, Library], settings: dict[str, Any], tmp_path: Path) -> None:
    """``tests/data`` compares the tokens of these with the library's."""
    scorer, theirs = loaded
    for row, own in zip(ROWS, run_of(scorer, tmp_path, **settings), strict=True):
        encoded = encode(scorer.language.tokenizer, transcript(row["text"]), **settings)
        for record, (a, b) in zip(own, encoded.spans_tok.tolist(), strict=True):
            assert record["num_tokens"] == b - a
            assert_close(record["logprob"], theirs.logprob(encoded.token_ids.tolist(), list(range(a, b))), b - a)


def assert_close(got: float | None, expected: float | None, tokens: int) -> None:
    assert (got is None) == (expected is None)
    if got is not None:
        assert got == pytest.approx(expected, rel=0, abs=TOLERANCE * tokens**0.5)


def test_gpt2s_first_token_is_that_of_its_config(tmp_path: Path) -> None:
    """Its tokenizer's files name no special token; transformers knows it by the class."""
    model = FOLDERS["gpt2"].make(tmp_path)
    library = Library(model, tmp_path)
    bos = library.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert library.tokenizer.bos_token_id is None
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"bos_token_id": bos}))
    with psykern.load(tmp_path, device="cpu", implementation="transformers") as scorer:
        answer = scorer.surprisal("You press", first="bos")
    ids = library.tokenizer("You press").input_ids
    expected = [library.logprob([bos, *ids], [place]) for place in range(1, len(ids) + 1)]
    assert (-answer.token_surprisal).tolist() == pytest.approx(expected, rel=0, abs=TOLERANCE)
