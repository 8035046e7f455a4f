"""Random rows, files, manifests and parts: a short form of `benchmarks/fuzz.py`."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from fuzzing import (
    HOSTILE,
    MOST_ROWS,
    Row,
    as_parquet,
    count_lines,
    damaged,
    lines,
    place,
    rows,
    rows_of,
    score,
    settings,
    unpacked,
    values,
    zipped,
)
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

import psykern
from psykern import PsykernError, Settings, demo

short = examples(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), database=None)
SMALL = Settings(device="cpu", unit_tokens=20)
ROWS = b"".join(json.dumps({"text": f"You press <<{key}>>.", "participant": key}).encode() + b"\n" for key in "JFJJ")


@short
@given(lines(), settings)
def test_every_line_is_in_the_records_or_in_the_rejects(content: bytes, how: Settings) -> None:
    with place() as run:
        done = score("rows.jsonl", content, run, how)
        if done is not None:
            assert rows_of(done) == count_lines(content)


@short
@given(st.data(), lines(), st.sampled_from(["rows.jsonl.gz", "rows.zip"]), settings, st.sampled_from(HOSTILE))
def test_a_damaged_file_loses_no_row_silently(
    data: st.DataObject, content: bytes, name: str, how: Settings, folder: str
) -> None:
    member = f"{folder}/prompts.jsonl".encode("utf-8", "replace").decode()
    packed = gzip.compress(content) if name.endswith(".gz") else zipped(member, content)
    packed = data.draw(damaged(packed))
    with place() as run:
        done = score(name, packed, run, how)
        expected = unpacked(name, packed)
        if done is not None and expected is not None:
            assert rows_of(done) == expected
        elif done is not None:
            assert done.manifest.counts.rejects > 0


@short
@given(st.data(), st.lists(rows, min_size=1, max_size=MOST_ROWS), settings)
def test_a_damaged_parquet_file_stops_nothing(data: st.DataObject, table: list[Row], how: Settings) -> None:
    whole = as_parquet(table)
    content = data.draw(damaged(whole))
    with place() as run:
        done = score("rows.parquet", content, run, how)
        if content == whole and done is not None:
            assert rows_of(done) == len(table)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    (folder / "rows.jsonl").write_bytes(ROWS)
    psykern.score(demo.MODEL, folder / "rows.jsonl", folder / "run", SMALL)
    return folder


@short
@given(st.data())
def test_a_manifest_is_data(finished: Path, data: st.DataObject) -> None:
    manifest = json.loads((finished / "run" / "manifest.json").read_bytes())
    name = data.draw(st.sampled_from(sorted(manifest)))
    kind = data.draw(st.sampled_from(["value", "missing", "any", "bytes", "deep"]))
    changed = {
        "value": lambda: json.dumps(manifest | {name: data.draw(values)}).encode(),
        "missing": lambda: json.dumps({key: value for key, value in manifest.items() if key != name}).encode(),
        "any": lambda: json.dumps(data.draw(values)).encode(),
        "bytes": lambda: data.draw(st.binary(max_size=50)),
        "deep": lambda: b"[" * 100_000,
    }[kind]()
    with place() as run:
        run.mkdir()
        (run / "manifest.json").write_bytes(changed)
        try:
            done = psykern.score(demo.MODEL, finished / "rows.jsonl", run, SMALL)
        except PsykernError:
            assert (run / "manifest.json").read_bytes() == changed
            return
        assert rows_of(done) == 4


@short
@given(st.data())
def test_a_part_that_was_cut_off_is_scored_again(finished: Path, data: st.DataObject) -> None:
    with place() as run:
        psykern.score(demo.MODEL, finished / "rows.jsonl", run, SMALL)
        parts = sorted((run / "responses").iterdir())
        part = data.draw(st.sampled_from(parts))
        whole = part.read_bytes()
        content = data.draw(st.one_of(st.binary(max_size=60), st.integers(0, len(whole) - 1).map(lambda n: whole[:n])))
        part.write_bytes(content)
        psykern.score(demo.MODEL, finished / "rows.jsonl", run, SMALL)
        assert part.read_bytes() == whole
