"""Rows in memory to records, as :func:`psykern.score` writes them of files.

    rows ─► Transcript ─► Unit ─► EncodedUnit ─► PlannedUnit ─ Engine.pairs ─► TargetScores ─► pyarrow.Table

Reading, encoding and planning of what comes next go on in threads beside the computing. Memory is bounded by the unit
(``settings.unit_tokens``), not by the rows.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import takewhile
from threading import Event
from typing import TYPE_CHECKING

import pyarrow as pa

from psykern.core.clock import Clock
from psykern.core.errors import DataError, RejectedRowsWarning, RowError
from psykern.core.settings import Settings, check_loaded
from psykern.core.stages import ahead
from psykern.core.types import EncodedUnit, Transcript
from psykern.data.encode import Encoder
from psykern.data.feed import Observed, encode_unit
from psykern.data.memory import Rows
from psykern.data.rows import Choice
from psykern.data.units import Unit, units
from psykern.scoring.results import Reject
from psykern.scoring.table import SCHEMA, to_table
from psykern.scoring.units import planned, with_unit_tokens

if TYPE_CHECKING:
    from psykern.scoring.scorer import Scorer


def to_score(scorer: Scorer, rows: object, settings: Settings | None, study: str, *, stream: bool) -> Records:
    """``rows`` that ``scorer`` can score under ``settings``; raises what :meth:`.Scorer.score` says of its arguments,
    before anything is computed. ``stream``: they are to be gone through without being kept."""
    settings = settings or Settings()
    check_settings(scorer, settings)
    if not study:
        raise ValueError("study: expected a name for rows that do not name theirs, got an empty string")
    own = replace(with_unit_tokens(settings, scorer.model.compute), date=settings.date or Clock().day)
    held = Rows.of(rows)
    if own.options == "observed-experiment":
        if stream and held.once:
            raise ValueError(
                f"rows: options='observed-experiment' goes through them twice, got {type(rows).__name__}, which can be "
                "gone through once; give a list or a table, or leave out stream"
            )
        held = held.kept()
    return Records(scorer, held, study, scorer.language.encoder(own))


def check_settings(scorer: Scorer, settings: Settings) -> None:
    """Raises ValueError where ``settings`` contradict the model that is loaded."""
    scorer.model.compute.check(settings)
    check_loaded(settings, {"implementation": scorer.model.spec.implementation.partition(":")[0]})


@dataclass(frozen=True, slots=True, eq=False)
class Records:
    """Rows in memory that can be scored. Made by :func:`to_score`."""

    scorer: Scorer
    rows: Rows
    study: str  # of rows that do not name theirs
    encoder: Encoder  # its settings name unit_tokens

    def table(self, rejects: list[Reject] | None) -> pa.Table:
        """All records; see :meth:`.Scorer.score`."""
        refused: list[Reject] = []
        tables: list[pa.Table] = [SCHEMA.empty_table()]
        for own, table in self._scored():
            refused += own
            tables.append(table)
        refused.sort(key=lambda reject: reject.index)
        if rejects is not None:
            rejects += refused
        elif refused:
            _warn(len(refused), refused[0], stacklevel=4)
        return pa.concat_tables(tables)

    def batches(self, rejects: list[Reject] | None) -> Generator[pa.RecordBatch, None, None]:
        """The records as they come; see :meth:`.Scorer.score`."""
        first, count = None, 0
        with closing(self._scored()) as scored:
            for own, table in scored:
                if rejects is not None:
                    rejects += own
                elif own:
                    first, count = first or own[0], count + len(own)
                yield from table.to_batches()
        if first is not None:
            _warn(count, first, stacklevel=3)

    def _scored(self) -> Generator[tuple[list[Reject], pa.Table], None, None]:
        """The rows refused in each unit, and its records."""
        scorer, settings = self.scorer, self.encoder.settings
        budgets, max_positions = scorer.budgets.under(settings), scorer.model.spec.max_positions
        queue, left = scorer._queue, Event()
        queue.check()

        def closed() -> bool:
            queue.check()
            return False

        with (
            ahead(self._units(left)) as read,
            ahead(self._encoded(read)) as encoded,
            ahead(planned(encoded, settings, max_positions, budgets)) as ready,
            closing(scorer.engine.pairs(ready, stop=closed)) as pairs,
        ):
            try:
                for item, scores in pairs:
                    refused = [Reject(error.source.line, error.reason) for error in item.unit.rejects]
                    yield sorted(refused, key=lambda reject: reject.index), to_table(item.transcripts, scores)
            finally:
                left.set()  # the threads are waited for: do not fill a unit from a slow source first

    def _encoded(self, read: Iterator[Unit]) -> Iterator[EncodedUnit]:
        settings, observed = self.encoder.settings, Observed(self.encoder)
        if settings.options == "observed-experiment":
            deque(observed.seeing(self._transcripts(Event())), maxlen=0)
        for unit in read:
            encoded = encode_unit(self.encoder, unit, observed.options())
            if settings.strict and encoded.rejects:
                raise encoded.rejects[0]
            yield encoded

    def _units(self, left: Event) -> Iterator[Unit]:
        """In the order of the rows: a stream must not wait for more of them than a unit holds."""
        unit_tokens = self.encoder.settings.unit_tokens
        assert unit_tokens is not None
        return units(self._transcripts(left), unit_tokens=unit_tokens, window_tokens=unit_tokens)

    def _transcripts(self, left: Event) -> Iterator[Transcript | RowError]:
        """Until ``left`` is set."""
        choice = Choice(self.encoder.settings.studies, self.encoder.settings.limit)
        yield from takewhile(lambda _: not left.is_set(), self.rows.transcripts(self.study, choice))
        if choice.absent:
            raise DataError(f"studies: no transcript of {', '.join(choice.absent)} in the rows")


def _warn(count: int, first: Reject, *, stacklevel: int) -> None:
    rows = "1 row was" if count == 1 else f"{count:,} rows were"
    warnings.warn(
        f"{rows} not scored, the first: rows[{first.index}]: {first.reason}; give rejects=[] to be told of each",
        RejectedRowsWarning,
        stacklevel=stacklevel,
    )
