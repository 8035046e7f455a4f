"""The folder that holds a run: parts, manifest, rejects, and a run that goes on."""

from __future__ import annotations

import dataclasses
import json
import resource
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.records import manifest, random_transcripts, recipe

from psykern.core.errors import RowError, RunFolderError, Source
from psykern.core.types import UnitInfo
from psykern.runs.folder import RunFolder, UnitReport, iter_run, read_run
from psykern.runs.manifest import Counts, InputFile, Manifest, library_versions, peak_memory_bytes
from psykern.scoring.table import SCHEMA, to_table

ROOT = Path(__file__).resolve().parents[2]


def unit(index: int = 0, key: str = "k", study: str = "study") -> UnitInfo:
    return UnitInfo(index, study, key, 100)


def begin(path: Path, resume: bool = True, **changes: object) -> RunFolder:
    return RunFolder.open(path, recipe(**changes), resume=resume)


def report(*rejects: RowError, tokens: int = 0) -> UnitReport:
    return UnitReport(Counts(tokens=tokens, rejects=len(rejects)), rejects, {"study": [1.0, 0.1, 1 / 3]})


def test_parts_are_numbered_and_read_back_in_order(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    tables = [to_table(*random_transcripts(np.random.default_rng(seed), 20)) for seed in range(3)]
    names = [run.write_part(unit(i), table, report()) for i, table in reversed(list(enumerate(tables)))]
    assert [name[:12] for name in names] == ["part-000002-", "part-000001-", "part-000000-"]
    assert read_run(tmp_path / "run").equals(pa.concat_tables(tables))
    assert sum(batch.num_rows for batch in iter_run(tmp_path / "run")) == sum(table.num_rows for table in tables)
    some = read_run(tmp_path / "run", ["options", "study"])
    assert some.column_names == ["options", "study"]
    assert some["options"].to_pylist() == pa.concat_tables(tables)["options"].to_pylist()
    metadata = pq.ParquetFile(tmp_path / "run" / "responses" / names[0]).metadata
    assert metadata.row_group(0).column(0).compression == "ZSTD"


def test_equal_tables_give_equal_bytes(tmp_path: Path) -> None:
    parts = []
    for name in ("one", "two"):
        table = to_table(*random_transcripts(np.random.default_rng(0), 50))
        part = begin(tmp_path / name).write_part(unit(), table, report(tokens=3))
        parts.append((part, (tmp_path / name / "responses" / part).read_bytes()))
    assert parts[0] == parts[1]


def test_a_parts_name_follows_from_unit_model_and_settings(tmp_path: Path) -> None:
    one = begin(tmp_path / "one")
    names = {
        one.part_name(unit()),
        one.part_name(unit(index=1)),
        one.part_name(unit(key="other")),
        begin(tmp_path / "model", model_hash="a2").part_name(unit()),
        begin(tmp_path / "protocol", protocol="study").part_name(unit()),
        begin(tmp_path / "data", data=(InputFile("data.jsonl", "c4", 10),)).part_name(unit()),
    }
    assert len(names) == 6
    moved = begin(tmp_path / "moved", data=(InputFile("elsewhere.jsonl", "c3", 10),), model_id="copy", wave_tokens=9)
    assert moved.part_name(unit()) == one.part_name(unit())


def test_a_date_is_part_of_a_runs_identity_where_it_has_one(tmp_path: Path) -> None:
    dates = ("2026-11-30", "2026-12-01")
    names = {begin(tmp_path / date, date=date).part_name(unit()) for date in dates}
    assert len(names | {begin(tmp_path / "none").part_name(unit())}) == 3
    with pytest.raises(RunFolderError, match='differs in date: "2026-11-30" there, "2026-12-01" here'):
        begin(tmp_path / dates[0], date=dates[1])
    for here, there in ((None, '"2026-11-30" there, null here'), (dates[1], 'null there, "2026-12-01" here')):
        with pytest.raises(RunFolderError, match=f"differs in date: {there}"):
            RunFolder.open(tmp_path / ("none" if here else dates[0]), recipe(date=here), any_date=True)
    going_on = RunFolder.open(tmp_path / dates[0], recipe(date=dates[1]), any_date=True)
    assert going_on.began["date"] == dates[0] and going_on.part_name(unit()) in names


def test_part_with_other_columns_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="SCHEMA"):
        begin(tmp_path / "run").write_part(unit(), SCHEMA.empty_table().drop(["flag"]), report())


