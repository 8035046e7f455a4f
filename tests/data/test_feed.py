"""Encoded units: the same from rows and from the cache; a warm cache reads no row; data that change are seen."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from support.groups import assert_equal
from support.toy import make_toy, toy_rows, write_rows

import psykern.data.feed
from psykern.core.clock import Clock
from psykern.core.errors import DataError, RowError
from psykern.core.settings import Settings
from psykern.core.types import EncodedUnit
from psykern.data.dataset import Dataset
from psykern.data.encode import Encoder
from psykern.data.feed import Feed
from psykern.data.token_cache import TokenCache
from psykern.data.tokenizer import Tokenizer


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
    dataset = Dataset.find(data)
    kept = None if cache is None else TokenCache.open(cache, dataset, {"options": options})
    settings = Settings(**{"options": options, "unit_tokens": 300} | changes)
    return Feed(dataset, Encoder(tokenizer, settings), cache=kept)


def assert_same(one: Sequence[EncodedUnit], two: Sequence[EncodedUnit]) -> None:
    assert [unit.info for unit in one] == [unit.info for unit in two]
    for a, b in zip(one, two, strict=True):
        assert (a.without_id, a.shared_participants, a.repeated) == (b.without_id, b.shared_participants, b.repeated)
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
    with pytest.raises(DataError, match=r"rows\.jsonl: changed while they were read \(unit \d, study bandit\)"):
        list(changing.encoded(units))
    shorter = feed(tokenizer, data)
    units = shorter.units()
    data.write_text(rows[0])
    with pytest.raises(DataError, match="changed while they were read"):
        list(shorter.encoded(units[-1:]))


def test_data_that_changed_since_they_were_hashed_are_seen(tokenizer: Tokenizer, data: Path, tmp_path: Path) -> None:
    """The manifest would name content that was not scored, and the cache keep it under another's name."""
    first, cached = feed(tokenizer, data), feed(tokenizer, data, tmp_path / "cache")
    data.touch()
    first.units()
    data.write_text(data.read_text().replace("press", "touch"))
    for changed in (first, cached):
        with pytest.raises(DataError, match=r"rows\.jsonl: changed since the run began"):
            changed.units()
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


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
    own = feed(tokenizer, data, unit_tokens=1)
    found = list(own.encoded(own.units()))
    assert sorted((len(unit.transcripts), len(unit.rejects)) for unit in found[:2]) == [(1, 0), (1, 1)]
    assert sum(len(unit.transcripts) + len(unit.rejects) for unit in found) == len(rows)


def test_the_units_size_must_be_known(tokenizer: Tokenizer, data: Path) -> None:
    with pytest.raises(ValueError, match="unit_tokens: expected a number in the encoder's settings, got None"):
        feed(tokenizer, data, unit_tokens=None)


def test_the_clock_counts_reading_and_encoding(tokenizer: Tokenizer, data: Path) -> None:
    clock = Clock()
    own = Feed(Dataset.find(data), Encoder(tokenizer, Settings(unit_tokens=300)), clock=clock)
    list(own.encoded(own.units()))
    assert set(clock.seconds) == {"read", "encode"} and min(clock.seconds.values()) > 0


@pytest.mark.parametrize(("limit", "studies"), [(1, None), (None, ("words",)), (2, ("bandit", "words"))])
def test_limit_and_studies_of_the_settings_choose(
    limit: int | None, studies: tuple[str, ...] | None, tokenizer: Tokenizer, data: Path
) -> None:
    own = feed(tokenizer, data, limit=limit, studies=studies)
    found = Counter(t.study for unit in own.encoded(own.units()) for t in unit.transcripts)
    every = Counter(row["study"] for row in toy_rows())
    assert found == {study: min(n, limit or n) for study, n in every.items() if studies is None or study in studies}
