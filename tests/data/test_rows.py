"""Reading: real counts, columns, and each kind of bad row with file, line and reason."""

from __future__ import annotations

import gzip
import hashlib
import io
import re
import sys
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.rows import ROWS, accepted, find, in_parquet, json_lines, read_all, write, zipped

from psykern.core.errors import RowError
from psykern.core.types import Transcript
from psykern.data.read import read
from psykern.data.rows import find_responses


def read_row(tmp_path: Path, row: Mapping[str, object] | bytes) -> Transcript:
    """The one row's transcript; raises its RowError."""
    line = row if isinstance(row, bytes) else json_lines([row])
    (transcript,) = accepted(read(find(write(tmp_path / "some_study.jsonl", line))))
    return transcript


class TestRealData:
    def test_every_shared_file_gives_the_counts_of_its_table(self, shared: Path) -> None:
        """All but the largest file, which has a test with a limit."""
        table = (shared / "psych" / "README.md").read_text(encoding="utf-8")
        lines = re.findall(
            r"^\| `(\w+)\.jsonl\.gz` \|.*\| (\d+) \| ([\d,]+) \(\d+ / \d+ / \d+\) \|", table, re.MULTILINE
        )
        expected = {study: (int(people), int(responses.replace(",", ""))) for study, people, responses in lines}
        assert len(expected) == 15
        del expected["alsobay2025publicGoodsGame"]
        got = {}
        for study in expected:
            transcripts, rejected = read_all(shared / "psych" / f"{study}.jsonl.gz")
            assert rejected == []
            assert {transcript.study for transcript in transcripts} == {study}
            got[study] = (len(transcripts), sum(len(transcript.responses_char) for transcript in transcripts))
        assert got == expected

    def test_the_folder_with_a_limit_and_some_studies(self, shared: Path) -> None:
        dataset = find(shared / "psych")
        assert len(dataset.files) == 15
        some = ["alsobay2025publicGoodsGame", "thoma2025riskychoice"]
        transcripts = list(accepted(read(dataset, studies=some, limit=20)))
        assert [transcript.study for transcript in transcripts] == [some[0]] * 20 + [some[1]] * 20
        assert [transcript.source.line for transcript in transcripts] == [*range(1, 21), *range(1, 21)]

    def test_responses_are_what_stands_between_the_marks(self, shared: Path) -> None:
        transcripts, _ = read_all(shared / "psych" / "haridi2024memory.jsonl.gz", limit=40)
        for transcript in transcripts:
            cut = [transcript.text[first:last] for first, last in transcript.responses_char]
            assert cut == re.findall(r"<<(.*?)>>", transcript.text, re.DOTALL)
        assert transcripts[0].responses_char.dtype == np.int64


class TestStreaming:
    def test_memory_does_not_grow_with_a_gzip_file(self, tmp_path: Path) -> None:
        text = "Which one? <<A>> " + "and on " * 250
        file = tmp_path / "long.jsonl.gz"
        with gzip.open(file, "wb", compresslevel=1) as stream:
            for number in range(8_000):  # 14 MB
                stream.write(json_lines([{"text": text, "participant": number}]))
        dataset = find(file)
        tracemalloc.start()
        try:
            count = len([None for _ in accepted(read(dataset))])
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert count == 8_000
        assert peak < 4_000_000  # bytes, of which about 130 a row to know it again

    def test_memory_does_not_grow_with_a_parquet_row_group(self, tmp_path: Path) -> None:
        rows: list[dict[str, object]] = [
            {"text": f"{i} " + "<<A>> " + "and on " * 240, "RTs": "x" * 99} for i in range(20_000)
        ]
        one_group = in_parquet(rows, compression="none", use_dictionary=False)
        file = write(tmp_path / "long.parquet", one_group)
        del rows, one_group
        before, peak = pa.total_allocated_bytes(), 0
        for _ in accepted(read(find(file))):
            peak = max(peak, pa.total_allocated_bytes() - before)
        assert 0 < peak < 8_000_000  # bytes; the column has 34 million

    def test_the_first_transcript_needs_no_more_than_its_row(self, tmp_path: Path) -> None:
        file = write(tmp_path / "s.jsonl", json_lines(ROWS[:1]) + b"broken\n")
        assert next(accepted(read(find(file)))).participant == "7"


