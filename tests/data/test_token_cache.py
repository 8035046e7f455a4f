"""The token cache gives back what was put in, and nothing else: whatever is damaged or foreign is absent."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.groups import Branch, assert_equal, encoded
from support.rows import accepted

import psykern
from psykern.core.errors import RowError, Source
from psykern.core.settings import Settings
from psykern.core.types import EncodedTranscript, EncodedUnit, UnitInfo
from psykern.data.dataset import DataFile, Dataset
from psykern.data.encode import Encoder
from psykern.data.read import read
from psykern.data.token_cache import TokenCache
from psykern.data.tokenizer import Tokenizer

INFO = UnitInfo(3, "study", "k" * 64, 1000)
DEPENDS_ON = {"tokenizer_hash": "t", "protocol": "exact"}
BRANCHES: list[Branch] = [(0, 2, [0], 0), (0, 2, [1], 0), (2, 5, [2, 3, 4, 5], 0), (2, 4, [6, 7], 1)]


def transcript(file: str = "a.jsonl", participant: str = "7") -> EncodedTranscript:
    return encoded(
        range(9),
        [(2, 3), (4, 4), (5, 9)],
        BRANCHES,
        study="study",
        experiment="é",
        participant=participant,
        source=Source(file, 4),
        responses=("A", "", "two words"),
        flags=(None, "empty;closing_mark", None),
        options=(("A", "B"), None, ("two words", "ü")),
        option_index=np.array([0, -1, 0], np.int32),
    )


def without_responses() -> EncodedTranscript:
    return encoded([], [], source=Source("a.jsonl", 4))


def dataset(*paths: str, study: str = "study", digest: str = "d") -> Dataset:
    return Dataset(tuple(DataFile(Path(path), study, digest, 1) for path in paths or ("a.jsonl", "b.zip")))


def unit(transcripts: Sequence[EncodedTranscript], info: UnitInfo = INFO) -> EncodedUnit:
    rejects = (RowError(Source("b.zip!prompts.jsonl", 5), 'text: missing "x"'),)
    return EncodedUnit(info, tuple(transcripts), rejects, 2, 3, 4, 5)


def open_cache(folder: Path, of: Dataset | None = None, **changes: Any) -> TokenCache:
    return TokenCache.open(folder, of or dataset(), DEPENDS_ON | changes)


def the_file(folder: Path) -> Path:
    (path,) = folder.glob("*/*.arrow")
    return path


@pytest.mark.parametrize(
    "transcripts",
    [[transcript(), transcript(participant="8"), without_responses()], [without_responses()], []],
    ids=["several", "without responses", "none"],
)
def test_a_unit_comes_back_as_it_was(transcripts: list[EncodedTranscript], tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    assert cache.read(INFO) is None
    cache.write(unit(transcripts))
    got = open_cache(tmp_path).read(INFO)
    assert got is not None
    assert (got.info, len(got.transcripts)) == (INFO, len(transcripts))
    assert (got.without_metadata, got.without_id, got.shared_participants, got.repeated) == (2, 3, 4, 5)
    for one, two in zip(got.transcripts, transcripts, strict=True):
        assert_equal(one, two)
    assert [(e.source, e.reason) for e in got.rejects] == [(Source("b.zip!prompts.jsonl", 5), 'text: missing "x"')]


def test_arrays_are_views_of_the_file(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    cache.write(unit([transcript()]))
    got = cache.read(INFO)
    assert got is not None
    ids = got.transcripts[0].token_ids
    assert not ids.flags.owndata and not ids.flags.writeable


def test_data_that_moved_are_named_where_they_are_now(tmp_path: Path) -> None:
    open_cache(tmp_path).write(unit([transcript()]))
    got = open_cache(tmp_path, dataset("/new/a.jsonl", "/new/b.zip")).read(INFO)
    assert got is not None
    assert got.transcripts[0].source == Source("/new/a.jsonl", 4)
    assert got.rejects[0].source == Source("/new/b.zip!prompts.jsonl", 5)


@pytest.mark.parametrize("place", [0, 10, 20, 47, 60, 64, 100, 0.3, 0.5, 0.9, -1])
def test_a_flipped_bit_anywhere_is_seen(place: float, tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    cache.write(unit([transcript()]))
    path = the_file(tmp_path)
    content = bytearray(path.read_bytes())
    at = int(place * len(content)) if isinstance(place, float) else place
    content[at] ^= 4
    path.write_bytes(content)
    assert cache.read(INFO) is None
    cache.write(unit([transcript()]))  # written anew
    assert cache.read(INFO) is not None


@pytest.mark.parametrize("size", [0, 10, 64, 65, 500])
def test_a_truncated_file_is_seen(size: int, tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    cache.write(unit([transcript()]))
    path = the_file(tmp_path)
    path.write_bytes(path.read_bytes()[:size])
    assert cache.read(INFO) is None


def test_a_foreign_file_is_seen(tmp_path: Path) -> None:
    """Whole, but of another unit, under this unit's name; or no file of ours at all."""
    other = UnitInfo(4, "study", "o" * 64, 10)
    cache = open_cache(tmp_path)
    cache.write(unit([transcript()], other))
    name = the_file(tmp_path).with_name(f"{INFO.index:06d}-{INFO.key[:32]}.arrow")
    the_file(tmp_path).rename(name)
    assert cache.read(INFO) is None
    name.write_bytes(b"x" * 1000)
    assert cache.read(INFO) is None


