"""Folders that psykern wrote are no data: passed over where they stand among data, refused where they are named."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.rows import ROWS, in_parquet, json_lines, write

from psykern.core.errors import DataError
from psykern.data.files import find_files


def make_run(folder: Path) -> Path:
    """As a run looks from outside; tests/cli/test_run_below_data.py makes a real one."""
    write(folder / "manifest.json", json.dumps({"model_hash": "a", "tokenizer_hash": "b", "data": []}).encode())
    write(folder / "rejects.jsonl", json_lines([{"file": "x", "line": 1, "reason": "y"}]))
    table = pa.table({"study": ["s"]}).replace_schema_metadata({"psykern": "{}"})
    part = io.BytesIO()
    pq.write_table(table, part)
    write(folder / "responses" / "part-000000-0.parquet", part.getvalue())
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write(tmp_path / "data" / "a.jsonl")
    return tmp_path / "data"


@pytest.mark.parametrize("where", ["run", "runs/deep/run", "run/plain"])
def test_a_run_among_data_is_passed_over(where: str, data: Path) -> None:
    before = find_files([data])
    make_run(data / where)
    assert find_files([data]) == before
    (data / "link").symlink_to(data / where)
    assert find_files([data]) == before


@pytest.mark.parametrize("name", [".", "rejects.jsonl", "responses", "responses/part-000000-0.parquet"])
def test_what_is_of_a_run_and_named_is_refused(name: str, data: Path) -> None:
    run = make_run(data / "run")
    with pytest.raises(DataError, match=r"run.*: expected data, got what psykern wrote: .*data/run holds a run"):
        find_files([data / "a.jsonl", run / name])
    (data / "elsewhere").symlink_to(run / name)
    if name in (".", "responses"):
        with pytest.raises(DataError, match="expected data, got what psykern wrote"):
            find_files([data / "elsewhere"])


def test_a_copied_part_is_refused(data: Path) -> None:
    part = shutil.copy(make_run(data / "run") / "responses" / "part-000000-0.parquet", data / "b.parquet")
    for named in (part, data):
        with pytest.raises(DataError, match=r"b\.parquet: expected data, got a part of a run that psykern wrote"):
            find_files([named])


def test_data_that_were_made_of_a_part_are_data(data: Path) -> None:
    packed = io.BytesIO()
    pq.write_table(pa.table({"text": ["<<A>>"]}).replace_schema_metadata({"psykern": "{}"}), packed)
    write(data / "b.parquet", packed.getvalue())
    assert [file.study for file in find_files([data])] == ["a", "b"]


@pytest.mark.parametrize("content", [b"{}", b"[]", b"{", b"\xff", b'{"data": []}', b"[" * 100_000])
def test_another_manifest_hides_nothing(content: bytes, data: Path) -> None:
    write(data / "b" / "manifest.json", content)
    write(data / "b" / "rows.parquet", in_parquet(ROWS))
    assert [file.study for file in find_files([data])] == ["a", "rows"]


def test_a_folder_with_a_run_alone_has_no_data(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    with pytest.raises(DataError, match=r"expected files that end in .*, found none"):
        find_files([tmp_path])