class TestSelection:
    def test_limit_counts_accepted_transcripts_of_a_study_over_its_files(self, tmp_path: Path) -> None:
        bad: list[dict[str, object]] = [{"text": "<<"}]
        write(tmp_path / "s" / "train-0.jsonl", json_lines(bad + ROWS[:2]))
        write(tmp_path / "s" / "train-1.jsonl", json_lines(ROWS + bad) + b"broken")
        write(tmp_path / "t.parquet", in_parquet(ROWS))
        transcripts, rejected = read_all(tmp_path, limit=3)
        assert [(t.study, t.source.line) for t in transcripts] == [
            *[("s", 2), ("s", 3), ("s", 1)],
            *[("t", 1), ("t", 2), ("t", 3)],
        ]
        assert len(rejected) == 1  # rows behind the limit are not checked

    @pytest.mark.parametrize("name", ["s.jsonl", "s.parquet"])
    def test_the_study_column_comes_before_the_file_name(self, tmp_path: Path, name: str) -> None:
        rows: list[dict[str, object]] = [{**ROWS[0], "study": study} for study in ("x", "y", None, "x")]
        file = write(tmp_path / name, in_parquet(rows) if name.endswith("parquet") else json_lines(rows))
        assert [t.study for t in read_all(file)[0]] == ["x", "y", "s", "x"]
        assert [(t.study, t.source.line) for t in read_all(file, studies=["x"])[0]] == [("x", 1), ("x", 4)]
        assert [(t.study, t.source.line) for t in read_all(file, limit=1)[0]] == [("x", 1), ("y", 2), ("s", 3)]
        assert read_all(file, studies=["s"])[0][0].source.line == 3
        assert read_all(file, studies=[]) == ([], [])


class TestColumns:
    @pytest.mark.parametrize(
        ("columns", "participant", "experiment"),
        [
            pytest.param({"participant": "p1", "experiment": "e"}, "p1", "e", id="strings"),
            pytest.param({"participant": 12, "experiment": 3}, "12", "3", id="integers"),
            pytest.param({"participant": 12.0, "experiment": 0.5}, "12", "0.5", id="floats"),
            pytest.param({"participant_reindexed": 4}, "4", "", id="reindexed"),
            pytest.param(
                {"participant": float("nan"), "participant_reindexed": 4, "experiment": None}, "4", "", id="nan"
            ),
            pytest.param({"participant": None, "RTs": [float("nan"), 1.5]}, "1:2", "", id="file and line"),
            pytest.param({"participant": "", "experiment": "É"}, "1:2", "É", id="empty string"),
        ],
    )
    def test_ids(self, tmp_path: Path, columns: dict[str, object], participant: str, experiment: str) -> None:
        transcript = read_row(tmp_path, b"\n" + json_lines([{"text": "<<A>>", **columns}]))
        assert (transcript.participant, transcript.experiment) == (participant, experiment)

    def test_blank_lines_are_skipped_and_counted(self, tmp_path: Path) -> None:
        transcripts, rejected = read_all(write(tmp_path / "s.jsonl", b"\n \r\n" + json_lines(ROWS[:1]) + b"\n\n"))
        assert [t.source.line for t in transcripts] == [3]
        assert rejected == []

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            pytest.param(None, None, id="null"),
            pytest.param(float("nan"), None, id="nan"),
            pytest.param(["A", "B"], (("A", "B"),) * 3, id="one list"),
            pytest.param([1, 10, 2.5], (("1", "10", "2.5"),) * 3, id="numbers"),
            pytest.param([], ((),) * 3, id="empty list"),
            pytest.param([["A"], None, []], (("A",), (), ()), id="list per response"),
            pytest.param([None, None, None], ((), (), ()), id="nulls"),
            pytest.param([[1, "x"], ["A", "B"], ["A", "B"]], (("1", "x"), ("A", "B"), ("A", "B")), id="mixed"),
        ],
    )
    def test_options(self, tmp_path: Path, options: object, expected: object) -> None:
        assert read_row(tmp_path, {"text": "<<A>> <<B>> <<A>>", "options": options}).options == expected

    def test_equal_lists_are_one_object(self, tmp_path: Path) -> None:
        options = read_row(tmp_path, {"text": "<<A>>" * 3, "options": [["A", "B"]] * 3}).options
        assert options is not None
        assert options[0] is options[1] is options[2]

    def test_options_without_responses(self, tmp_path: Path) -> None:
        assert read_row(tmp_path, {"text": "none", "options": ["A", "B"]}).options == ()
        assert read_row(tmp_path, {"text": "none", "options": []}).options == ()

    def test_parquet_lists_per_response(self, tmp_path: Path) -> None:
        rows: list[dict[str, object]] = [{"text": "<<A>><<B>>", "options": [["A", "B"], None]}, {"text": "<<A>>"}]
        transcripts, rejected = read_all(write(tmp_path / "s.parquet", in_parquet(rows)))
        assert rejected == []
        assert [t.options for t in transcripts] == [(("A", "B"), ()), None]


