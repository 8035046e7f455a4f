"""Who is one person: ids that rows do not name, and ids that several files have."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from support.rows import accepted, json_lines, write

from psykern.core.errors import DataError
from psykern.core.types import Transcript
from psykern.data.dataset import Dataset
from psykern.data.read import read
from psykern.data.units import units

Row = dict[str, object]


def row(participant: object = None, **columns: object) -> Row:
    named = {} if participant is None else {"participant": participant}
    return {"text": "<<A>>"} | named | columns


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:8]


def people(data: Path | Sequence[Path], *, hashed: bool = True, **options: Any) -> list[Transcript]:
    return list(accepted(read(Dataset.find(data, hashed=hashed), **options)))


def names(data: Path | Sequence[Path], **options: Any) -> list[str]:
    return [transcript.participant for transcript in people(data, **options)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A study in three files: 7 is in all of them, 8 in the first two, 9 in the last two."""
    ids = {"train-0": [7, 8, 1], "train-1": ["8", 7.0, 9], "train-2": [9, 7, 2]}
    for name, of in ids.items():
        write(tmp_path / "study" / f"{name}.jsonl", json_lines([row(one, text=f"<<{name}>>") for one in of]))
    return tmp_path / "study"


class TestDefaultIds:
    def test_line_numbers_of_two_files_are_two_people(self, tmp_path: Path) -> None:
        a = write(tmp_path / "study" / "train-0.jsonl", json_lines([row(), row(), row(5)]))
        b = write(tmp_path / "study" / "train-1.jsonl", b"\n" + json_lines([row(text="<<B>>")]))
        assert names(tmp_path) == [f"{digest(a)}:1", f"{digest(a)}:2", "5", f"{digest(b)}:2"]
        assert [transcript.has_id for transcript in people(tmp_path)] == [False, False, True, False]
        assert [transcript.joins_files for transcript in people(tmp_path)] == [False] * 4

    def test_they_depend_on_the_content_alone(self, tmp_path: Path) -> None:
        a = write(tmp_path / "one" / "study" / "x.jsonl", json_lines([row()]))
        b = write(tmp_path / "one" / "study" / "y.jsonl", json_lines([row(), row()]))
        moved = tmp_path / "two" / "study"
        write(moved / "a" / "prompts.jsonl", b.read_bytes())
        shutil.copy(a, moved / "z.jsonl")
        assert sorted(names(tmp_path / "one")) == sorted(names(moved))

    def test_data_without_hashes_have_other_ones(self, tmp_path: Path) -> None:
        write(tmp_path / "study" / "train-0.jsonl", json_lines([row()]))
        write(tmp_path / "study" / "train-1.jsonl", json_lines([row()]))
        assert names(tmp_path, hashed=False) == ["1:1", "2:1"]

    def test_units_count_them(self, tmp_path: Path) -> None:
        write(tmp_path / "a.jsonl", json_lines([row(), row(1), row(), row(study="b")]))
        cut = units(read(Dataset.find(tmp_path)), unit_tokens=1000)
        assert [(unit.info.study, unit.without_id) for unit in cut] == [("a", 2), ("b", 1)]

    @pytest.mark.parametrize("blank", ["", " ", "\t"])
    def test_an_empty_cell_is_no_id(self, blank: str, tmp_path: Path) -> None:
        """Else all people without an id are one."""
        rows = [row(blank), row(blank), row(blank, participant_reindexed=4), row("x y")]
        file = write(tmp_path / "a.jsonl", json_lines(rows))
        assert names(tmp_path) == [f"{digest(file)}:1", f"{digest(file)}:2", "4", "x y"]


class TestRepeatedRows:
    def test_in_one_file(self, tmp_path: Path) -> None:
        rows = [row(7), row(8), row(7, text="<<B>>"), row(7.0), row(7, experiment="x"), row(), row(), row(7, study="t")]
        write(tmp_path / "a.jsonl", json_lines([*rows, row(7)]))
        assert [i for i, t in enumerate(people(tmp_path)) if t.repeats] == [3, 8]

    @pytest.mark.parametrize("same", ["merge", "separate"])
    def test_in_files_that_overlap(self, same: str, tmp_path: Path) -> None:
        write(tmp_path / "s" / "train-0.jsonl", json_lines([row(7), row(8)]))
        write(tmp_path / "s" / "train-1.jsonl", json_lines([row(8), row(9), row(7, text="<<B>>")]))
        assert [i for i, t in enumerate(people(tmp_path, same_participants=same)) if t.repeats] == [2]
        (unit,) = units(read(Dataset.find(tmp_path), same_participants=same), unit_tokens=1000)
        assert (unit.repeated, unit.shared_participants) == (1, 2)

    def test_a_copy_under_another_name(self, tmp_path: Path) -> None:
        """Its rows are another study's, by its name; with an id or without one."""
        for name in ("bandit", "bandit (1)"):
            write(tmp_path / f"{name}.jsonl", json_lines([row(1), row(), row(1, experiment="two")]))
        assert [t.repeats for t in people(tmp_path)] == [False] * 3 + [True] * 3