@pytest.mark.parametrize(
    ("change", "data"),
    [
        pytest.param({"tokenizer_hash": "u"}, dataset(), id="tokenizer"),
        pytest.param({"protocol": "study"}, dataset(), id="protocol"),
        pytest.param({}, dataset(digest="e"), id="content"),
        pytest.param({}, dataset(study="other"), id="study's name"),
        pytest.param({}, dataset("a.jsonl"), id="fewer files"),
    ],
)
def test_what_depends_on_something_else_is_not_found(change: dict[str, Any], data: Dataset, tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    cache.write(unit([transcript()]))
    cache.write_units([INFO])
    other = open_cache(tmp_path, data, **change)
    assert other.read(INFO) is None
    assert other.read_units() is None
    assert cache.read_units() == [INFO]


def test_the_folder_is_called_by_what_tokens_depend_on(tmp_path: Path) -> None:
    """Else caches that are there would be encoded anew."""
    open_cache(tmp_path)
    text = (
        '{"data": [["study", "d"], ["study", "d"]], "protocol": "exact", "psykern": "'
        + psykern.__version__
        + '", "tokenizer_hash": "t", "version": 4}'
    )
    assert [path.name for path in tmp_path.iterdir()] == [hashlib.sha256(text.encode()).hexdigest()[:32]]


def test_data_without_hashes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dataset: expected hashed files"):
        open_cache(tmp_path, dataset(digest=""))


def test_a_damaged_list_of_units_is_seen(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    units = [replace(INFO, index=i) for i in range(3)]
    cache.write_units(units)
    assert cache.read_units() == units
    (path,) = tmp_path.glob("*/units.json")
    path.write_text(json.dumps([[0, "study", "key", 1]]))
    assert cache.read_units() is None


@pytest.mark.parametrize("name", ["frey2017mpl", "guenther2024substitutions", "haridi2024memory"])
def test_real_transcripts_come_back_as_they_were(name: str, shared: Path, tmp_path: Path) -> None:
    data = Dataset.find(shared / "psych" / f"{name}.jsonl.gz")
    rows = list(accepted(read(data, limit=4)))
    settings = Settings(options="observed", max_options=100)
    transcripts = Encoder(Tokenizer.load(shared / "tokenizers" / "qwen3"), settings).encode(rows).transcripts
    cache = open_cache(tmp_path, data)
    cache.write(EncodedUnit(INFO, transcripts, (), 0))
    got = cache.read(INFO)
    assert got is not None
    assert sum(len(t.branch_response) for t in transcripts) > 0 or name == "haridi2024memory"
    for one, two in zip(got.transcripts, transcripts, strict=True):
        assert_equal(one, two)
