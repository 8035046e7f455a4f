"""The means per study that a run is summed up by, and their printed table."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

_STUDY_WIDTH = 30  # the longest study column with which a line fits 100 characters


def option_hits(log_softmax: np.ndarray, offsets: np.ndarray, option_index: np.ndarray) -> np.ndarray:
    """Whether each response is the likeliest of its options (the first of equals).

    ``log_softmax`` [offsets[-1]] float and ``offsets`` [R+1] int: each response's options, at least one.
    ``option_index`` [R] int: the option that is the response. Returns [R] bool.
    """
    starts, num_options = offsets[:-1], np.diff(offsets)
    if not len(starts):
        return np.zeros(0, dtype=bool)
    best = np.repeat(np.maximum.reduceat(log_softmax, starts), num_options)
    entry = np.arange(len(log_softmax))
    first_best = np.minimum.reduceat(np.where(log_softmax == best, entry, len(entry)), starts)
    return np.asarray(first_best - starts == option_index)


@dataclass(frozen=True, slots=True)
class StudySummary:
    """One study of a run. A mean is None when no response has what it is the mean of."""

    study: str
    transcripts: int  # with at least one response
    responses: int
    scored: int  # responses with a log-probability
    mean_nll: float | None  # nats
    accuracy: float | None
    mean_entropy: float | None  # nats, at a response's first token
    option_responses: int  # responses that are one of their options; the next three are over these
    option_accuracy: float | None  # share that is the likeliest option, the first of equals
    mean_option_nll: float | None  # nats
    uniform_option_nll: float | None  # nats


@dataclass(frozen=True, slots=True)
class Summary:
    """A run: its studies by name, and unweighted means over the studies that have the value."""

    studies: tuple[StudySummary, ...]
    mean_nll: float | None
    accuracy: float | None
    mean_option_nll: float | None
    uniform_option_nll: float | None
    response_weighted_nll: float | None  # mean over all scored responses, whatever their study

    def to_json(self) -> dict[str, Any]:
        """As summary.json holds it."""
        return dataclasses.asdict(self)


class _Sums(NamedTuple):
    """Sums over responses: per study of one batch ([studies] float64 each), or of one study (float)."""

    transcripts: Any
    responses: Any
    scored: Any
    nll: Any
    hits: Any
    entropy: Any
    option_responses: Any
    option_hits: Any
    option_nll: Any
    uniform_nll: Any


class SummaryAccumulator:
    """Adds up tables of records (``table.SCHEMA``) without keeping them; how they are cut does not matter."""

    def __init__(self) -> None:
        self._sums: dict[str, _Sums] = {}

    def add(self, table: pa.Table) -> None:
        """Count in the responses of ``table``."""
        for batch in table.to_batches():
            studies = batch.column("study").dictionary_encode()
            sums = _batch_sums(batch, studies.indices.to_numpy(), len(studies.dictionary))
            self.add_sums(
                {
                    study: [float(column[place]) for column in sums]
                    for place, study in enumerate(studies.dictionary.to_pylist())
                }
            )

    @property
    def sums(self) -> dict[str, tuple[float, ...]]:
        """By study, for :meth:`add_sums` of another accumulator."""
        return {study: tuple(sums) for study, sums in self._sums.items()}

    def add_sums(self, sums: Mapping[str, Sequence[float]]) -> None:
        """Count in what another accumulator's ``sums`` hold."""
        for study, new in sums.items():
            before = self._sums.get(study, (0.0,) * len(_Sums._fields))
            self._sums[study] = _Sums(*(one + two for one, two in zip(before, new, strict=True)))

    def summary(self) -> Summary:
        """What was added so far."""
        studies = tuple(_study_summary(study, self._sums[study]) for study in sorted(self._sums))
        return Summary(
            studies=studies,
            mean_nll=_mean_of_known([s.mean_nll for s in studies]),
            accuracy=_mean_of_known([s.accuracy for s in studies]),
            mean_option_nll=_mean_of_known([s.mean_option_nll for s in studies]),
            uniform_option_nll=_mean_of_known([s.uniform_option_nll for s in studies]),
            response_weighted_nll=_ratio(
                math.fsum(s.nll for s in self._sums.values()), math.fsum(s.scored for s in self._sums.values())
            ),
        )


