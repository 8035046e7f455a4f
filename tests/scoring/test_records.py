"""Rows in memory: the records of a run on the same rows in a file, whatever holds them, and the same rejects."""

from __future__ import annotations

import gc
import itertools
import json
import re
import threading
import time
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as limits
from hypothesis import strategies as st
from support import fuzzing
from support.frames import Frame, frames
from support.instant import InstantEngine
from support.scoring import assert_same_scores
from support.toy import CONTEXT, Row, Toy, make_talking, make_toy, make_toy_data, write_rows

import psykern
from psykern import DataError, PsykernError, Reject, RejectedRowsWarning, RowError, Scorer, Settings, load
from psykern.scoring.table import SCHEMA

BAD: list[Row] = [{"text": "<<never closed"}, {"text": "You say <<A>>.", "options": ["A", ""]}]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    folder = tmp_path_factory.mktemp("toy")
    return make_talking(make_toy_data(folder, count=4), folder / "talking")


@pytest.fixture(scope="module")
def scorer(toy: Toy) -> Scorer:
    return load(toy.model, device="cpu")


def in_a_file(toy: Toy, folder: Path, rows: list[Row], settings: Settings) -> pa.Table:
    data = write_rows(folder / "rows.jsonl", rows)
    return psykern.read_run(psykern.score(toy.model, data, folder / "run", replace(settings, device="cpu")).folder)


def without_names(table: pa.Table) -> pa.Table:
    """Those whom a row does not name are called after file and line, or after their index."""
    names = [re.sub(r"^([0-9a-f]{8}|row):\d+$", "nobody", name) for name in table["participant"].to_pylist()]
    place = table.schema.get_field_index("participant")
    return table.set_column(place, "participant", pa.array(names, pa.string()))


def assert_equal(one: pa.Table, two: pa.Table) -> None:
    assert one.schema == SCHEMA and one.num_rows == two.num_rows > 0
    assert_same_scores(without_names(one).combine_chunks(), without_names(two).combine_chunks())


@pytest.mark.parametrize(
    "settings",
    [
        Settings(protocol=protocol, condition=condition, options=options)
        for protocol, condition, options in itertools.product(
            ("exact", "study"), ("plain", "chat", "persona"), ("given", "observed-experiment")
        )
    ]
    + [
        Settings(boundary="split", options="observed", max_options=5),
        Settings(discrete="[A-Z]", studies=("bandit",), limit=2),
        Settings(over_length="skip", wave_tokens=70, batch_tokens=30, unit_tokens=200),
        Settings(options="none", dtype="float32", backend="auto"),
    ],
    ids=lambda s: "-".join(map(str, (s.protocol, s.condition, s.options, s.boundary, s.unit_tokens))),
)
def test_records_are_those_of_a_file(settings: Settings, toy: Toy, scorer: Scorer, tmp_path: Path) -> None:
    rows = [*toy.rows, *BAD, {"text": toy.rows[-1]["text"], "participant": " "}]
    rejects: list[Reject] = []
    table = scorer.score(rows, settings, rejects=rejects)
    assert_equal(table, in_a_file(toy, tmp_path, rows, settings))
    lines = (tmp_path / "run" / "rejects.jsonl").read_text() if rejects else ""
    there = [json.loads(line) for line in lines.splitlines()]
    assert sorted((r["line"] - 1, r["reason"]) for r in there) == [(r.index, r.reason) for r in rejects]


def awkward_rows(toy: Toy) -> list[Row]:
    """With gaps in columns of numbers, lists of lists, and a column that nobody asks for."""
    rows = [row | {"picture": "gif", "options": [["7", "1"]] * 5 if row["study"] == "ratings" else row.get("options")}
            for row in toy.rows]  # fmt: skip
    rows = [row | {"participant": None if i % 3 == 2 else i, "age": 20 + i} for i, row in enumerate(rows)]
    nested = [row for row in rows if row["study"] == "ratings"]
    return nested + [row | {"options": None} for row in rows if row["study"] == "words"]


@pytest.mark.parametrize("holder", list(frames([{"text": "a"}])))
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_whatever_holds_them(holder: str, stream: bool, toy: Toy, scorer: Scorer, tmp_path: Path) -> None:
    rows = awkward_rows(toy)
    settings = Settings(condition="persona", unit_tokens=30)
    expected = in_a_file(toy, tmp_path, rows, settings)
    assert {"7", "4"} < set(expected["participant"].to_pylist()) and expected["options"].null_count
    held = frames(rows)[holder]
    if stream:
        batches = list(scorer.score(held, settings, stream=True))
        assert len(batches) > 3
        table = pa.Table.from_batches(batches)
    else:
        table = scorer.score(held, settings)
    assert_equal(table, expected)


