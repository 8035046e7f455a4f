"""Cells of a row: numbers that a data frame changed are what they were, ids have one text, the rest is refused."""

from __future__ import annotations

import io
import re
import uuid
from datetime import date, datetime, time, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.rows import accepted, find, json_lines, read_all, write

from psykern.core.errors import RowError
from psykern.core.types import Transcript
from psykern.data.read import read


def parquet(folder: Path, **columns: pa.Array) -> Path:
    packed = io.BytesIO()
    pq.write_table(pa.table(columns), packed)
    return write(folder / "s.parquet", packed.getvalue())


def transcripts(file: Path) -> list[Transcript]:
    return list(accepted(read(find(file))))


def options_of(folder: Path, container: str, text: str, options: list[object]) -> tuple[tuple[str, ...], ...] | None:
    """Of one row that is written as JSON or as parquet."""
    if container == "json":
        (transcript,) = transcripts(write(folder / "s.jsonl", json_lines([{"text": text, "options": options}])))
    else:
        (transcript,) = transcripts(parquet(folder, text=pa.array([text]), options=pa.array([options])))
    return transcript.options


CONTAINERS = pytest.mark.parametrize("container", ["json", "parquet"])


class TestOptionNumbers:
    @CONTAINERS
    @pytest.mark.parametrize(
        ("text", "options", "expected"),
        [
            pytest.param("<<1>>", [1.0, 2.0], [("1", "2")], id="a frame's floats"),
            pytest.param("<<2.5>>", [1.0, 2.5, 10.0], [("1", "2.5", "10")], id="some have a fraction"),
            pytest.param("<<9>>", [1.0, 2.0], [("1", "2")], id="no response is an option"),
            pytest.param("none", [1.0, 2.0], [], id="no response"),
            pytest.param("<<1.0>>", [1.0, 2.0], [("1.0", "2.0")], id="the response has the point"),
            pytest.param("<< 1.0>>", [1.0, 2.0], [("1.0", "2.0")], id="and a space"),
            pytest.param("<<1.0>><<3>>", [1.0, 2.0], [("1.0", "2.0")] * 2, id="another response is no option"),
            pytest.param("<<1.0>><<2>>", [1.0, 2.0], [("1", "2")] * 2, id="one with, one without"),
            pytest.param("<<1>><<2>>", [[1.0, 2.0], [2.0, 3.0]], [("1", "2"), ("2", "3")], id="a list per response"),
            pytest.param("<<7>><<2.0>>", [[1.0], [2.0]], [("1.0",), ("2.0",)], id="a row has one spelling"),
            pytest.param("<<-0>>", [-0.0, -1.0], [("0", "-1")], id="negative zero"),
            pytest.param(
                "<<10000000000000000>>", [1e16, 1e22], [("10000000000000000", "1" + "0" * 22)], id="large ones"
            ),
            pytest.param("<<1e+16>>", [1e16, 2e16], [("1e+16", "2e+16")], id="large ones as Python writes them"),
        ],
    )
    def test_a_float_is_written_as_the_row_writes_numbers(
        self, container: str, text: str, options: list[object], expected: list[tuple[str, ...]], tmp_path: Path
    ) -> None:
        assert options_of(tmp_path, container, text, options) == tuple(expected)

    @CONTAINERS
    def test_integers_and_strings_stay_as_they_are(self, container: str, tmp_path: Path) -> None:
        assert options_of(tmp_path, container, "<<1.0>>", [1, 2]) == (("1", "2"),)
        assert options_of(tmp_path, container, "<<1>>", ["1.0", "2.0"]) == (("1.0", "2.0"),)
        assert options_of(tmp_path, container, "<<1>>", ["1 ", "1"]) == (("1 ", "1"),)

    def test_integers_beside_floats(self, tmp_path: Path) -> None:
        assert options_of(tmp_path, "json", "<<2>>", [1, 2.0]) == (("1", "2"),)
        assert options_of(tmp_path, "json", "<<1.0>>", [1, 1.0]) == (("1", "1.0"),)

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            pytest.param("<<1>>", ("1", "2.5"), id="as people write them"),
            pytest.param("<<2.50>>", ("1.00", "2.50"), id="with all digits"),
            pytest.param("<<2.50>><<1>>", ("1", "2.5"), id="both"),
        ],
    )
    def test_decimals(self, text: str, expected: tuple[str, ...], tmp_path: Path) -> None:
        options = pa.array([[Decimal("1.00"), Decimal("2.50")]], pa.list_(pa.decimal128(38, 2)))
        (transcript,) = transcripts(parquet(tmp_path, text=pa.array([text]), options=options))
        assert transcript.options is not None and set(transcript.options) == {expected}

    @pytest.mark.parametrize("container", [pa.list_, pa.large_list, pa.list_view, lambda kind: pa.list_(kind, 3)])
    @pytest.mark.parametrize("kind", [pa.float32(), pa.float16()], ids=str)
    def test_narrow_floats_are_not_widened(self, kind: pa.DataType, container: Any, tmp_path: Path) -> None:
        """0.1 in 32 bits is 0.10000000149… in 64."""
        options = pa.array([np.array([0.1, 0.2, 1.0], kind.to_pandas_dtype())], container(kind))
        age = pa.array([30.1]).cast(kind)
        (transcript,) = transcripts(parquet(tmp_path, text=pa.array(["<<0.1>>"]), options=options, age=age))
        assert transcript.options == (("0.1", "0.2", "1"),)
        assert transcript.metadata == (("age", "30.1"),)

    @CONTAINERS
    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            pytest.param(["A", None], "options: option 2: expected a string, got null; .*padded", id="null"),
            pytest.param([1.0, float("nan")], "options: option 2: expected a string, got NaN; .*padded", id="nan"),
            pytest.param([[1.0, float("nan")]], "options of response 1: option 2: .* got NaN; .*padded", id="inner"),
            pytest.param([1.0, float("inf")], "option 2: .* got a number that is not finite", id="infinite"),
            pytest.param([True, False], "option 1: expected a string, got a boolean", id="booleans"),
            pytest.param([0.0, -0.0], "options: option 2 repeats '0'", id="two zeros"),
        ],
    )
    def test_what_is_no_option_refuses_the_row(
        self, container: str, options: list[object], reason: str, tmp_path: Path
    ) -> None:
        with pytest.raises(RowError, match=reason):
            options_of(tmp_path, container, "<<A>>", options)

    def test_integers_that_no_float_can_hold(self, tmp_path: Path) -> None:
        row = {"text": "<<A>>", "options": [10**400, 1], "participant": 10**401, "age": 10**402, "PHQ-9": 10**403}
        (transcript,) = transcripts(write(tmp_path / "s.jsonl", json_lines([row])))
        assert transcript.metadata == (("PHQ-9", str(10**403)),)
        assert (transcript.options, transcript.participant) == (((str(10**400), "1"),), str(10**401))

    def test_two_spellings_of_one_number_refuse_the_row(self, tmp_path: Path) -> None:
        with pytest.raises(RowError, match="options: option 2 repeats '1'"):
            options_of(tmp_path, "json", "<<1>>", [1, 1.0])


