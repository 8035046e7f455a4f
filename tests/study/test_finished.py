"""finished.py: a run's responses in one order, however they were written; and what is said of other folders."""

from __future__ import annotations

import json
import math
import shutil
from collections import defaultdict
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from support.simulated_runs import Humans, Row, rows, write_run

from psykern import RunFolderError
from psykern.study.finished import Responses, load, open_runs, restrict


def loaded(folder: Path) -> Responses:
    (run,) = open_runs(folder)
    return load(run)


def shuffled_transcripts(records: list[Row], seed: int) -> list[Row]:
    """The records with their transcripts in another order."""
    transcripts: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in records:
        transcripts[row["study"], row["experiment"], row["participant"]].append(row)
    keys = list(transcripts)
    order = np.random.default_rng(seed).permutation(len(keys))
    return [row for i in order for row in transcripts[keys[i]]]


def by_name(row: Row) -> tuple[str, str, str]:
    return row["study"], row["experiment"], row["participant"]


def test_columns_are_those_of_the_records_by_name(tmp_path: Path) -> None:
    records = rows(Humans())
    records[3] |= {"logprob": None, "is_argmax": None, "entropy": None}
    records[5]["option_index"] = None  # none of its options
    found = loaded(write_run(tmp_path / "run", "m", shuffled_transcripts(records, 1), parts=5))
    expected = sorted(records, key=by_name)
    assert found.studies == ("alpha", "beta", "gamma")
    assert found.participants == tuple(dict.fromkeys(map(by_name, expected)))
    assert found.study_offsets.tolist() == [0, 12, 24, 36]
    counts = [sum(by_name(row) == key for row in records) for key in found.participants]
    assert np.diff(found.participant_offsets).tolist() == counts
    assert found.response_index.tolist() == [row["response_index"] for row in expected]
    for name in ("logprob", "is_argmax", "entropy"):
        values = [math.nan if row[name] is None else float(row[name]) for row in expected]
        np.testing.assert_allclose(getattr(found, name), values, rtol=1e-7)
    has = [row["option_index"] is not None for row in expected]
    assert found.option_index.tolist() == [
        row["option_index"] if h else -1 for row, h in zip(expected, has, strict=True)
    ]
    lists = [row["option_log_softmax"] if h else [] for row, h in zip(expected, has, strict=True)]
    assert np.diff(found.option_offsets).tolist() == list(map(len, lists))
    np.testing.assert_allclose(found.option_log_softmax, [x for values in lists for x in values], rtol=1e-6)


@pytest.mark.parametrize("parts", [1, 7])
def test_order_and_parts_of_the_files_do_not_matter(parts: int, tmp_path: Path) -> None:
    records = rows(Humans())
    one = loaded(write_run(tmp_path / "one", "m", records))
    two = loaded(write_run(tmp_path / "two", "m", shuffled_transcripts(records, 2), parts=parts))
    assert one.participants == two.participants
    for name in Responses.__slots__[3:]:
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))


def test_two_transcripts_of_one_participant_stay_in_order(tmp_path: Path) -> None:
    first = [row for row in rows(Humans(studies=("s",), participants=1))]
    again = [row | {"logprob": row["logprob"] - 10} for row in first]
    other = [row | {"participant": "1"} for row in first]
    found = loaded(write_run(tmp_path / "run", "m", [*first, *other, *again]))
    n = len(first)
    assert np.diff(found.participant_offsets).tolist() == [2 * n, n]
    assert found.response_index.tolist() == [*range(n), *range(n), *range(n)]
    np.testing.assert_allclose(found.logprob[n : 2 * n], found.logprob[:n] - 10)


def test_texts_differ_by_content_and_order(tmp_path: Path) -> None:
    records = rows(Humans(studies=("s",), participants=2))
    swapped = [dict(row) for row in records]
    j = next(i for i in range(len(records) - 1) if records[i]["response"] != records[i + 1]["response"])
    swapped[j]["response"], swapped[j + 1]["response"] = records[j + 1]["response"], records[j]["response"]
    one, two = (loaded(write_run(tmp_path / str(i), "m", r)) for i, r in enumerate((records, swapped)))
    assert (one.texts != two.texts).sum() == 1


