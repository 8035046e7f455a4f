"""The summary of a run: means against hand-computed values and plain loops, and the printed table."""

from __future__ import annotations

import dataclasses
import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from psykern.runs.summary import StudySummary, Summary, SummaryAccumulator, format_summary, option_hits
from psykern.scoring.table import SCHEMA
from psykern.study.metrics import accuracy, nll


def record(study: str = "study", response_index: int = 0, **columns: object) -> dict[str, object]:
    """A row of SCHEMA; what is not given is null."""
    row: dict[str, object] = dict.fromkeys(SCHEMA.names)
    return row | {"study": study, "response_index": response_index} | columns


def summarize(rows: list[dict[str, object]], cuts: tuple[int, ...] = ()) -> Summary:
    """The summary of ``rows``, added table by table as ``cuts`` divide them."""
    accumulator = SummaryAccumulator()
    bounds = (0, *cuts, len(rows))
    for start, end in pairwise(bounds):
        accumulator.add(pa.Table.from_pylist(rows[start:end], schema=SCHEMA))
    return accumulator.summary()


def random_rows(rng: np.random.Generator, count: int) -> list[dict[str, object]]:
    rows = []
    for i in range(count):
        scored, num_options = rng.random() < 0.8, int(rng.integers(0, 5))
        log_softmax = np.log(rng.dirichlet(np.ones(num_options))).tolist() if num_options else None
        index = int(rng.integers(-1, num_options))
        rows.append(
            record(
                f"study{rng.integers(4)}",
                i % 7,
                logprob=-5 * rng.random() if scored else None,
                is_argmax=bool(rng.random() < 0.4) if scored else None,
                entropy=float(np.float32(rng.random())) if scored else None,
                option_log_softmax=log_softmax,
                option_index=index if index >= 0 else None,
            )
        )
    return rows


def mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def study_by_loop(study: str, rows: list[dict[str, object]]) -> StudySummary:
    rows = [row for row in rows if row["study"] == study]
    scored = [row for row in rows if row["logprob"] is not None]
    chosen = [(row["option_log_softmax"], row["option_index"]) for row in rows if row["option_index"] is not None]
    return StudySummary(
        study=study,
        transcripts=sum(row["response_index"] == 0 for row in rows),
        responses=len(rows),
        scored=len(scored),
        mean_nll=mean([-row["logprob"] for row in scored]),
        accuracy=mean([row["is_argmax"] for row in scored]),
        mean_entropy=mean([row["entropy"] for row in scored]),
        option_responses=len(chosen),
        option_accuracy=mean([values.index(max(values)) == index for values, index in chosen]),
        mean_option_nll=mean([-values[index] for values, index in chosen]),
        uniform_option_nll=mean([math.log(len(values)) for values, _ in chosen]),
    )


def numbers(summary: Summary) -> list[float | int | None]:
    """Every number of a summary, in order."""
    studies = [value for study in summary.studies for value in dataclasses.astuple(study)[1:]]
    return [*studies, *dataclasses.astuple(summary)[1:]]


def test_nll_and_accuracy_leave_nulls_out() -> None:
    assert nll(np.array([-1.0, np.nan, -2.0])) == 1.5
    assert accuracy(np.array([1.0, np.nan, 0.0, 0.0, 0.0])) == 0.25
    assert accuracy(np.array([True, False])) == 0.5


@pytest.mark.parametrize("values", [[], [np.nan]], ids=["empty", "all null"])
def test_mean_of_nothing_is_nan(values: list[float]) -> None:
    assert math.isnan(nll(np.array(values)))
    assert math.isnan(accuracy(np.array(values)))


def test_option_hits_take_the_first_of_equals() -> None:
    log_softmax = np.log([0.5, 0.5, 0.2, 0.3, 0.5, 1.0, 0.5, 0.5])
    offsets = np.array([0, 2, 5, 6, 8])
    assert option_hits(log_softmax, offsets, np.array([0, 2, 0, 1])).tolist() == [True, True, True, False]
    assert option_hits(np.empty(0), np.array([0]), np.empty(0, np.int64)).tolist() == []


def test_summary_by_hand() -> None:
    quarter, half = math.log(0.25), math.log(0.5)
    rows = [
        record("b", 0, logprob=-1.0, is_argmax=True, entropy=0.5),
        record("b", 1, logprob=-2.0, is_argmax=False, entropy=1.5),
        record("b", 0),  # empty response of another transcript
        record("a", 0, logprob=-4.0, is_argmax=False, entropy=2.0, option_log_softmax=[half, half], option_index=1),
        record("a", 1, option_log_softmax=[quarter, half, quarter], option_index=1),  # empty, but an option
        record("a", 2, logprob=-6.0, is_argmax=False, entropy=2.0, option_log_softmax=[half, half]),  # not an option
        record("c", 0),
    ]
    summary = summarize(rows)
    a, b, c = summary.studies
    assert b == StudySummary("b", 2, 3, 2, 1.5, 0.5, 1.0, 0, None, None, None)
    assert c == StudySummary("c", 1, 1, 0, None, None, None, 0, None, None, None)
    assert (a.study, a.transcripts, a.responses, a.scored, a.mean_nll, a.accuracy) == ("a", 1, 3, 2, 5.0, 0.0)
    assert (a.option_responses, a.option_accuracy) == (2, 0.5)
    assert a.mean_option_nll == pytest.approx(math.log(2))
    assert a.uniform_option_nll == pytest.approx((math.log(2) + math.log(3)) / 2)
    assert summary.mean_nll == (1.5 + 5.0) / 2  # c has no scored response and does not count
    assert summary.accuracy == 0.25
    assert summary.response_weighted_nll == (1 + 2 + 4 + 6) / 4
    assert (summary.mean_option_nll, summary.uniform_option_nll) == (a.mean_option_nll, a.uniform_option_nll)