IDENTIFIER = uuid.UUID("12345678-1234-5678-1234-567812345678")


class TestIds:
    @pytest.mark.parametrize("column", ["participant", "experiment"])
    @pytest.mark.parametrize(
        ("values", "expected"),
        [
            pytest.param(pa.array([Decimal("7.00"), Decimal("7.50")]), ["7", "7.5"], id="decimals"),
            pytest.param(
                pa.array([Decimal("12345678901234567890123456789012345.6")]),
                ["12345678901234567890123456789012345.6"],
                id="many digits",
            ),
            pytest.param(pa.array([Decimal("1E+3")]), ["1000"], id="decimal with an exponent"),
            pytest.param(pa.array([7.0, 0.1], pa.float32()), ["7", "0.1"], id="32-bit floats"),
            pytest.param(pa.array([date(2024, 5, 1)]), ["2024-05-01"], id="dates"),
            pytest.param(pa.array([date(2024, 5, 1)], pa.date64()), ["2024-05-01"], id="dates of 64 bits"),
            pytest.param(
                pa.array([datetime(2024, 5, 1, 9, 30)], pa.timestamp("ms")), ["2024-05-01T09:30:00"], id="timestamps"
            ),
            pytest.param(
                pa.array([datetime(2024, 5, 1, 9, 30, tzinfo=timezone.utc)]), ["2024-05-01T09:30:00+00:00"], id="zones"
            ),
            pytest.param(pa.array([time(9, 30)]), ["09:30:00"], id="times"),
            pytest.param(pa.array([IDENTIFIER.bytes], pa.uuid()), [str(IDENTIFIER)], id="uuid"),
            pytest.param(pa.array(["a", "b"], pa.large_string()), ["a", "b"], id="large strings"),
            pytest.param(pa.array(["a", "b"], pa.string_view()), ["a", "b"], id="string views"),
            pytest.param(pa.array(["a", "b"]).dictionary_encode(), ["a", "b"], id="dictionary"),
            pytest.param(pa.array([7, 8]).dictionary_encode(), ["7", "8"], id="dictionary of numbers"),
            pytest.param(pa.array([7, 8], pa.uint64()), ["7", "8"], id="unsigned"),
            pytest.param(pa.array([2**53 + 1, -(2**62)]), [str(2**53 + 1), str(-(2**62))], id="large integers"),
            pytest.param(pa.array([2.0**53 - 1]), [str(2**53 - 1)], id="the largest exact float"),
            pytest.param(pa.array([2.0**24 - 1], pa.float32()), [str(2**24 - 1)], id="the largest exact 32-bit one"),
        ],
    )
    def test_one_evident_text(self, column: str, values: pa.Array, expected: list[str], tmp_path: Path) -> None:
        file = parquet(tmp_path, text=pa.array(["<<A>>"] * len(values)), **{column: values})
        assert [getattr(t, column) for t in transcripts(file)] == expected

    def test_missing_ones_among_them(self, tmp_path: Path) -> None:
        ids = pa.array([None, Decimal("7.00")])
        file = parquet(tmp_path, text=pa.array(["<<A>>"] * 2), experiment=ids, participant=pa.array([8, None]))
        assert [(t.experiment, t.participant[-2:]) for t in transcripts(file)] == [("", "8"), ("7", ":2")]

    @pytest.mark.parametrize(
        ("values", "reason"),
        [
            pytest.param(pa.array([b"7"]), "participant: expected a string or a number, got bytes", id="bytes"),
            pytest.param(pa.array([[7]]), "participant: .* got a list", id="list"),
            pytest.param(pa.array([float("inf")]), "participant: .* got a number that is not finite", id="infinite"),
            pytest.param(pa.array([2.0**53]), "participant: 9007199254740992.0 is a float, too large", id="inexact"),
            pytest.param(  # 16,777,217 is the same float
                pa.array([2.0**24], pa.float32()),
                "participant: 16777216.0 is a float, too large",
                id="32 bits",
            ),
            pytest.param(pa.array([2.0**11], pa.float16()), "participant: 2048.0 is a float, too large", id="16 bits"),
            pytest.param(
                pa.array([10**17], pa.timestamp("ms")),
                "^participant: cannot be read: .*; write it as a string$",
                id="a date beyond the calendar",
            ),
        ],
    )
    def test_what_has_none_refuses_the_row(self, values: pa.Array, reason: str, tmp_path: Path) -> None:
        file = parquet(tmp_path, text=pa.array(["<<A>>"]), participant=values)
        _, (error,) = read_all(file)
        assert re.search(reason, error.reason)

    @pytest.mark.parametrize("value", [Decimal("1.5"), date(2024, 1, 1), 1.5, IDENTIFIER.bytes])
    def test_text_stays_a_string(self, value: object, tmp_path: Path) -> None:
        _, (error,) = read_all(parquet(tmp_path, text=pa.array([value])))
        assert error.reason.startswith("text: expected a string, got ")


