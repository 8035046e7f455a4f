"""Who is one person in a run: what is counted and said is the same however the run is split, stopped and cached."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.command import score
from support.toy import Toy, write_rows

import psykern
from psykern import DataError, Run, Settings, Shard
from psykern.runs.manifest import Counts
from psykern.study.finished import load, open_runs

SETTINGS = Settings(device="cpu", unit_tokens=1)  # a unit for each transcript


@pytest.fixture(scope="module")
def data(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files of one study. 1 and 2 are in both, the former with a row that repeats one of the first; two rows of the
    first and one of the second have no id."""
    folder = tmp_path_factory.mktemp("data") / "study"
    rows = [{"text": row["text"]} for row in toy.rows[:9]]
    rows[7] = rows[0]
    first, second = [1, None, 2, None, 3], ["2", 4, 1.0, None]
    for name, ids, of in (("train-0", first, rows[:5]), ("train-1", second, rows[5:])):
        write_rows(folder / f"{name}.jsonl", [row | {"participant": i} for row, i in zip(of, ids, strict=True)])
    return folder


def tag(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:8]


def people(run: Run) -> list[str]:
    """In order of the records, each once."""
    return list(dict.fromkeys(psykern.read_run(run.folder, ["participant"]).column(0).to_pylist()))


def counted(run: Run) -> tuple[int, int, int]:
    counts = run.manifest.counts
    return counts.without_id_transcripts, counts.shared_participants, counts.repeated_transcripts


@pytest.fixture(scope="module")
def quiet(toy: Toy, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return psykern.score(toy.model, data, tmp_path_factory.mktemp("quiet"), SETTINGS)


def test_ids_of_a_run_of_two_files(data: Path, quiet: Run) -> None:
    a, b = tag(data / "train-0.jsonl"), tag(data / "train-1.jsonl")
    assert people(quiet) == ["1", f"{a}:2", "2", f"{a}:4", "3", "4", f"{b}:4"]
    assert counted(quiet) == (3, 2, 1)


def test_shards_add_up_to_the_same(toy: Toy, data: Path, quiet: Run, tmp_path: Path) -> None:
    runs = [psykern.score(toy.model, data, tmp_path, SETTINGS, shard=Shard(i, 4)) for i in (2, 0, 3, 1)]
    assert runs[-1].manifest.counts == quiet.manifest.counts
    assert psykern.read_run(tmp_path).equals(psykern.read_run(quiet.folder))


def test_a_run_that_goes_on_counts_the_same(toy: Toy, data: Path, quiet: Run, tmp_path: Path) -> None:
    psykern.score(toy.model, data, tmp_path, SETTINGS)
    for part in sorted(tmp_path.glob("responses/*.parquet"))[1::2]:
        part.unlink()
    assert psykern.score(toy.model, data, tmp_path, SETTINGS).manifest.counts == quiet.manifest.counts


@pytest.mark.parametrize("same", ["merge", "separate"])
def test_the_token_cache_changes_nothing(same: str, toy: Toy, data: Path, tmp_path: Path) -> None:
    settings = replace(SETTINGS, same_participants=same)
    cold, half, warm = (tmp_path / name for name in ("cold", "half", "warm"))
    expected = psykern.score(toy.model, data, cold, settings, cache=tmp_path / "cache")
    for file in sorted((tmp_path / "cache").glob("*/*.arrow"))[::2]:
        file.unlink()
    for out in (half, warm):
        run = psykern.score(toy.model, data, out, settings, cache=tmp_path / "cache")
        assert run.manifest.counts == expected.manifest.counts
        assert psykern.read_run(out).equals(psykern.read_run(cold))
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_separate_people_stay_apart_in_a_comparison(toy: Toy, data: Path, quiet: Run, tmp_path: Path) -> None:
    """In the merged run one person has the responses of both rows."""
    run = psykern.score(toy.model, data, tmp_path, replace(SETTINGS, same_participants="separate"))
    b = tag(data / "train-1.jsonl")
    assert set(people(run)) - set(people(quiet)) == {f"1@{b}", f"2@{b}"}
    assert counted(run) == counted(quiet)
    merged, separate = (load(open_runs(Path(of.folder))[0]) for of in (quiet, run))
    assert (len(merged.participants), len(separate.participants)) == (7, 9)
    sizes = {names[2]: n for names, n in zip(separate.participants, np.diff(separate.participant_offsets), strict=True)}
    both = {names[2]: n for names, n in zip(merged.participants, np.diff(merged.participant_offsets), strict=True)}
    assert both["1"] == sizes["1"] + sizes[f"1@{b}"]
    with pytest.raises(psykern.ComparisonError, match="same_participants"):
        psykern.compare_runs([quiet.folder, run.folder], tmp_path / "report", unpaired=True)


def test_an_error_stops_before_anything_is_scored(toy: Toy, data: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train-1\.jsonl:1: participant '2' of study study, .* is also in .*train-0"):
        psykern.score(toy.model, data, tmp_path, replace(SETTINGS, same_participants="error"))
    assert not list(tmp_path.iterdir())


def test_the_report_says_so(toy: Toy, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert score(toy.model, data, tmp_path / "run", "--same-participants", "separate", "--quiet") == 0
    lines = capsys.readouterr().out.splitlines()
    assert (
        "3 transcripts name no participant: each is a person of its own, called by its file's hash and its line"
        in lines
    )
    assert "2 participants' ids are in more than one file of their experiment: see --same-participants" in lines
    assert "1 transcripts repeat an earlier one of their participant: they count again" in lines
    assert score(toy.model, toy.data, tmp_path / "other", "--quiet") == 0
    out = capsys.readouterr().out
    assert "participant" not in out


def test_counts_add_up() -> None:
    one = Counts(without_id_transcripts=1, shared_participants=2, repeated_transcripts=3)
    assert one + one == Counts(without_id_transcripts=2, shared_participants=4, repeated_transcripts=6)
