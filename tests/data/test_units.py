"""Units depend on the data and the settings alone; every row is in one, accepted or refused."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from support.rows import find

from psykern.data.read import read
from psykern.data.units import CHARS_PER_TOKEN, Unit, units

Row = dict[str, Any]


def row(study: str = "s", text: str = "You say <<A>>.", **columns: Any) -> Row:
    return {"study": study, "text": text} | columns


def cut(path: Path, rows: Sequence[Row | str], unit_tokens: int = 1, **options: Any) -> list[Unit]:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return list(units(read(find(path), **options), unit_tokens=unit_tokens))


def keys(found: Sequence[Unit]) -> list[str]:
    return [unit.info.key for unit in found]


def test_rows_are_cut_by_their_characters(tmp_path: Path) -> None:
    rows = [row(participant=i, text="x" * 10 + "<<A>>") for i in range(7)]  # 15 characters
    found = cut(tmp_path / "a.jsonl", rows, unit_tokens=8)  # 32 characters
    assert CHARS_PER_TOKEN == 4
    assert [[t.participant for t in unit.transcripts] for unit in found] == [list("012"), list("345"), ["6"]]
    assert [unit.info.index for unit in found] == [0, 1, 2]
    assert [unit.info.characters for unit in found] == [45, 45, 15]


def test_studies_are_apart(tmp_path: Path) -> None:
    rows = [row("a"), row("b"), row("a"), row("c"), row("b")]
    found = cut(tmp_path / "a.jsonl", rows, unit_tokens=1000)
    assert [(unit.info.index, unit.info.study, len(unit.transcripts)) for unit in found] == [
        (0, "a", 2),
        (1, "b", 2),
        (2, "c", 1),
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"text": "You say <<B>>."},
        {"study": "t"},
        {"experiment": "e"},
        {"participant": 8},
        {"options": ["A", "B"]},
        {"age": 31},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_key_depends_on_all_that_is_scored_and_on_nothing_else(change: Row, tmp_path: Path) -> None:
    rows = [row(participant=7), row(participant=9)]
    (one,) = cut(tmp_path / "a.jsonl", rows, 1000)
    (moved,) = cut(tmp_path / "elsewhere" / "b.jsonl", [rows[0] | {"RTs": [1, 2]}, rows[1]], 1000)
    assert moved.info == one.info
    changed = cut(tmp_path / "c.jsonl", [rows[0] | change, rows[1]], 1000)
    assert keys(changed)[0] != one.info.key


def test_keys_keep_neighbouring_texts_apart(tmp_path: Path) -> None:
    one = cut(tmp_path / "a.jsonl", [row(experiment="ab", participant="c")])
    two = cut(tmp_path / "b.jsonl", [row(experiment="a", participant="bc")])
    assert keys(one) != keys(two)


def test_refused_rows_are_reported_once(tmp_path: Path) -> None:
    rows: list[Row | str] = ["{", row("a"), "[]", row("a"), row("b"), row("a", text="<<A"), "nonsense"]
    found = cut(tmp_path / "a.jsonl", rows)
    assert [error.source.line for unit in found for error in unit.rejects] == [1, 3, 6, 7]
    assert sum(len(unit.transcripts) for unit in found) == 3
    assert (found[-1].info.study, found[-1].transcripts) == ("", ())
    assert cut(tmp_path / "b.jsonl", ["{"])[0].info.key != cut(tmp_path / "c.jsonl", ["["])[0].info.key


def test_no_rows_are_no_units(tmp_path: Path) -> None:
    assert cut(tmp_path / "a.jsonl", []) == []
    assert cut(tmp_path / "a.jsonl", [row("a")], studies=["b"]) == []


def test_limit_and_studies_choose_before_units_are_cut(tmp_path: Path) -> None:
    rows = [row("a", participant=i) for i in range(4)] + [row("b", participant=i) for i in range(4)]
    found = cut(tmp_path / "a.jsonl", rows, 1000, studies=["b"], limit=3)
    assert [[t.participant for t in unit.transcripts] for unit in found] == [list("012")]
    assert found[0].info.study == "b"


def test_neither_rows_nor_refusals_pile_up(tmp_path: Path) -> None:
    """30,000 refused rows, and then 20,000 accepted ones: memory is that of a unit."""
    path = tmp_path / "a.jsonl"
    good = json.dumps(row(text="x" * 400 + "<<A>>"))
    path.write_text("{\n" * 30_000 + f"{good}\n" * 20_000)
    tracemalloc.start()
    rejects = transcripts = 0
    for unit in units(read(find(path)), unit_tokens=10_000):
        rejects += len(unit.rejects)
        transcripts += len(unit.transcripts)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (rejects, transcripts) == (30_000, 20_000)
    assert peak < 15 * 2**20
