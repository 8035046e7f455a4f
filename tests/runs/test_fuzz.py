"""Rows, files and manifests of any content: a short form of ``benchmarks/fuzz.py``."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import fuzzing
from support.toy import make_toy, toy_rows, write_rows

from psykern import Settings

FEW = settings(max_examples=40, deadline=None, database=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_toy(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", toy_rows(count=1))


@contextmanager
def new_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "a" / "b"
        folder.mkdir(parents=True)
        yield folder


@FEW
@given(lines=fuzzing.LINES, packing=fuzzing.PACKINGS, chosen=fuzzing.SETTINGS)
def test_no_row_is_lost(model: Path, lines: list[bytes], packing: str, chosen: Settings) -> None:
    with new_folder() as folder:
        fuzzing.check_rows(model, lines, packing, chosen, folder)


@FEW
@given(
    lines=fuzzing.LINES,
    packing=st.sampled_from(["jsonl", "jsonl.gz", "zip", "parquet"]),
    damage=fuzzing.DAMAGE,
    cut=fuzzing.CUT,
)
def test_damaged_files_are_named(
    model: Path, lines: list[bytes], packing: str, damage: list[tuple[float, int]], cut: float
) -> None:
    content = fuzzing.parquet_of(lines) if packing == "parquet" else fuzzing.pack(lines, packing)
    with new_folder() as folder:
        fuzzing.check_damaged(model, content, packing, damage, cut, folder)


@FEW
@given(text=fuzzing.JSON_TEXT)
def test_a_foreign_manifest_is_refused(model: Path, data: Path, text: str) -> None:
    with new_folder() as folder:
        fuzzing.check_manifest(model, data, text, folder)


@FEW
@given(changes=fuzzing.CHANGES, removed=fuzzing.REMOVED)
def test_a_changed_manifest_is_refused_or_goes_on(
    model: Path, data: Path, changes: dict[str, Any], removed: list[str]
) -> None:
    with new_folder() as folder:
        fuzzing.check_changed_manifest(model, data, changes, removed, folder)


@FEW
@given(content=st.binary(max_size=50), place=st.floats(0, 1), length=st.floats(0, 1, exclude_max=True))
def test_a_damaged_part_is_scored_again(model: Path, data: Path, content: bytes, place: float, length: float) -> None:
    with new_folder() as folder:
        fuzzing.check_part(model, data, content, place, length, folder)