BAD_ROWS = [
    pytest.param(b'{"text": "<<A>>"', r"not JSON: Expecting ',' delimiter \(character 17 of the line\)", id="cut off"),
    pytest.param(b"text", "not JSON: Expecting value", id="no JSON"),
    pytest.param(b'["<<A>>"]', "row: expected an object, got a list", id="no object"),
    pytest.param(b'{"text": "\xff<<A>>"}', r"not UTF-8: byte 0xff at byte 10 of the line", id="bad UTF-8"),
    pytest.param(b"[" * 200_000, "not JSON that can be read: nested too deeply", id="deep nesting"),
    pytest.param(
        b'{"text": "<<A>>", "x": ' + b"9" * 5000 + b"}",
        r"not JSON that can be read: Exceeds the limit \(4300 digits\)",
        id="huge integer",
        marks=pytest.mark.skipif(not hasattr(sys, "set_int_max_str_digits"), reason="this Python has no such limit"),
    ),
    pytest.param({"experiment": "e"}, "text: missing", id="no text"),
    pytest.param({"text": None}, "text: missing", id="text is null"),
    pytest.param({"text": 5}, "text: expected a string, got a number", id="text is a number"),
    pytest.param({"text": "a\ud800<<A>>"}, r"text: lone surrogate U\+D800 at character 1", id="lone surrogate"),
    pytest.param({"text": "<<A <<B>>"}, "text: '<<' at character 4 inside the response that '<<' at 0", id="nested"),
    pytest.param({"text": "A>> <<B>>"}, "text: '>>' at character 1 without '<<' before it", id="not opened"),
    pytest.param({"text": "<<A>> <<B"}, "text: '<<' at character 6 is never closed", id="not closed"),
    pytest.param({"text": "", "study": ""}, "study: expected a name, got an empty string", id="study is empty"),
    pytest.param({"text": "", "study": " "}, "study: expected a name, got an empty string", id="study is blank"),
    pytest.param({"text": "", "study": 3}, "study: expected a string, got a number", id="study is a number"),
    pytest.param(
        {"text": "", "experiment": []}, "experiment: expected a string or a number, got a list", id="experiment"
    ),
    pytest.param({"text": "", "participant": True}, "participant: .* got a boolean", id="participant"),
    pytest.param(
        {"text": "", "participant": "\udfff"}, r"participant: lone surrogate U\+DFFF", id="participant surrogate"
    ),
    pytest.param(
        {"text": "<<A>>", "options": "A"}, "options: expected a list, got a string", id="options are a string"
    ),
    pytest.param(
        {"text": "<<A>>", "options": '["A"]'}, "options: expected a list, got a string", id="options are JSON"
    ),
    pytest.param({"text": "<<A>>", "options": ["A", ""]}, "options: option 2 is empty", id="option is empty"),
    pytest.param({"text": "<<A>>", "options": ["1", 1]}, "options: option 2 repeats '1'", id="option repeats"),
    pytest.param(
        {"text": "<<A>>", "options": ["A", None]}, "option 2: expected a string, got null", id="option is null"
    ),
    pytest.param({"text": "<<A>>", "options": ["A", True]}, "option 2: .* got a boolean", id="option is a boolean"),
    pytest.param({"text": "<<A>>", "options": [1, float("inf")]}, "option 2: .* got a number", id="option is infinite"),
    pytest.param(
        {"text": "<<A>>", "options": [["A"], ["B"]]},
        "options: expected one list for each of 1 responses, got 2 lists",
        id="too many lists",
    ),
    pytest.param(
        {"text": "<<A>><<B>>", "options": [["A"], "B"]},
        "options of response 2: expected a list or null, got a string",
        id="list and string",
    ),
    pytest.param({"text": "<<A>>", "options": [["A", "A"]]}, "options of response 1: option 2 repeats 'A'", id="inner"),
]


