"""Encoded units: the same from rows and from the cache; a warm cache reads no row; data that change are seen."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.groups import assert_equal
from support.toy import make_toy, toy_rows, write_rows

import psykern.data.feed
from psykern.core.errors import DataError, RowError
from psykern.core.types import EncodedUnit
from psykern.data.encode import Encoder
from psykern.data.feed import Feed
from psykern.data.files import find_data
from psykern.data.token_cache import TokenCache
from psykern.data.tokenizer import Tokenizer


@contextmanager
def clock(phase: str) -> Iterator[None]:
    yield


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("model")
    make_toy(folder)
    return Tokenizer.load(folder)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = write_rows(tmp_path / "rows.jsonl", toy_rows())
    with path.open("a") as file:
        file.write('{"study": "words", "text": "<<a"}\n')
    return path


def feed(tokenizer: Tokenizer, data: Path, cache: Path | None = None, options: Any = "given", **changes: Any) -> Feed:
    files = find_data([data])
    kept = None if cache is None else TokenCache.open(cache, [str(data)], {"options": options})
    return Feed(files, Encoder(tokenizer, options=options), clock, 300, cache=kept, **changes)


def assert_same(one: Sequence[EncodedUnit], two: Sequence[EncodedUnit]) -> None:
    assert [unit.info for unit in one] == [unit.info for unit in two]
    for a, b in zip(one, two, strict=True):
        assert [(e.source, e.reason) for e in a.rejects] == [(e.source, e.reason) for e in b.rejects]
        for t, u in zip(a.transcripts, b.transcripts, strict=True):
            assert_equal(t, u)


@pytest.mark.parametrize("options", ["given", "observed", "observed-experiment"])
def test_a_warm_cache_gives_the_same_and_reads_no_row(
    options: str, tokenizer: Tokenizer, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = feed(tokenizer, data, options=options)
    expected = list(plain.encoded(plain.units()))
    assert len(expected) > 3 and sum(len(unit.rejects) for unit in expected) == 1
    cold = feed(tokenizer, data, tmp_path / "cache", options)
    assert_same(list(cold.encoded(cold.units())), expected)

    monkeypatch.setattr(psykern.data.feed, "units", lambda *_, **__: pytest.fail("the rows were read"))
    monkeypatch.setattr(Encoder, "encode", lambda *_, **__: pytest.fail("a text was tokenized"))
    warm = feed(tokenizer, data, tmp_path / "cache", options)
    assert_same(list(warm.encoded(warm.units())), expected)


def test_a_half_warm_cache_gives_the_same(tokenizer: Tokenizer, data: Path, tmp_path: Path) -> None:
    """What an experiment's responses are is found again, though the units are known."""
    cold = feed(tokenizer, data, tmp_path / "cache", "observed-experiment")
    expected = list(cold.encoded(cold.units()))
    paths = sorted((tmp_path / "cache").glob("*/*.arrow"))
    paths[1].unlink()
    paths[3].write_bytes(b"damaged")
    half = feed(tokenizer, data, tmp_path / "cache", "observed-experiment")
    assert_same(list(half.encoded(half.units())), expected)
    assert paths[1].is_file() and paths[3].stat().st_size > 100  # written anew


def test_some_units_can_be_asked_for(tokenizer: Tokenizer, data: Path) -> None:
    every = feed(tokenizer, data)
    units = every.units()
    expected = list(every.encoded(units))
    some = feed(tokenizer, data)
    assert_same(list(some.encoded(some.units()[1::2])), expected[1::2])


def test_data_that_change_are_seen(tokenizer: Tokenizer, data: Path) -> None:
    changing = feed(tokenizer, data)
    units = changing.units()
    rows = data.read_text().splitlines()
    rows[2] = rows[2].replace("press", "touch")
    data.write_text("\n".join(rows))
    with pytest.raises(DataError, match=r"rows\.jsonl: changed while they were read \(unit 0, study bandit\)"):
        list(changing.encoded(units))
    shorter = feed(tokenizer, data)
    units = shorter.units()
    data.write_text(rows[0])
    with pytest.raises(DataError, match="changed while they were read"):
        list(shorter.encoded(units[-1:]))


@pytest.mark.parametrize("warm", [False, True])
def test_strict_raises_the_first_refused_row(warm: bool, tokenizer: Tokenizer, data: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    if warm:
        first = feed(tokenizer, data, cache)
        list(first.encoded(first.units()))
    strict = feed(tokenizer, data, cache, strict=True)
    with pytest.raises(RowError, match="never closed"):
        list(strict.encoded(strict.units()))


def test_a_study_that_is_not_there_is_named(tokenizer: Tokenizer, data: Path) -> None:
    with pytest.raises(DataError, match=r"no transcript of other, third in the data; 1 rows cannot be used, the first"):
        feed(tokenizer, data, studies=("words", "other", "third")).units()


def test_a_row_refused_by_its_options_goes_with_its_unit(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = toy_rows(count=2)
    rows[1]["options"] = ["J", ""]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = replace_unit_tokens(feed(tokenizer, data), 1)
    found = list(own.encoded(own.units()))
    assert [(len(unit.transcripts), len(unit.rejects)) for unit in found[:2]] == [(1, 0), (1, 1)]
    assert sum(len(unit.transcripts) + len(unit.rejects) for unit in found) == len(rows)


def replace_unit_tokens(of: Feed, unit_tokens: int) -> Feed:
    return replace(of, unit_tokens=unit_tokens)