def test_real_frames_where_they_are_installed(toy: Toy, scorer: Scorer) -> None:
    pandas = pytest.importorskip("pandas", reason="needs pandas")
    rows = awkward_rows(toy)
    assert_equal(scorer.score(pandas.DataFrame(rows)), scorer.score(rows))


def test_real_polars_where_it_is_installed(toy: Toy, scorer: Scorer) -> None:
    polars = pytest.importorskip("polars", reason="needs polars")
    rows = awkward_rows(toy)
    assert_equal(scorer.score(polars.DataFrame(rows)), scorer.score(rows))


def test_real_data_sets_where_they_are_installed(toy: Toy, scorer: Scorer) -> None:
    datasets = pytest.importorskip("datasets", reason="needs datasets")
    rows = awkward_rows(toy)
    assert_equal(scorer.score(datasets.Dataset.from_list(rows)), scorer.score(rows))
    assert_equal(scorer.score(datasets.Dataset.from_list(rows).to_iterable_dataset()), scorer.score(rows))


def test_numbers_are_their_digits(scorer: Scorer) -> None:
    """0.1 in 32 bits is 0.10000000149011612 in 64."""
    column = pa.array([0.1, 7], pa.float32())
    table = pa.table({"text": ["<<a>> b <<c>>"] * 2, "participant": column})
    dicts = [
        {"text": np.str_("a <<a>>"), "participant": np.float32(0.1)},
        {"text": "a <<a>>", "participant": np.int8(7)},
    ]
    halves = [{"text": "a <<0.1>>", "participant": np.datetime64("NaT"), "options": np.array([0.1, 3], np.float16)}]
    assert scorer.score(table)["participant"].unique().to_pylist() == ["0.1", "7"]
    assert scorer.score(dicts)["participant"].to_pylist() == ["0.1", "7"]
    (record,) = scorer.score(halves).to_pylist()
    assert (record["participant"], record["options"], record["option_index"]) == ("row:0", ["0.1", "3"], 0)


@pytest.mark.parametrize("holder", [list, tuple, iter, np.array, pa.array, lambda t: pa.chunked_array([t])])
def test_texts_alone(holder: Callable[[list[str]], object], scorer: Scorer) -> None:
    texts = ["I say <<yes>>.", "I say <<no>> and <<yes>>."]
    table = scorer.score(holder(texts), study="sayings")
    assert table["response"].to_pylist() == ["yes", "no", "yes"]
    assert table["participant"].to_pylist() == ["row:0", "row:1", "row:1"]
    assert set(table["study"].to_pylist()) == {"sayings"}


def test_nothing_gives_no_record(scorer: Scorer) -> None:
    assert scorer.score([]).equals(SCHEMA.empty_table())
    assert list(scorer.score([], stream=True)) == []
    assert scorer.score(["no response"]).equals(SCHEMA.empty_table())


# Rows that cannot be used


def test_rejects_are_objects_or_a_warning(scorer: Scorer) -> None:
    rows: list[Any] = [BAD[0], "fine <<A>>", 5, None, BAD[1], b"x", {"txt": "a"}]
    expected = [
        Reject(0, "text: '<<' at character 0 is never closed"),
        Reject(2, "row: expected a dict or a text, got a number"),
        Reject(3, "row: expected a dict or a text, got null"),
        Reject(4, "options: option 2 is empty"),
        Reject(5, "row: expected a dict or a text, got bytes"),
        Reject(6, "text: missing"),
    ]
    for stream in (False, True):
        rejects = [Reject(99, "of another call")]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            records: Any = scorer.score(rows, stream=stream, rejects=rejects)  # type: ignore[call-overload]
            assert sum(part.num_rows for part in ([records] if not stream else records)) == 1
        assert rejects == [Reject(99, "of another call"), *expected]
    message = (
        r"6 rows were not scored, the first: rows\[0\]: text: '<<' at character 0 is never closed; give rejects=\[\]"
    )
    with pytest.warns(RejectedRowsWarning, match=message) as caught:
        scorer.score(rows)
    assert [Path(warning.filename).name for warning in caught] == ["test_records.py"]
    with pytest.warns(RejectedRowsWarning, match=message) as caught:
        list(scorer.score(rows, Settings(unit_tokens=1), stream=True))
    assert [Path(warning.filename).name for warning in caught] == ["test_records.py"]