def test_a_run_that_goes_on_knows_its_parts(tmp_path: Path) -> None:
    run = begin(tmp_path)
    bad = RowError(Source("a.jsonl", 3), 'marks are nested: "<<a<<"\nat 7')
    run.write_part(unit(0), SCHEMA.empty_table(), report(bad, tokens=3))
    run.write_part(unit(2), SCHEMA.empty_table(), report(tokens=4))
    again = begin(tmp_path, started="2027-01-01T00:00:00+00:00")
    assert again.began["started"] == "2026-01-01T00:00:00+00:00"
    units = [unit(i) for i in range(3)]
    assert [again.has(u) for u in units] == [True, False, True]
    first, second = again.reports(units)
    assert (first.counts, second.counts) == (Counts(tokens=3, rejects=1), Counts(tokens=4))
    assert first.sums == {"study": [1.0, 0.1, 1 / 3]}  # to the last bit
    assert [(e.source, e.reason) for e in first.rejects] == [(bad.source, bad.reason)]
    assert not again.has(unit(0, key="other rows"))


def test_a_damaged_part_counts_as_absent(tmp_path: Path) -> None:
    run = begin(tmp_path)
    part = tmp_path / "responses" / run.write_part(unit(), SCHEMA.empty_table(), report())
    whole = part.read_bytes()
    part.write_bytes(whole[:-9])
    again = begin(tmp_path)
    assert not again.has(unit())
    again.write_part(unit(), SCHEMA.empty_table(), report())
    assert part.read_bytes() == whole


def test_what_another_process_wrote_is_seen(tmp_path: Path) -> None:
    one, two = begin(tmp_path), begin(tmp_path)
    two.write_part(unit(), SCHEMA.empty_table(), report())
    assert not one.has(unit())
    one.look_again()
    assert one.has(unit())


def test_run_without_responses_can_be_read(tmp_path: Path) -> None:
    begin(tmp_path).finish(manifest(), {}, [])
    table = read_run(tmp_path)
    assert (table.schema, table.num_rows) == (SCHEMA, 0)


def test_folder_may_exist_if_it_is_empty(tmp_path: Path) -> None:
    begin(tmp_path)
    begin(tmp_path / "a" / "b")
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["manifest.json"]


def test_non_empty_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for resume in (True, False):
        with pytest.raises(RunFolderError, match=r"expected a new or empty folder.*holds notes\.txt"):
            begin(tmp_path, resume)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_another_run_is_refused_with_what_differs(tmp_path: Path) -> None:
    begin(tmp_path)
    before = (tmp_path / "manifest.json").read_bytes()
    other = {"protocol": "study", "limit": 5, "data": (InputFile("data.jsonl", "c4", 10),)}
    with pytest.raises(RunFolderError) as raised:
        begin(tmp_path, **other)
    for part in (
        'protocol: "exact" there, "study" here',
        "limit: null there, 5 here",
        'data: ["c3"] there, ["c4"] here',
    ):
        assert part in str(raised.value)
    assert "model_hash" not in str(raised.value)
    with pytest.raises(RunFolderError, match=r"new or empty folder.*--resume.*manifest\.json"):
        begin(tmp_path, resume=False)
    assert (tmp_path / "manifest.json").read_bytes() == before


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"data": 3}', '{"data": [3]}', "[" * 100_000],
    ids=["empty", "open", "list", "no data", "data number", "file number", "deep"],
)
def test_a_manifest_that_is_none_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(RunFolderError, match=r"manifest\.json: cannot be read as a run's manifest"):
        begin(tmp_path)
    assert (tmp_path / "manifest.json").read_text() == content


@pytest.mark.parametrize("name", ["started", "wave_tokens", "batch_tokens"])
@pytest.mark.parametrize("value", [None, True, 0, -1, 1.5, [], 2**31])
def test_a_run_does_not_go_on_with_what_is_no_budget_or_start(tmp_path: Path, name: str, value: object) -> None:
    begin(tmp_path)
    began = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(began | {name: value}))
    with pytest.raises(RunFolderError, match=rf"cannot be read as a run's manifest: ValueError: {name}: expected"):
        begin(tmp_path)


@pytest.mark.parametrize(
    ("below", "message"),
    [("file", "expected a folder.*got a file"), ("file/run", "cannot be written: Not a directory")],
    ids=["is a file", "below a file"],
)
def test_place_that_cannot_be_a_folder_is_refused(tmp_path: Path, below: str, message: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match=message) as raised:
        begin(tmp_path / below)
    assert str(tmp_path / below) in str(raised.value)


def test_full_disk_leaves_no_part(tmp_path: Path) -> None:
    run = begin(tmp_path)
    table = to_table(*random_transcripts(np.random.default_rng(0), 200))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # a write beyond 1,000 bytes fails as on a full disk
    try:
        with pytest.raises(RunFolderError, match=r"part-000000-\w+\.parquet: cannot be written"):
            run.write_part(unit(), table, report())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((tmp_path / "responses").iterdir()) == []
    assert not run.has(unit())
    run.write_part(unit(), table, report())
    assert read_run(tmp_path).num_rows == table.num_rows