def test_decimals_tell_of_the_participant(tmp_path: Path) -> None:
    """As the floats that they are in a frame: an age of 24.0, a score of 7."""
    known = {"age": pa.array([Decimal("24.00")]), "PHQ-9": pa.array([Decimal("7.0")])}
    (transcript,) = transcripts(parquet(tmp_path, text=pa.array(["<<A>>"]), **known))
    assert transcript.metadata == (("age", "24.0"), ("PHQ-9", "7"))


class TestRepeatedColumns:
    @pytest.mark.parametrize("column", ["text", "participant", "options", "age"])
    def test_in_parquet(self, column: str, tmp_path: Path) -> None:
        arrays = [pa.array(["<<A>>"]), pa.array(["x"]), pa.array(["y"]), pa.array(["z"]), pa.array(["z"])]
        packed = io.BytesIO()
        pq.write_table(pa.Table.from_arrays(arrays, names=["text", column, column, "RTs", "RTs"]), packed)
        got, (error,) = read_all(write(tmp_path / "s.parquet", packed.getvalue()))
        assert got == []
        count = 3 if column == "text" else 2
        assert error.reason == f"{column}: expected one column of that name, got {count}"

    def test_in_parquet_where_it_is_ignored(self, tmp_path: Path) -> None:
        packed = io.BytesIO()
        arrays = [pa.array(["z"]), pa.array(["<<A>>"]), pa.array(["z"])]
        pq.write_table(pa.Table.from_arrays(arrays, names=["RTs", "text", "RTs"]), packed)
        assert [t.text for t in transcripts(write(tmp_path / "s.parquet", packed.getvalue()))] == ["<<A>>"]

    @pytest.mark.parametrize(
        ("line", "name"),
        [
            (b'{"text": "<<B>>", "text": "<<A>>"}', "text"),
            (b'{"text": "<<A>>", "participant": 1, "participant": 1}', "participant"),
            (b'{"text": "<<A>>", "age": 1, "x": {}, "\\u0061ge": 2}', "age"),
        ],
    )
    def test_in_json(self, line: bytes, name: str, tmp_path: Path) -> None:
        got, (error,) = read_all(write(tmp_path / "s.jsonl", json_lines([{"text": "<<A>>"}]) + line))
        assert len(got) == 1
        assert (error.source.line, error.reason) == (2, f"{name}: expected the key once, the row has it 2 times")

    def test_in_json_where_they_are_ignored(self, tmp_path: Path) -> None:
        line = b'{"x": 1, "x": 2, "text": "<<A>>", "y": {"text": 1, "text": 2}, "z": [{"age": 1, "age": 2}]}'
        assert [t.text for t in transcripts(write(tmp_path / "s.jsonl", line))] == ["<<A>>"]
