"""The units of a data set as tokens: from the token cache where they are there, else from the rows.

The data are read once to cut them into units, which takes neither tokenizer nor model, and again to encode the units
that are wanted. With a warm token cache they are not read at all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, field
from typing import Protocol

from psykern.core.errors import DataError, RowError
from psykern.core.stages import ahead
from psykern.core.types import EncodedUnit, UnitInfo
from psykern.data.encode import Encoder
from psykern.data.files import DataFile
from psykern.data.token_cache import TokenCache
from psykern.data.units import Unit, units


class Clock(Protocol):
    """Counts the time spent inside as a phase."""

    def __call__(self, phase: str) -> AbstractContextManager[object]: ...


@dataclass(slots=True)
class Feed:
    """Encoded units of ``files``; ``unit_tokens``, ``studies`` and ``limit`` are those of ``units.units``.

    ``encoder`` must not depend on the model's context. With ``strict`` the first refused row is raised.
    """

    files: Sequence[DataFile]
    encoder: Encoder
    clock: Clock
    unit_tokens: int
    studies: tuple[str, ...] | None = None
    limit: int | None = None
    strict: bool = False
    cache: TokenCache | None = None
    _observed: Mapping[tuple[str, str], tuple[str, ...]] | None = field(default=None, init=False)

    def units(self) -> list[UnitInfo]:
        """All units in order. Raises DataError where a study that was asked for has no transcript."""
        known = self.cache.read_units() if self.cache else None
        return self._scan() if known is None else known

    def encoded(self, wanted: Sequence[UnitInfo]) -> Iterator[EncodedUnit]:
        """The units ``wanted``, which must ascend. Raises DataError where the data are not what :meth:`units` saw."""
        with closing(self._rows()) as rows:
            for info in wanted:
                unit = self._cached(info)
                if unit is None:
                    unit = self._encode(self._find(info, rows))
                    if self.cache:
                        with self.clock("encode"):
                            self.cache.write(unit)
                self._refuse(unit.rejects)
                yield unit

    def _scan(self) -> list[UnitInfo]:
        found = []
        studies = set()
        first_reject: RowError | None = None
        num_rejects = 0
        observed: dict[tuple[str, str], dict[str, None]] = defaultdict(dict)
        for unit in units(self.files, unit_tokens=self.unit_tokens, studies=self.studies, limit=self.limit):
            self._refuse(unit.rejects)
            found.append(unit.info)
            studies.add(unit.info.study)
            num_rejects += len(unit.rejects)
            first_reject = first_reject or next(iter(unit.rejects), None)
            if self.encoder.options == "observed-experiment":
                _observe(unit, observed, self.encoder)
        absent = sorted(set(self.studies or ()) - studies)
        if absent:
            also = f"; {num_rejects:,} rows cannot be used, the first: {first_reject}" if first_reject else ""
            raise DataError(f"studies: no transcript of {', '.join(absent)} in the data{also}")
        # The distinct responses of each experiment, where they are few enough to be its options.
        most = self.encoder.max_options
        self._observed = {key: tuple(seen) for key, seen in observed.items() if len(seen) <= most}
        if self.cache:
            self.cache.write_units(found)
        return found

    def _cached(self, info: UnitInfo) -> EncodedUnit | None:
        if self.cache is None:
            return None
        with self.clock("read"):
            return self.cache.read(info)

    def _rows(self) -> Generator[Unit, None, None]:
        """All units as rows, read in a thread of their own from the moment that the first is asked for."""

        def timed() -> Iterator[Unit]:
            items = units(self.files, unit_tokens=self.unit_tokens, studies=self.studies, limit=self.limit)
            while True:
                with self.clock("read"):
                    unit = next(items, None)
                if unit is None:
                    return
                yield unit

        with ahead(timed()) as rows:
            yield from rows

    def _find(self, info: UnitInfo, rows: Iterator[Unit]) -> Unit:
        unit = next((unit for unit in rows if unit.info.index == info.index), None)
        if unit is None or unit.info != info:
            raise DataError(
                f"{', '.join(str(file.path) for file in self.files)}: changed while they were read "
                f"(unit {info.index}, study {info.study})"
            )
        return unit

    def _encode(self, unit: Unit) -> EncodedUnit:
        if self._observed is None and self.encoder.options == "observed-experiment":
            self._scan()
        with self.clock("encode"):
            rejects = list(unit.rejects)
            encoded = self.encoder.encode(unit.transcripts, rejects.append, self._observed)
        return EncodedUnit(unit.info, tuple(encoded), tuple(rejects), self.encoder.num_without_metadata)

    def _refuse(self, rejects: Sequence[RowError]) -> None:
        if self.strict and rejects:
            raise rejects[0]


def _observe(unit: Unit, observed: dict[tuple[str, str], dict[str, None]], encoder: Encoder) -> None:
    """Adds the distinct scored responses of each experiment, up to one more than the encoder takes."""
    for transcript in unit.transcripts:
        seen = observed[transcript.study, transcript.experiment]
        for start, end in transcript.responses_char.tolist():
            response = transcript.text[start:end]
            if response.strip() and len(seen) <= encoder.max_options and encoder.scores(response):
                seen.setdefault(response)