class TestIdsOfSeveralFiles:
    def test_merged_people_are_counted_once_when_they_join(self, folder: Path) -> None:
        got = people(folder)
        assert [t.participant for t in got] == ["7", "8", "1", "8", "7", "9", "9", "7", "2"]
        assert [t.participant for t in got if t.joins_files] == ["8", "7", "9"]
        assert [got.index(t) for t in got if t.joins_files] == [3, 4, 6]

    @pytest.mark.parametrize("unit_tokens", [1, 3, 1000])
    def test_units_add_up_to_their_number(self, unit_tokens: int, folder: Path) -> None:
        cut = units(read(Dataset.find(folder)), unit_tokens=unit_tokens)
        assert sum(unit.shared_participants for unit in cut) == 3

    def test_separated_people_are_called_after_the_later_file(self, folder: Path) -> None:
        b, c = digest(folder / "train-1.jsonl"), digest(folder / "train-2.jsonl")
        got = people(folder, same_participants="separate")
        expected = ["7", "8", "1", f"8@{b}", f"7@{b}", "9", f"9@{c}", f"7@{c}", "2"]
        assert [t.participant for t in got] == expected
        assert sum(t.joins_files for t in got) == 3

    def test_a_separated_person_has_one_name_in_a_file(self, tmp_path: Path) -> None:
        write(tmp_path / "s" / "train-0.jsonl", json_lines([row(7), row(7)]))
        b = write(tmp_path / "s" / "train-1.jsonl", json_lines([row(7), row(8), row(7)]))
        later = f"7@{digest(b)}"
        assert names(tmp_path, same_participants="separate") == ["7", "7", later, "8", later]

    def test_copies_of_a_file_are_separated_too(self, tmp_path: Path) -> None:
        """Their hashes are the same, and so are the default ids in them."""
        for name in ("a", "b", "c"):
            file = write(tmp_path / name / "prompts.jsonl", json_lines([row(7, study="s"), row(study="s")]))
        tag = digest(file)
        got = names(tmp_path, same_participants="separate")
        assert got == [
            *("7", f"{tag}:2"),
            *(f"7@{tag}", f"{tag}:2@{tag}"),
            *(f"7@{tag}@{tag}", f"{tag}:2@{tag}@{tag}"),
        ]

    def test_an_error_names_the_person_and_both_files(self, folder: Path) -> None:
        first, second = folder / "train-0.jsonl", folder / "train-1.jsonl"
        with pytest.raises(DataError) as error:
            people(folder, same_participants="error")
        assert str(error.value).startswith(
            f"{second}:1: participant '8' of study study, experiment '', is also in {first}; "
        )
        assert len(people(first, same_participants="error")) == 3

    def test_other_studies_and_experiments_are_other_people(self, tmp_path: Path) -> None:
        write(tmp_path / "a" / "prompts.jsonl", json_lines([row(7), row(7, experiment="x")]))
        write(tmp_path / "b" / "prompts.jsonl", json_lines([row(7), row(7, experiment=1, study="a")]))
        assert names(tmp_path, same_participants="error") == ["7"] * 4

    def test_one_file_twice_under_a_link(self, tmp_path: Path) -> None:
        file = write(tmp_path / "s" / "train-0.jsonl", json_lines([row(7)]))
        (tmp_path / "s" / "train-1.jsonl").symlink_to(file)
        assert names(tmp_path / "s", same_participants="error") == ["7"]

    def test_rows_that_are_left_out_are_not_looked_at(self, folder: Path) -> None:
        assert names(folder, same_participants="error", limit=3) == ["7", "8", "1"]
        assert [t.joins_files for t in people(folder, limit=4)] == [False, False, False, True]
        assert names(folder, same_participants="error", studies=["other"]) == []

    def test_refused_rows_are_not_looked_at(self, tmp_path: Path) -> None:
        write(tmp_path / "s" / "train-0.jsonl", json_lines([row(7, text="<<")]))
        write(tmp_path / "s" / "train-1.jsonl", json_lines([row(7)]))
        got = list(read(Dataset.find(tmp_path), same_participants="error"))
        assert [isinstance(one, Transcript) and one.participant for one in got] == [False, "7"]