def _batch_sums(batch: pa.RecordBatch, study: np.ndarray, num_studies: int) -> _Sums:
    """``study`` [R] int: which study each response of ``batch`` belongs to."""

    def total(values: np.ndarray, of: np.ndarray = study) -> np.ndarray:
        return np.bincount(of, weights=values, minlength=num_studies)

    def numbers(name: str) -> np.ndarray:  # nulls become 0 and add nothing
        column: np.ndarray = batch.column(name).cast(pa.float64()).fill_null(0.0).to_numpy()
        return column

    scored = batch.column("logprob").is_valid().to_numpy(zero_copy_only=False)
    option_index = batch.column("option_index").fill_null(-1).to_numpy()
    num_options = batch.column("option_log_softmax").value_lengths().fill_null(0).to_numpy()
    log_softmax = batch.column("option_log_softmax").flatten().to_numpy()
    known = (option_index >= 0) & (num_options > 0)
    offsets = np.concatenate([[0], np.cumsum(num_options[known])])
    log_softmax = log_softmax[np.repeat(known, num_options)]  # of responses that are one of their options
    chosen = option_index[known]
    return _Sums(
        transcripts=total(batch.column("response_index").to_numpy() == 0),  # participants repeat, this does not
        responses=total(np.ones(len(study))),
        scored=total(scored),
        nll=total(-numbers("logprob")),
        hits=total(numbers("is_argmax")),
        entropy=total(numbers("entropy")),
        option_responses=total(known),
        option_hits=total(option_hits(log_softmax, offsets, chosen), study[known]),
        option_nll=total(-log_softmax[offsets[:-1] + chosen], study[known]),
        uniform_nll=total(np.log(num_options[known]), study[known]),
    )


def _study_summary(study: str, sums: _Sums) -> StudySummary:
    return StudySummary(
        study=study,
        transcripts=int(sums.transcripts),
        responses=int(sums.responses),
        scored=int(sums.scored),
        mean_nll=_ratio(sums.nll, sums.scored),
        accuracy=_ratio(sums.hits, sums.scored),
        mean_entropy=_ratio(sums.entropy, sums.scored),
        option_responses=int(sums.option_responses),
        option_accuracy=_ratio(sums.option_hits, sums.option_responses),
        mean_option_nll=_ratio(sums.option_nll, sums.option_responses),
        uniform_option_nll=_ratio(sums.uniform_nll, sums.option_responses),
    )


def _ratio(total: float, count: float) -> float | None:
    return total / count if count else None


def _mean_of_known(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return _ratio(math.fsum(known), len(known))


def format_summary(summary: Summary) -> str:
    """The printed table: a line per study, and last the mean over studies beside the total counts."""
    header = ("study", "transcripts", "responses", "NLL", "accuracy", "option NLL", "uniform NLL")
    rows = [
        (
            _shorten(s.study, _STUDY_WIDTH),
            f"{s.transcripts:,}",
            f"{s.responses:,}",
            *_decimals(s.mean_nll, s.accuracy, s.mean_option_nll, s.uniform_option_nll),
        )
        for s in summary.studies
    ]
    last = (
        "mean over studies",
        f"{sum(s.transcripts for s in summary.studies):,}",
        f"{sum(s.responses for s in summary.studies):,}",
        *_decimals(summary.mean_nll, summary.accuracy, summary.mean_option_nll, summary.uniform_option_nll),
    )
    widths = [max(map(len, column)) for column in zip(header, *rows, last, strict=True)]
    return "\n".join(_line(row, widths) for row in (header, *rows, last))


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    numbers = (cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))
    return "  ".join((cells[0].ljust(widths[0]), *numbers))


def _decimals(*values: float | None) -> tuple[str, ...]:
    return tuple("–" if value is None else f"{value:.3f}" for value in values)


def _shorten(name: str, width: int) -> str:
    """``name`` in at most ``width`` characters, the middle left out; what a terminal would act on becomes '?'."""
    name = "".join(char if char.isprintable() else "?" for char in name)
    if len(name) <= width:
        return name
    tail = (width - 1) // 2
    return f"{name[: width - 1 - tail]}…{name[len(name) - tail :]}"
