"""A data set is what its files hold: found once, hashed when that is asked for, and read no sooner."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from support.rows import json_lines, write

import psykern.data.dataset
from psykern.core.errors import DataError
from psykern.data.dataset import DataFile, Dataset

ROW = {"text": "<<A>>"}


def test_one_path_or_several(tmp_path: Path) -> None:
    one, two = (write(tmp_path / f"{name}.jsonl", json_lines([ROW])) for name in "ab")
    assert Dataset.find(one) == Dataset.find(str(one)) == Dataset.find([one])
    assert Dataset.find([two, str(one)]) == Dataset.find(tmp_path)
    assert Dataset.find(tmp_path).paths == (str(one), str(two))


def test_a_file_with_its_study_hash_and_size(tmp_path: Path) -> None:
    content = json_lines([ROW]) * 3
    path = write(tmp_path / "my_study" / "prompts.jsonl", content)
    digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
    assert Dataset.find(path).files == (DataFile(path, "my_study", digest, len(content)),)


def test_without_hashes_no_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", json_lines([ROW]))
    monkeypatch.setattr(psykern.data.dataset, "hash_file", lambda path: pytest.fail("the file was hashed"))
    assert Dataset.find(path, hashed=False).files == (DataFile(path, "a", "", path.stat().st_size),)


def test_data_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.jsonl: no such file or folder"):
        Dataset.find(tmp_path / "nothing.jsonl")