def test_strict_raises_the_first(scorer: Scorer) -> None:
    with pytest.raises(RowError, match=r"^rows\[1\]: options: option 2 is empty$"):
        scorer.score(["a <<A>>", BAD[1], BAD[0]], Settings(strict=True))


def test_messages_name_the_row(toy: Toy, tmp_path: Path) -> None:
    make_toy(tmp_path, max_position_embeddings=CONTEXT)
    scorer = load(tmp_path, device="cpu")
    long = "word " * CONTEXT + "<<A>>"
    with pytest.raises(PsykernError, match=r"^rows\[1\]: s, participant row:1: needs \d+ tokens of context"):
        scorer.score(["<<A>> short", long], study="s")
    assert scorer.score(["a <<A>> short", long], Settings(over_length="skip"), study="s").num_rows == 1


class Module:
    """Neither a row nor a holder of rows."""


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ("You say <<A>>.", TypeError, r"rows: expected a list, got one text; for a single row give \[text\]"),
        ({"text": "You say <<A>>."}, TypeError, r"rows: expected a list, got one dict; for a single row give \[row\]"),
        (Path("rows.jsonl"), TypeError, "got PosixPath; for files take psykern.score"),
        (b"You say", TypeError, "got bytes; decode it first"),
        (None, TypeError, "rows: expected dicts or texts in a list.*, got NoneType"),
        (7, TypeError, "got int"),
        (Module(), TypeError, "got Module"),
        (pa.table({"txt": ["a"]}), ValueError, "text: expected a column of that name, got columns txt"),
        (Frame([{"txt": "a"}]), ValueError, "text: expected a column of that name, got columns txt"),
        (pa.table([["a"], ["b"]], names=["text", "text"]), ValueError, "text: expected one column of that name, got 2"),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_what_holds_no_rows(rows: Any, error: type[Exception], message: str, stream: bool, scorer: Scorer) -> None:
    with pytest.raises(error, match=message):
        scorer.score(rows, stream=stream)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Settings(dtype="bfloat16"), "dtype: expected 'auto' or 'float32', as the model is loaded, got 'bfloat16'"),
        (Settings(backend="reference"), "backend: expected 'auto' or 'cpu', as the model is loaded, got 'reference'"),
        (Settings(device="cuda"), "device: expected 'auto' or 'cpu', as the model is loaded, got 'cuda'"),
    ],
    ids=["dtype", "backend", "device"],
)
def test_settings_that_contradict_the_model(settings: Settings, message: str, scorer: Scorer) -> None:
    with pytest.raises(ValueError, match=message):
        scorer.score(["<<a>>"], settings)


def test_a_study_that_is_not_there(scorer: Scorer) -> None:
    with pytest.raises(DataError, match="studies: no transcript of other, third in the rows"):
        scorer.score(["a <<a>>"], Settings(studies=("other", "rows", "third")))
    with pytest.raises(ValueError, match="study: expected a name"):
        scorer.score(["a <<a>>"], study="")


def test_an_experiments_options_need_rows_twice(toy: Toy, scorer: Scorer) -> None:
    settings = Settings(options="observed-experiment", unit_tokens=50)
    expected = scorer.score(toy.rows, settings)
    assert_equal(scorer.score(iter(toy.rows), settings), expected)
    assert_equal(pa.Table.from_batches(list(scorer.score(toy.rows, settings, stream=True))), expected)
    with pytest.raises(ValueError, match="observed-experiment' goes through them twice, got list_iterator"):
        scorer.score(iter(toy.rows), settings, stream=True)


# Streams


def test_a_stream_is_in_the_memory_of_a_unit(scorer: Scorer) -> None:
    stand_in = replace(scorer, engine=InstantEngine())  # type: ignore[arg-type]
    rows = ({"text": f"{i} " + "x" * 3000 + " <<A>>", "participant": i} for i in range(361))  # 1 MB

    def peak(held: Iterator[Row]) -> int:
        gc.collect()
        tracemalloc.start()
        count = sum(batch.num_rows for batch in stand_in.score(held, Settings(unit_tokens=10_000), stream=True))
        assert count >= 60
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    list(stand_in.score(itertools.islice(rows, 1), stream=True))  # what is imported for the first would be most of it
    few = peak(itertools.islice(rows, 60))
    assert peak(rows) < 1.3 * few