def test_an_empty_run(tmp_path: Path) -> None:
    found = loaded(write_run(tmp_path / "run", "m", [], parts=1))
    assert (found.studies, found.participants, len(found.logprob)) == ((), (), 0)


def test_a_folder_with_a_run_per_condition_is_several(tmp_path: Path) -> None:
    write_run(tmp_path / "run" / "plain", "org/m", rows(Humans()))
    write_run(tmp_path / "run" / "chat", "org/m", rows(Humans()), condition="chat")
    assert [(run.path.name, run.condition) for run in open_runs(tmp_path / "run")] == [
        ("chat", "chat"),
        ("plain", "plain"),
    ]


def test_what_is_no_finished_run(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"nowhere: expected a run's folder, found nothing"):
        open_runs(tmp_path / "nowhere")
    run = write_run(tmp_path / "run", "m", rows(Humans()))
    (run / "manifest.json").unlink()
    with pytest.raises(RunFolderError, match=r"expected manifest.json of a finished run.*interrupted"):
        open_runs(run)
    for counts in ([], {"responses": "7"}, {"responses": math.inf}):
        write_run(tmp_path / f"{counts}", "m", [], counts=counts)
        with pytest.raises(RunFolderError, match=r"cannot be read as a run's manifest: (Attribute|Type)Error"):
            open_runs(tmp_path / f"{counts}")
    (run / "manifest.json").write_text('{"model_id": "m"}')
    with pytest.raises(RunFolderError, match=r"cannot be read as a run's manifest: KeyError"):
        open_runs(run)


def test_a_part_that_is_damaged_or_something_else(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "m", rows(Humans()))
    part = run / "responses" / "part-00000.parquet"
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(RunFolderError, match=r"part-00000.parquet: cannot be read"):
        load(open_runs(run)[0])
    for part in (run / "responses").iterdir():
        part.unlink()
    with pytest.raises(RunFolderError, match="found no part"):
        load(open_runs(run)[0])


@pytest.mark.parametrize("change", ["missing", "twice"])
def test_a_part_that_is_missing_or_there_twice(tmp_path: Path, change: str) -> None:
    """A folder that was copied in part has means of its own."""
    records = rows(Humans())
    run = write_run(tmp_path / "run", "m", records, counts={"responses": len(records)})
    load(open_runs(run)[0])
    part = run / "responses" / "part-00000.parquet"
    shutil.copy(part, part.with_name("part-00009.parquet")) if change == "twice" else part.unlink()
    with pytest.raises(
        RunFolderError, match=rf"{len(records):,} responses that manifest.json counts, its parts hold \d"
    ):
        load(open_runs(run)[0])


def test_data_hashes_do_not_depend_on_the_order_of_files(tmp_path: Path) -> None:
    files = [{"path": str(i), "hash": str(i) * 64, "bytes": 1} for i in range(3)]
    one = write_run(tmp_path / "one", "m", [], parts=1, data=files)
    two = write_run(tmp_path / "two", "m", [], parts=1, data=files[::-1])
    assert open_runs(one)[0].data == open_runs(two)[0].data
    assert open_runs(one)[0].data_read == open_runs(two)[0].data_read[::-1]
    assert json.loads((one / "manifest.json").read_text())["data"] == files


@pytest.mark.parametrize("names", [{"0", "3", "11"}, {"5"}, set()], ids=["three", "one", "none"])
def test_restricted_responses_are_those_of_a_run_without_the_others(tmp_path: Path, names: set[str]) -> None:
    every = rows(Humans())
    kept = [row for row in every if row["participant"] in names and row["study"] != "alpha"]
    want = loaded(write_run(tmp_path / "alone", "m", kept))
    got = restrict(loaded(write_run(tmp_path / "whole", "m", every)), want.participants)
    for field in fields(want):
        if isinstance(getattr(want, field.name), np.ndarray):
            np.testing.assert_array_equal(getattr(got, field.name), getattr(want, field.name), field.name)
        else:
            assert getattr(got, field.name) == getattr(want, field.name)