class TestBadRows:
    @pytest.mark.parametrize(("row", "reason"), BAD_ROWS)
    def test_only_that_row_is_rejected(self, tmp_path: Path, row: bytes | dict[str, object], reason: str) -> None:
        line = row + b"\n" if isinstance(row, bytes) else json_lines([row])
        file = write(tmp_path / "s.jsonl", json_lines(ROWS[:2]) + line + json_lines(ROWS[2:]))
        transcripts, (error,) = read_all(file)
        assert [transcript.source.line for transcript in transcripts] == [1, 2, 4]
        assert (error.source.file, error.source.line) == (str(file), 3)
        assert re.search(reason, error.reason)
        assert str(error) == f"{file}:3: {error.reason}"

    def test_parquet_row_with_bad_utf8(self, tmp_path: Path) -> None:
        texts = pa.array([b"<<A>>", b"\xff<<A>>", b"<<B>>"]).cast(pa.binary()).view(pa.string())
        packed = io.BytesIO()
        pq.write_table(pa.table({"text": texts}), packed)
        transcripts, (error,) = read_all(write(tmp_path / "s.parquet", packed.getvalue()))
        assert [transcript.text for transcript in transcripts] == ["<<A>>", "<<B>>"]
        assert (error.source.line, error.reason) == (2, "text: not UTF-8: byte 0xff (invalid start byte)")

    def test_parquet_row_of_another_type(self, tmp_path: Path) -> None:
        transcripts, errors = read_all(write(tmp_path / "s.parquet", in_parquet([{"text": b"<<A>>"}])))
        assert (transcripts, [error.reason for error in errors]) == ([], ["text: expected a string, got bytes"])

    def test_parquet_without_the_column(self, tmp_path: Path) -> None:
        file = write(tmp_path / "s.parquet", in_parquet([{"prompt": "a", "id": 1}] * 5))
        transcripts, (error,) = read_all(file)
        assert transcripts == []
        assert error.reason == "text: expected a column of that name, got columns prompt, id"

    @pytest.mark.parametrize("key", ["participant", "experiment", "age"])
    def test_parquet_with_a_column_in_the_folders_names_alone(self, tmp_path: Path, key: str) -> None:
        """`df.to_parquet(folder, partition_cols=[key])` takes it out of the files."""
        file = write(tmp_path / "study=s" / f"{key}=1" / "part-0.parquet", in_parquet([{"text": "<<A>>"}] * 2))
        transcripts, (error,) = read_all(tmp_path)
        assert transcripts == []
        assert str(error).startswith(f"{file}:1: {key}: expected a column, it stands in the name of a folder alone; ")
        write(file, in_parquet([{"text": "<<A>>", key: "1"}]))
        assert [transcript.study for transcript in read_all(tmp_path)[0]] == ["s"]