def test_a_stream_that_is_closed_stops_its_work(scorer: Scorer) -> None:
    """Also where the next unit would take long to come."""
    taken = itertools.count()

    def slowly() -> Iterator[str]:
        yield f"{'a long one ' * 50} says <<yes>>."  # fills a unit
        for i in taken:
            time.sleep(0.05)
            yield f"{i} says <<yes>>."

    scorer.score(["says <<yes>>."])  # the model has a thread of its own from its first wave on
    before = threading.active_count()
    batches = scorer.score(slowly(), Settings(unit_tokens=130), stream=True)
    assert next(batches)["response"].to_pylist() == ["yes"]
    began = time.monotonic()
    batches.close()
    assert time.monotonic() - began < 2
    assert threading.active_count() == before
    assert next(taken) < 20


def test_an_error_of_the_rows_own_is_the_callers(scorer: Scorer) -> None:
    def broken() -> Iterator[str]:
        yield "fine <<A>>"
        raise ZeroDivisionError("of the caller's")

    with pytest.raises(ZeroDivisionError, match="of the caller's"):
        scorer.score(broken())


def by_study(table: pa.Table) -> pa.Table:
    """Its studies in the order of their names; the records of each as they are."""
    studies = table.column("study").to_pylist()
    return table.take(sorted(range(len(studies)), key=lambda row: (studies[row] is not None, studies[row] or "")))


def test_studies_that_lie_among_each_other(scorer: Scorer, tmp_path: Path) -> None:
    """Found by the test below."""
    texts = [f"You say <<A>>, then <<{word}>>." for word in ("B", "C", "D", "E")]
    rows = [{"text": text, "study": "ab"[number % 2]} for number, text in enumerate(texts)]
    settings = Settings(device="cpu", unit_tokens=1)
    table = scorer.score(rows, settings)
    run = psykern.score(scorer, write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "run", settings)
    assert_equal(by_study(table), by_study(psykern.read_run(run.folder)))
    assert by_study(table).column("response").to_pylist() == ["A", "B", "A", "D", "A", "C", "A", "E"]


@limits(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(rows=fuzzing.ROWS, settings=fuzzing.SETTINGS, marks=st.sampled_from(["keep", "drop"]))
def test_any_rows_are_scored_or_refused_as_in_a_file(
    rows: list[Row], settings: Settings, marks: Any, scorer: Scorer
) -> None:
    settings = replace(settings, marks=marks if settings.protocol == "exact" else "keep")
    rejects: list[Reject] = []
    table = scorer.score(rows, settings, rejects=rejects)
    with fuzzing.new_folder("memory") as folder:
        run = psykern.score(scorer, write_rows(folder / "rows.jsonl", rows), folder / "run", settings)
        assert table.num_rows == run.manifest.counts.responses
        if (
            table.num_rows
        ):  # studies that lie among each other come one after the other, within a window of its own size
            assert_equal(by_study(table), by_study(psykern.read_run(run.folder)))
        lines = (folder / "run" / "rejects.jsonl").read_text().splitlines() if rejects else []
        there = sorted((reject["line"] - 1, reject["reason"]) for reject in map(json.loads, lines))
    assert there == [(reject.index, reject.reason) for reject in rejects]


def test_one_row_of_a_frame_and_arrays_without_dimensions(scorer: Scorer) -> None:
    """Such a row's values would be taken for texts; a cell that cannot be used is its row's fault alone."""

    class OneRow(list[str]):
        iloc, index = None, ["text", "study"]

    with pytest.raises(TypeError, match=r"rows: expected a list, got one row of a frame; .* frame\.iloc\[\[number\]\]"):
        scorer.score(OneRow(["I say <<yes>>.", "sayings"]))
    with pytest.raises(TypeError, match=r"rows: expected dicts .* got an array without dimensions"):
        scorer.score(np.array("I say <<yes>>."))
    rejects: list[Reject] = []
    rows = [{"text": np.array("a <<b>>"), "options": np.array(5)}, {"text": np.array("a <<b>>")}, ("a <<b>>",)]
    assert scorer.score(rows, rejects=rejects)["participant"].to_pylist() == ["row:1"]
    assert [(reject.index, reject.reason) for reject in rejects] == [
        (0, "options: expected a list, got a number"),
        (2, "row: expected a dict or a text, got a tuple"),
    ]


def test_a_stream_ends_where_its_scorer_is_closed(toy: Toy) -> None:
    own = load(toy.model, device="cpu")
    batches = own.score((f"{i} says <<yes>>." for i in itertools.count()), Settings(unit_tokens=30), stream=True)
    next(batches)
    own.close()
    with pytest.raises(PsykernError, match="is closed; load the model again"):
        for _ in range(3):
            next(batches)
