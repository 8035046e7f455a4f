"""``marks="drop"``: the model reads a transcript without ``<<`` and ``>>``, and its responses are where they were."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.marks import assert_without_marks
from support.scoring import records, score
from support.toy import Toy, by_transcript

import psykern
from psykern import Settings
from psykern.core.clock import Clock
from psykern.data.dataset import Dataset
from psykern.runs.job import Options
from psykern.runs.manifest import identity, tokens_depend_on
from psykern.runs.run import score_with

DROP = Settings(device="cpu", marks="drop")


@pytest.fixture(scope="module")
def scorer(toy: Toy) -> psykern.Scorer:
    return psykern.load(toy.model, device="cpu")


@pytest.mark.parametrize("boundary", ["joint", "split"])
def test_records_are_those_of_the_text_without_marks(boundary: Any, toy: Toy, tmp_path: Path) -> None:
    got = records(score(toy.model, toy.data, tmp_path, marks="drop", boundary=boundary))
    assert len(got) == len(toy.rows)
    compared = [assert_without_marks(toy.oracle, row, own, boundary) for row, own in zip(toy.rows, got, strict=True)]
    assert sum(compared) > 60
    flags = {flag for own in got for record in own for flag in (record["flag"] or "").split(";")}
    assert flags >= {"closing_mark", "empty"} and ("straddles" in flags) == (boundary == "joint")


def test_responses_that_touch_and_stand_at_the_ends(toy: Toy, scorer: psykern.Scorer) -> None:
    """What tells ``1`` from ``10`` is then the next response, or nothing: such options are refused."""
    texts = ["<<1>><<10>><<>><<2>>", "<<1>><<1>>.", "é<<1>>", "<<>>", "<<1>>", "2<<>>3"]
    rows = [{"text": text, "options": ["1", "2", "-7"]} for text in texts]
    for boundary in ("joint", "split"):
        table = scorer.score(rows, replace(DROP, boundary=boundary))
        got = {records[0]["participant"]: records for records in by_transcript(table)}
        for i, row in enumerate(rows):
            assert_without_marks(toy.oracle, row, got[f"row:{i}"], boundary)


@pytest.mark.parametrize("boundary", ["joint", "split"])
def test_what_tells_an_option_from_one_that_it_begins(boundary: Any, toy: Toy, scorer: psykern.Scorer) -> None:
    options = ["1", "10"]
    texts = ["I say <<1>>. More", "I say <<1>>", "I say <<1>>0 or so", "<<1>><<10>> and <<1>>\n"]
    rejects: list[psykern.Reject] = []
    rows = [{"text": text, "options": options} for text in texts]
    table = scorer.score(rows, replace(DROP, boundary=boundary), rejects=rejects)
    refused = [
        (reject.index, "what stands behind the response does not tell them apart" in reject.reason
         or "encode to the same tokens" in reject.reason)
        for reject in rejects
    ]  # fmt: skip
    assert refused[0] == (1, True) and all(told for _, told in refused)
    assert {"row:0", "row:3"} <= set(table["participant"].to_pylist())
    for own in by_transcript(table):
        row = rows[int(own[0]["participant"].removeprefix("row:"))]
        assert assert_without_marks(toy.oracle, row, own, boundary) == len(own)
        assert all("closing_mark" in record["flag"] for record in own)


def test_discrete_and_persona(talking: Toy, tmp_path: Path) -> None:
    """Responses that are not scored lose their marks anyway; an interview stands in front of a text without marks."""
    run = score(talking.model, talking.data, tmp_path / "one", marks="drop", discrete="[A-Z]", studies=("bandit",))
    rows = [row for row in talking.rows if row["study"] == "bandit"]
    for row, own in zip(rows, records(run), strict=True):
        assert assert_without_marks(talking.oracle, row, own, "joint") == 8
    run = score(talking.model, talking.data, tmp_path / "two", marks="drop", condition="persona", options="none")
    told = [row for row in talking.rows if "sex" in row or "phq8" in row]
    fronts = {True: "What is your age?\nInterviewee: 24.0\n\nInterviewer: What is your gender?\nInterviewee: female",
              False: "What is your PHQ-8 score?\nInterviewee: 3"}  # fmt: skip
    for row, own in zip(told, records(run), strict=True):
        text = f"Interviewer: {fronts['sex' in row]}\n\n{row['text']}"
        assert_without_marks(talking.oracle, {"text": text}, own, "joint")


def test_a_chat_has_no_marks_either_way(talking: Toy, tmp_path: Path) -> None:
    kept, without = (
        score(talking.model, talking.data, tmp_path / marks, condition="chat", marks=marks)
        for marks in ("keep", "drop")
    )
    assert psykern.read_run(kept.folder).equals(psykern.read_run(without.folder))
    assert (kept.manifest.marks, without.manifest.marks) == ("keep", "drop")


def test_the_study_finds_responses_by_their_marks() -> None:
    with pytest.raises(
        ValueError, match="marks: the study's protocol finds responses by their marks; use marks='keep'"
    ):
        Settings(protocol="study", marks="drop")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "responses").iterdir())


def test_a_run_begun_before_there_was_the_choice_goes_on(toy: Toy, tmp_path: Path) -> None:
    run = score(toy.model, toy.data, tmp_path, unit_tokens=100)
    before = names(tmp_path)
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_text())
    assert manifest.pop("marks") == "keep"
    path.write_text(json.dumps(manifest))
    (tmp_path / "responses" / before[0]).unlink()
    with pytest.raises(psykern.RunFolderError, match=r'another run, which differs in marks: null there, "drop" here$'):
        score(toy.model, toy.data, tmp_path, unit_tokens=100, marks="drop")
    again = score(toy.model, toy.data, tmp_path, unit_tokens=100)
    assert names(tmp_path) == before and again.manifest.counts == run.manifest.counts


def test_a_run_is_known_by_its_marks(toy: Toy, scorer: psykern.Scorer, tmp_path: Path) -> None:
    """Part names of runs that keep them are as ever."""
    dataset = Dataset.find(toy.data)
    kept, without = (
        score_with(scorer, dataset, tmp_path / marks, Settings(marks=marks), Options(), Clock())
        for marks in ("keep", "drop")
    )
    one, two = (json.loads((Path(run.folder) / "manifest.json").read_text()) for run in (kept, without))
    assert "marks" not in identity(one) and identity(two) == identity(one) | {"marks": "drop"}
    assert tokens_depend_on(kept.manifest) != tokens_depend_on(without.manifest)
    assert not set(names(Path(kept.folder))) & set(names(Path(without.folder)))