def test_interrupted_write_leaves_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    run = begin(tmp_path)
    monkeypatch.setattr("psykern.core.folder.os.fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run.write_part(unit(), SCHEMA.empty_table(), report())
    assert list((tmp_path / "responses").iterdir()) == []


def test_rejects_are_lines_of_json(tmp_path: Path) -> None:
    run = begin(tmp_path)
    rejects = [
        RowError(Source("a.jsonl", 3), 'marks are nested: "<<a<<"\nat 7'),
        RowError(Source("b.zip!prompts\udcff.jsonl", 4), "no text"),  # a file name that is not UTF-8
    ]
    run.finish(manifest(), {}, rejects)
    lines = (tmp_path / "rejects.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"file": "a.jsonl", "line": 3, "reason": 'marks are nested: "<<a<<"\nat 7'},
        {"file": "b.zip!prompts\udcff.jsonl", "line": 4, "reason": "no text"},
    ]


def test_what_cannot_be_written_at_the_end_is_an_error(tmp_path: Path) -> None:
    run = begin(tmp_path)
    (tmp_path / "rejects.jsonl").mkdir()
    with pytest.raises(RunFolderError, match=r"rejects\.jsonl: cannot be written: Is a directory"):
        run.finish(manifest(), {}, [RowError(Source("a.jsonl", 3), "no text")])
    assert json.loads((tmp_path / "manifest.json").read_text())["finished"] is None


def test_manifest_holds_every_field(tmp_path: Path) -> None:
    begin(tmp_path).finish(manifest(), {}, [])
    written = json.loads((tmp_path / "manifest.json").read_text())
    assert list(written) == [field.name for field in dataclasses.fields(Manifest)]
    assert written["data"] == [{"path": "data.jsonl", "hash": "c3", "bytes": 10}]
    assert written["counts"]["computed_tokens"] == 20
    assert written["seconds"] == {"read": 0.5, "run": 2.0}
    assert written["versions"]["pyarrow"] == pa.__version__
    assert written["versions"]["psykern"] == "0.1.0"
    assert not (tmp_path / "rejects.jsonl").exists()


def test_json_has_no_nan(tmp_path: Path) -> None:
    summary = {"mean_nll": float("nan"), "studies": ({"scored": np.int64(3), "nll": [float("-inf"), 0.5]},)}
    begin(tmp_path).finish(manifest(tokens_per_second=float("inf"), seconds={"run": np.float32("nan")}), summary, [])

    def fail(constant: str) -> None:
        raise AssertionError(constant)

    written = json.loads((tmp_path / "manifest.json").read_text(), parse_constant=fail)
    assert (written["tokens_per_second"], written["seconds"]) == (None, {"run": None})
    summary = json.loads((tmp_path / "summary.json").read_text(), parse_constant=fail)
    assert summary == {"mean_nll": None, "studies": [{"scored": 3, "nll": [None, 0.5]}]}


def test_library_that_is_not_installed_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psykern.runs.manifest.LIBRARIES", ("numpy", "no-such-library"))
    assert library_versions("1.2") == {
        "psykern": "1.2",
        "python": sys.version.split()[0],
        "numpy": np.__version__,
    }


def test_peak_memory_is_in_bytes() -> None:
    block = np.ones(25_000_000)  # 200 MB that are touched
    assert block.nbytes < peak_memory_bytes() < 2**37


@pytest.mark.parametrize("make", [None, "responses"], ids=["no folder", "no part"])
def test_folder_without_parts_is_an_error(tmp_path: Path, make: str | None) -> None:
    if make:
        (tmp_path / make).mkdir()
    with pytest.raises(RunFolderError, match="found no part"):
        read_run(tmp_path)


def test_damaged_part_is_named(tmp_path: Path) -> None:
    table = to_table(*random_transcripts(np.random.default_rng(0), 20))
    part = tmp_path / "responses" / begin(tmp_path).write_part(unit(), table, report())
    part.write_bytes(part.read_bytes()[:-20])
    with pytest.raises(RunFolderError, match=r"part-000000-\w+\.parquet: cannot be read"):
        read_run(tmp_path)


def test_foreign_part_is_named(tmp_path: Path) -> None:
    (tmp_path / "responses").mkdir()
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "responses" / "part-00000.parquet")
    with pytest.raises(RunFolderError, match=r"part-00000\.parquet: expected the columns of a run, got \['text'\]"):
        read_run(tmp_path)
