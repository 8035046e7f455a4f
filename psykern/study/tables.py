"""A comparison as text: the rows of a report's CSV files, the printed table, and how numbers are written."""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pa_csv

from psykern.study.results import Comparison, Interval, PairResult, ParticipantTable, RunResult


def tables(comparison: Comparison) -> dict[str, list[dict[str, Any]]]:
    """The rows of each CSV file; an estimate takes three columns, NaN is an empty cell."""
    every = [*comparison.pairs, *comparison.conditions]
    return {
        "models": [_model_row(result) for result in comparison.runs],
        "studies": [
            {"model": result.named.label, **_flat(row)} for result in comparison.runs for row in result.studies
        ],
        "pairs": [_pair_row(result) for result in every],
        "pair_studies": [
            {**_pair_names(result), "domain": comparison.domains.get(row.study, ""), **_flat(row)}
            for result in every
            for row in result.studies
        ],
        "effects": [
            {key: value for key, value in _flat(effect).items() if key != "values"} for effect in comparison.effects
        ],
        "calibration": [row for result in comparison.runs for row in _calibration_rows(result)],
    }


def _flat(row: Any) -> dict[str, Any]:
    """A dataclass as columns."""
    columns: dict[str, Any] = {}
    for field in dataclasses.fields(row):
        value = getattr(row, field.name)
        if isinstance(value, Interval):
            columns |= {field.name: value.value, f"{field.name}_low": value.low, f"{field.name}_high": value.high}
        else:
            columns[field.name] = value
    return columns


def _model_row(result: RunResult) -> dict[str, Any]:
    model, run = result.named.model, result.named.run
    means = {name: value for name, value in _flat(result.aggregate).items() if name not in ("study", "nll", "accuracy")}
    return {
        "model": result.named.label,
        "model_id": run.model_id,
        "condition": run.condition,
        "date": run.date or "",
        "family": model.family,
        "generation": model.generation,
        "size_billions": math.nan if model.size is None else model.size,
        "kind": model.kind,
        "studies": len(result.studies),
        "nll": result.nll.value,
        "nll_low": result.nll.low,
        "nll_high": result.nll.high,
        "accuracy": result.accuracy.value,
        "accuracy_low": result.accuracy.low,
        "accuracy_high": result.accuracy.high,
        "response_weighted_nll": result.response_weighted_nll,
        "participant_nll": result.participant_nll,
        "temperature": result.temperature,
        "pooled_calibration_error": result.calibration.error,
        "pooled_overconfidence": result.calibration.overconfidence,
        **means,
        "run": str(run.path),
    }


def _pair_names(result: PairResult) -> dict[str, Any]:
    pair = result.pair
    return {"base": pair.base.label, "post": pair.post.label, "kind": pair.kind}


def _pair_row(result: PairResult) -> dict[str, Any]:
    means = {name: value for name, value in _flat(result.aggregate).items() if name != "study"}
    return {
        **_pair_names(result),
        "generation": result.pair.post.model.generation,
        "studies": len(result.studies),
        "studies_base_wins": result.studies_base_wins,
        "sign_test_p": result.sign_test,
        **means,
    }


def _calibration_rows(result: RunResult) -> Iterable[dict[str, Any]]:
    bins = result.calibration
    for place, (count, confidence, hits) in enumerate(zip(bins.counts, bins.confidence, bins.hits, strict=True)):
        if count:
            low, high = place / len(bins.counts), (place + 1) / len(bins.counts)
            yield {
                "model": result.named.label,
                "bin_low": low,
                "bin_high": high,
                "responses": int(count),
                "mean_confidence": confidence / count,
                "share_of_hits": hits / count,
            }


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.10g}"
    return value


def write_participants(path: Path, table: ParticipantTable) -> None:
    studies, experiments, participants = zip(*table.participants, strict=True) if table.participants else ((), (), ())
    numbers = {
        "nll": table.nll,
        "accuracy": table.accuracy,
        "option_nll": table.option_nll,
    }
    columns = {
        "study": pa.array(studies, pa.string()),
        "experiment": pa.array(experiments, pa.string()),
        "participant": pa.array(participants, pa.string()),
        "scored": pa.array(table.scored).cast(pa.int64()),
        **{name: pa.array(values, from_pandas=True) for name, values in numbers.items()},  # NaN becomes an empty cell
    }
    pa_csv.write_csv(pa.table(columns), path)


def number(value: float, digits: int = 3, sign: bool = False) -> str:
    if math.isnan(value):
        return "–"
    text = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    return text.replace("-", "−")


def share(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.0%}"


def format_comparison(comparison: Comparison) -> str:
    """The printed table: a line per pair, with the mean effect and its interval; empty without pairs."""
    header = ("pair", "kind", "d", "95 %", "NLL difference", "95 %", "base better: studies", "participants")
    rows = [
        (
            f"{result.pair.post.label} − {result.pair.base.label}",
            result.pair.kind,
            *_value_and_interval(result.aggregate.d),
            *_value_and_interval(result.aggregate.difference),
            share(result.studies_base_wins),
            share(result.aggregate.participants_base_wins),
        )
        for result in (*comparison.pairs, *comparison.conditions)
    ]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return "\n".join(
        "  ".join(
            [
                *(c.ljust(w) for c, w in zip(row[:2], widths, strict=False)),
                *(c.rjust(w) for c, w in zip(row[2:], widths[2:], strict=True)),
            ]
        )
        for row in ((header, *rows) if rows else ())
    )


def _value_and_interval(value: Interval) -> tuple[str, str]:
    interval = "–" if math.isnan(value.low) else f"[{number(value.low)}, {number(value.high)}]"
    return number(value.value, sign=True), interval