class TestDamagedFiles:
    """Rows before the damage are kept, there is one error at the line reached, and the next file is read."""

    LONG: ClassVar[list[dict[str, object]]] = [
        {"text": f"{i} <<A>> " + hashlib.sha256(bytes([i])).hexdigest() * 9, "participant": i} for i in range(200)
    ]

    def damaged(self, tmp_path: Path, name: str, content: bytes) -> tuple[int, RowError]:
        file = write(tmp_path / f"a{name}", content)
        transcripts, (error,) = read_all(file, write(tmp_path / "b.jsonl"))
        assert [t.study for t in transcripts[-3:]] == ["b"] * 3
        kept = transcripts[:-3]
        assert [(t.study, t.source.line) for t in kept] == [("a", line) for line in range(1, len(kept) + 1)]
        assert error.source.file.split("!")[0] == str(file)
        assert error.source.line == len(kept) + 1
        return len(kept), error

    def test_truncated_gzip(self, tmp_path: Path) -> None:
        packed = gzip.compress(json_lines(self.LONG))
        kept, error = self.damaged(tmp_path, ".jsonl.gz", packed[: len(packed) // 2])
        assert 80 <= kept <= 120
        assert error.reason.startswith(f"file is damaged or truncated after line {kept}: Compressed file ended")

    def test_empty_gzip(self, tmp_path: Path) -> None:
        kept, error = self.damaged(tmp_path, ".jsonl.gz", b"")
        assert (kept, error.reason) == (0, "file is damaged or truncated after line 0: the file is empty")

    def test_gzip_with_a_wrong_checksum_keeps_every_row(self, tmp_path: Path) -> None:
        packed = bytearray(gzip.compress(json_lines(self.LONG)))
        packed[-5] ^= 1
        assert self.damaged(tmp_path, ".jsonl.gz", bytes(packed))[0] == 200

    def test_what_is_no_gzip(self, tmp_path: Path) -> None:
        kept, error = self.damaged(tmp_path, ".jsonl.gz", json_lines(self.LONG))
        assert (kept, error.reason[:60]) == (0, "file is damaged or truncated after line 0: Not a gzipped fil")

    def test_truncated_zip(self, tmp_path: Path) -> None:
        packed = zipped({"prompts.jsonl": json_lines(self.LONG)})
        kept, error = self.damaged(tmp_path, ".jsonl.zip", packed[: len(packed) // 2])
        assert (kept, error.reason) == (0, "file is damaged or truncated after line 0: File is not a zip file")

    def test_zip_with_a_damaged_member(self, tmp_path: Path) -> None:
        packed = bytearray(zipped({"prompts.jsonl": json_lines(self.LONG)}))
        middle = len(packed) // 2
        packed[middle : middle + 2000] = bytes(2000)
        file = write(tmp_path / "a.jsonl.zip", bytes(packed))
        transcripts, errors = read_all(file)
        assert 60 <= len(transcripts) <= 120
        assert errors[-1].source.file == f"{file}!prompts.jsonl"
        assert errors[-1].reason.startswith("file is damaged or truncated after line ")

    def test_zip_with_a_name_that_is_not_utf_8(self, tmp_path: Path) -> None:
        """Found by fuzzing: in the member's own header, and in the archive's directory."""
        whole = zipped({"ä/prompts.jsonl": json_lines(self.LONG)})
        for place in (whole.index("ä".encode()), whole.rindex("ä".encode())):
            packed = bytearray(whole)
            packed[place + 1] = ord("x")
            kept, error = self.damaged(tmp_path, ".jsonl.zip", bytes(packed))
            assert kept == 0
            assert error.reason.startswith("file is damaged or truncated after line 0: 'utf-8' codec can't decode")

    def test_truncated_parquet(self, tmp_path: Path) -> None:
        packed = in_parquet(self.LONG)
        kept, error = self.damaged(tmp_path, ".parquet", packed[: len(packed) // 2])
        assert kept == 0
        assert error.reason.startswith("file is damaged or truncated after row 0: Parquet magic bytes not found")

    def test_parquet_with_a_damaged_row_group(self, tmp_path: Path) -> None:
        packed = bytearray(in_parquet(self.LONG, row_group_size=50, use_dictionary=False))
        middle = len(packed) // 2 + 1000
        packed[middle : middle + 500] = b"\xff" * 500
        assert self.damaged(tmp_path, ".parquet", bytes(packed))[0] == 100


class TestFindResponses:
    @pytest.mark.parametrize(
        ("text", "responses"),
        [
            ("", []),
            ("a < b > c", []),
            ("<<>>", [""]),
            ("<<a>><<b>>", ["a", "b"]),
            ("<<a>>>", ["a"]),
            ("<<<a>>", ["<a"]),
            ("<< a > b < c >>", [" a > b < c "]),
            ("😀<<-1.5>>\n", ["-1.5"]),
        ],
    )
    def test_marks_are_taken_from_left_to_right(self, text: str, responses: list[str]) -> None:
        spans = find_responses(text)
        assert spans.dtype == np.int64
        assert spans.shape == (len(responses), 2)
        assert [text[first:last] for first, last in spans] == responses

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ("<<<<", "'<<' at character 2 inside the response that '<<' at 0 opens"),
            ("<<a>> b <<c <<d>>", "'<<' at character 12 inside the response that '<<' at 8 opens"),
            ("<<a <<", "'<<' at character 4 inside"),
            (">>", "'>>' at character 0 without"),
            ("<<a>>>>", "'>>' at character 5 without"),
            ("<<a>> b>> <<c>>", "'>>' at character 7 without"),
            ("a <<b>", "'<<' at character 2 is never closed"),
        ],
    )
    def test_nested_and_unbalanced_marks(self, text: str, reason: str) -> None:
        with pytest.raises(ValueError, match=reason):
            find_responses(text)

    def test_agrees_with_a_scan_of_both_marks(self) -> None:
        """Every text of up to eight characters from `<`, `>` and `a`, against one regular expression."""
        texts = [""]
        for _ in range(8):
            texts += [text + character for text in texts if len(text) == len(texts[-1]) for character in "<>a"]
        for text in texts:
            marks = [(mark[0], mark.start()) for mark in re.finditer("<<|>>", text)]
            balanced = [mark for mark, _ in marks] == ["<<", ">>"] * (len(marks) // 2)
            try:
                got = find_responses(text).tolist()
            except ValueError:
                got = None
            starts, ends = marks[::2], marks[1::2]
            expected = [[s + 2, e] for (_, s), (_, e) in zip(starts, ends, strict=True)] if balanced else None
            assert got == expected, text
