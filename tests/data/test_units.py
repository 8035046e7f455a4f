"""Units depend on the data and the settings alone; every row is in one, accepted or refused."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.rows import find

from psykern.core.errors import Source
from psykern.core.types import Transcript
from psykern.data.read import read
from psykern.data.units import CHARS_PER_TOKEN, WINDOW_TOKENS, Unit, units

Row = dict[str, Any]


def row(study: str = "s", text: str = "You say <<A>>.", **columns: Any) -> Row:
    return {"study": study, "text": text} | columns


def cut(
    path: Path, rows: Sequence[Row | str], unit_tokens: int = 1, window_tokens: int = WINDOW_TOKENS, **options: Any
) -> list[Unit]:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return list(units(read(find(path), **options), unit_tokens=unit_tokens, window_tokens=window_tokens))


def keys(found: Sequence[Unit]) -> list[str]:
    return [unit.info.key for unit in found]


def test_a_window_of_one_unit_is_cut_by_its_characters(tmp_path: Path) -> None:
    rows = [row(participant=i, text="zyx"[i % 3] * 10 + "<<A>>") for i in range(7)]  # 15 characters
    found = cut(tmp_path / "a.jsonl", rows, unit_tokens=8, window_tokens=8)  # 32 characters
    assert CHARS_PER_TOKEN == 4
    assert [[t.participant for t in unit.transcripts] for unit in found] == [list("012"), list("345"), ["6"]]
    assert [unit.info.index for unit in found] == [0, 1, 2]
    assert [unit.info.characters for unit in found] == [45, 45, 15]


def test_a_unit_holds_what_begins_alike(tmp_path: Path) -> None:
    """Cut at about 120 characters, where neighbours have the least in common; rows in the data's order."""
    rows = [row(participant=i, text="pqr"[i % 3] * 30 + f"{i}<<A>>") for i in range(9)]  # 36 characters
    found = cut(tmp_path / "a.jsonl", rows, unit_tokens=30)
    assert [[t.participant for t in unit.transcripts] for unit in found] == [list("036"), list("147"), list("258")]
    assert [[t.place for t in unit.transcripts] for unit in found] == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]
    assert [(unit.info.index, unit.info.group) for unit in found] == [(0, 0), (1, 0), (2, 0)]


def test_groups_are_apart_in_study_and_window(tmp_path: Path) -> None:
    rows = [row("ab"[i % 2], participant=i, text=f"{i}" * 31 + "<<A>>") for i in range(10)]  # 36 characters
    found = cut(tmp_path / "a.jsonl", rows, unit_tokens=9, window_tokens=50)  # 6 rows, 4 rows
    assert [(unit.info.study, unit.info.group) for unit in found] == [
        *[("a", 0)] * 3,
        *[("b", 3)] * 3,
        *[("a", 6)] * 2,
        *[("b", 8)] * 2,
    ]


_FRONTS = st.sampled_from(["", "one ", "one two ", "one two three " * 5, "three " * 20])


@given(
    texts=st.lists(st.tuples(st.sampled_from("ab"), _FRONTS, st.text("xy", max_size=60)), max_size=40),
    unit_tokens=st.integers(1, 40),
    window_tokens=st.integers(1, 400),
)
def test_every_row_is_in_one_unit_of_bounded_size(
    texts: list[tuple[str, str, str]], unit_tokens: int, window_tokens: int
) -> None:
    rows = [transcript(study, front + end + "<<A>>", number) for number, (study, front, end) in enumerate(texts)]
    found = list(units(rows, unit_tokens=unit_tokens, window_tokens=window_tokens))
    lines = [[t.source.line for t in unit.transcripts] for unit in found]
    assert sorted(chain.from_iterable(lines)) == list(range(len(rows)))
    assert all(own == sorted(own) for own in lines)
    size, longest = unit_tokens * CHARS_PER_TOKEN, max((len(t.text) for t in rows), default=0)
    assert all(unit.info.characters <= 1.25 * size + longest for unit in found)
    assert [unit.info.index for unit in found] == list(range(len(found)))
    again = units(iter(rows), unit_tokens=unit_tokens, window_tokens=window_tokens)
    assert [unit.info for unit in again] == [unit.info for unit in found]
    for group in {unit.info.group for unit in found} - {None}:
        own = [t for unit in found if unit.info.group == group for t in unit.transcripts]
        assert sorted(t.place for t in own) == list(range(len(own)))
        assert [t.source.line for t in sorted(own, key=lambda t: t.place)] == sorted(t.source.line for t in own)


def distinct_characters(texts: Sequence[str]) -> int:
    """Nodes of the texts' trie: each text but what it begins with as its neighbour in order does."""
    order = [np.frombuffer(text.encode("utf-32-le"), np.uint32) for text in sorted(texts)]
    alike = (int(np.argmin(np.append(s[: len(t)] == t[: len(s)], False))) for s, t in pairwise(order))
    return sum(map(len, texts)) - sum(alike)


@pytest.mark.parametrize(("study", "along_the_file"), [("frey2017mpl", 1.4), ("thoma2025riskychoice", 1.05)])
def test_units_of_a_real_study_are_near_one_trie(study: str, along_the_file: float, shared: Path) -> None:
    rows = list(read(find(shared / "psych" / f"{study}.jsonl.gz")))
    bound = distinct_characters([t.text for t in rows if isinstance(t, Transcript)])

    def computed(window_tokens: int) -> int:
        cut = units(rows, unit_tokens=2**17, window_tokens=window_tokens)
        return sum(distinct_characters([t.text for t in unit.transcripts]) for unit in cut)

    assert computed(WINDOW_TOKENS) <= 1.015 * bound
    assert computed(1) > along_the_file * bound


def transcript(study: str, text: str, line: int) -> Transcript:
    return Transcript(study, "", str(line), text, np.empty((0, 2), np.int64), None, Source("a.jsonl", line))


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
    found = cut(tmp_path / "a.jsonl", rows, window_tokens=1)
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
    """30,000 refused rows, and then 20,000 accepted ones: memory is that of a window."""
    path = tmp_path / "a.jsonl"
    good = json.dumps(row(text="x" * 400 + "<<A>>"))
    path.write_text("{\n" * 30_000 + f"{good}\n" * 20_000)
    tracemalloc.start()
    rejects = transcripts = 0
    for unit in units(read(find(path)), unit_tokens=1_000, window_tokens=10_000):
        rejects += len(unit.rejects)
        transcripts += len(unit.transcripts)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (rejects, transcripts) == (30_000, 20_000)
    assert peak < 15 * 2**20