@pytest.mark.parametrize("seed", range(3))
def test_summary_equals_a_plain_loop(seed: int) -> None:
    rows = random_rows(np.random.default_rng(seed), 500)
    summary = summarize(rows)
    expected = [study_by_loop(f"study{i}", rows) for i in range(4)]
    assert [study.study for study in summary.studies] == [study.study for study in expected]
    mean_nll, mean_accuracy = (np.mean([getattr(s, name) for s in expected]) for name in ("mean_nll", "accuracy"))
    weighted = -np.mean([row["logprob"] for row in rows if row["logprob"] is not None])
    aggregate = [np.mean([getattr(s, name) for s in expected]) for name in ("mean_option_nll", "uniform_option_nll")]
    loop = Summary(tuple(expected), mean_nll, mean_accuracy, *aggregate, weighted)
    assert numbers(summary) == pytest.approx(numbers(loop), abs=1e-12)


@pytest.mark.parametrize("cuts", [(0,), (1, 2, 3), (250,), (77, 77, 490)], ids=str)
def test_cuts_between_tables_do_not_matter(cuts: tuple[int, ...]) -> None:
    rows = random_rows(np.random.default_rng(7), 500)
    assert numbers(summarize(rows, cuts)) == pytest.approx(numbers(summarize(rows)), abs=1e-12)


def test_sliced_and_chunked_tables_count_only_their_rows() -> None:
    rows = random_rows(np.random.default_rng(8), 300)
    whole = pa.Table.from_pylist(rows, schema=SCHEMA)
    accumulator = SummaryAccumulator()
    accumulator.add(pa.concat_tables([whole.slice(40, 100), whole.slice(200)]))
    assert numbers(accumulator.summary()) == pytest.approx(numbers(summarize(rows[40:140] + rows[200:])), abs=1e-12)


@pytest.mark.parametrize("tables", [0, 1], ids=["no table", "an empty table"])
def test_summary_of_nothing(tables: int) -> None:
    accumulator = SummaryAccumulator()
    for _ in range(tables):
        accumulator.add(SCHEMA.empty_table())
    summary = accumulator.summary()
    assert summary == Summary((), None, None, None, None, None)
    assert format_summary(summary).splitlines()[-1].split() == ["mean", "over", "studies", "0", "0", *"––––"]


def test_sums_of_tables_add_up_to_those_of_all(tmp_path: Path) -> None:
    """Through JSON, as parts hold them."""
    records = [record("a", logprob=-1.0, is_argmax=True, entropy=0.25), record("b"), record("a", logprob=-0.1)]
    whole = SummaryAccumulator()
    for one in records:
        part = SummaryAccumulator()
        part.add(pa.Table.from_pylist([one], schema=SCHEMA))
        whole.add_sums(json.loads(json.dumps(part.sums)))
    assert whole.summary() == summarize(records)


def test_summary_json_round_trip() -> None:
    summary = summarize([record("a", logprob=-1.0, is_argmax=True, entropy=0.25), record("b")])
    written = json.loads(json.dumps(summary.to_json()))
    assert [study["study"] for study in written["studies"]] == ["a", "b"]
    assert [study["mean_nll"] for study in written["studies"]] == [1.0, None]
    assert (written["mean_nll"], written["response_weighted_nll"]) == (1.0, 1.0)


def test_printed_table() -> None:
    summary = Summary(
        studies=(
            StudySummary("frey2017mpl", 6, 1200, 1200, 1.2345, 0.5, 1.0, 1200, 0.6, 0.61, 0.693),
            StudySummary("schiekiera2025metascience", 10, 90, 90, 2.0, 0.25, 1.0, 0, None, None, None),
        ),
        mean_nll=1.61725,
        accuracy=0.375,
        mean_option_nll=0.61,
        uniform_option_nll=0.693,
        response_weighted_nll=1.3,
    )
    assert format_summary(summary).splitlines() == [
        "study                      transcripts  responses    NLL  accuracy  option NLL  uniform NLL",
        "frey2017mpl                          6      1,200  1.234     0.500       0.610        0.693",
        "schiekiera2025metascience           10         90  2.000     0.250           –            –",
        "mean over studies                   16      1,290  1.617     0.375       0.610        0.693",
    ]


def test_printed_table_fits_100_columns() -> None:
    name = "a_study_name_that_is_much_too_long_for_a_line_2025_recognition"
    largest = StudySummary(name, 208_021, 25_906_599, 25_906_599, 1234.5, 1.0, 1.0, 1, 1.0, 1234.5, 10.0)
    line = format_summary(Summary((largest,), 1234.5, 1.0, 1234.5, 10.0, 1234.5)).splitlines()[1]
    assert len(line) <= 100
    shortened = line.split()[0]
    start, end = shortened.split("…")
    assert len(shortened) == 30
    assert name.startswith(start) and name.endswith(end) and len(start) > 10 and len(end) > 10


def test_study_name_cannot_steer_the_terminal() -> None:
    printed = format_summary(summarize([record("a\x1b[31m\nb")]))
    assert "a?[31m?b" in printed
    assert len(printed.splitlines()) == 3
