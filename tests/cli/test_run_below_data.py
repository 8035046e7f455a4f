"""RUN may stand in DATA: the same command finds the same data when it goes on, whatever the first call left."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.command import assert_error, manifest, psykern_command, score
from support.toy import Toy, write_rows

import psykern
from psykern import Settings


@pytest.fixture
def data(toy: Toy, tmp_path: Path) -> Path:
    """With a row that is refused, so that the run has rejects.jsonl."""
    write_rows(tmp_path / "data" / "study.jsonl", [*toy.rows, {"text": "<<a"}])
    return tmp_path / "data"


def test_a_run_goes_on_below_its_data(toy: Toy, data: Path) -> None:
    run = data / "run"
    assert score(toy.model, data, run, "--quiet") == 3
    before, records = manifest(run), psykern.read_run(run)
    assert (run / "rejects.jsonl").is_file()
    for part in run.glob("responses/*"):
        part.unlink()
    assert score(toy.model, data, run, "--quiet") == 3
    assert manifest(run)["data"] == before["data"]
    assert manifest(run)["counts"] == before["counts"]
    assert psykern.read_run(run).equals(records)


def test_a_run_that_was_killed_at_once_goes_on(toy: Toy, data: Path) -> None:
    (data / "run").mkdir()
    assert score(toy.model, data, data / "run", "--quiet") == 3


def test_conditions_go_on_below_their_data(toy: Toy, data: Path) -> None:
    for _ in range(2):
        assert score(toy.model, data, data / "run", "--quiet", "--condition", "plain,persona") == 3
    for name in ("plain", "persona"):
        assert [Path(file["path"]).name for file in manifest(data / "run" / name)["data"]] == ["study.jsonl"]
        shutil.rmtree(data / "run" / name / "responses")
    assert score(toy.model, data, data / "run", "--quiet", "--condition", "plain,persona") == 3
    assert score(toy.model, data, data / "other", "--quiet") == 3  # beside it


def test_an_interrupted_run_goes_on_below_its_data(toy: Toy, data: Path) -> None:
    asked = iter([False, True, True, True])
    with pytest.raises(psykern.InterruptedRun):
        psykern.score(
            toy.model, data, data / "run", Settings(device="cpu", unit_tokens=1), stop=lambda: next(asked, True)
        )
    run = psykern.score(toy.model, data, data / "run", Settings(device="cpu", unit_tokens=1))
    assert run.manifest.counts.rejects == 1 and run.manifest.finished


def test_the_token_cache_and_a_report_may_stand_there_too(toy: Toy, data: Path) -> None:
    for model in (1, 2):
        shutil.copytree(toy.model, data.parent / f"m{model}")
        arguments = ["--quiet", "--cache", data / "cache"]
        assert score(data.parent / f"m{model}", data, data / f"run{model}", *arguments) == 3
    assert psykern_command("compare", data / "run1", data / "run2", "--out", data / "report", "--unpaired") == 0
    assert score(toy.model, data, data / "run3", "--quiet") == 3
    assert len(manifest(data / "run3")["data"]) == 1


def test_a_glob_that_hits_a_run_is_refused(toy: Toy, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert score(toy.model, data, data / "run", "--quiet") == 3
    capsys.readouterr()
    hits = sorted(data.glob("**/*.jsonl"))
    assert len(hits) == 2
    status = score(toy.model, hits, data / "other")
    assert_error(capsys, status, data / "run" / "rejects.jsonl", "expected data, got what psykern wrote")
    part = shutil.copy(next(data.glob("run/responses/*.parquet")), data / "copy.parquet")
    assert_error(capsys, score(toy.model, data, data / "more"), part, "a part of a run")
