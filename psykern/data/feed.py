"""The units of a data set as tokens: from the token cache where they are there, else from the rows.

The data are read once to cut them into units, which takes neither tokenizer nor model, and again to encode the units
that are wanted. With a warm token cache they are not read at all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing

from psykern.core.clock import Clock, timed
from psykern.core.errors import DataError, RowError
from psykern.core.stages import ahead
from psykern.core.types import EncodedUnit, Transcript, UnitInfo
from psykern.data.dataset import Dataset
from psykern.data.draft import responses_of
from psykern.data.encode import Encoder
from psykern.data.read import read
from psykern.data.token_cache import TokenCache
from psykern.data.units import Unit, units


class Observed:
    """The distinct scored responses of each experiment, for ``options="observed-experiment"``; none otherwise. They
    stand in the order in which the data have them, however units are cut."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._most = encoder.settings.max_options
        self._seen: dict[tuple[str, str], dict[str, None]] = defaultdict(dict)  # up to one more than are options

    def seeing(self, rows: Iterable[Transcript | RowError]) -> Iterator[Transcript | RowError]:
        """``rows``, of which each is looked at when it is asked for."""
        if self._encoder.settings.options != "observed-experiment":
            yield from rows
            return
        for row in rows:
            if not isinstance(row, RowError):
                self._add(row)
            yield row

    def _add(self, transcript: Transcript) -> None:
        seen = self._seen[transcript.study, transcript.experiment]
        for response in responses_of(transcript):
            if response.strip() and len(seen) <= self._most and self._encoder.scores(response):
                seen.setdefault(response)

    def options(self) -> Mapping[tuple[str, str], tuple[str, ...]]:
        """By study and experiment, where they are few enough to be its options."""
        return {key: tuple(seen) for key, seen in self._seen.items() if len(seen) <= self._most}


def encode_unit(
    encoder: Encoder, unit: Unit, observed: Mapping[tuple[str, str], tuple[str, ...]] | None
) -> EncodedUnit:
    """``observed``: as :meth:`.Encoder.encode` has it."""
    encoded = encoder.encode(unit.transcripts, observed)
    return EncodedUnit(
        unit.info,
        encoded.transcripts,
        (*unit.rejects, *encoded.rejects),
        encoded.without_metadata,
        unit.without_id,
        unit.shared_participants,
        unit.repeated,
    )


class Feed:
    """Encoded units of ``dataset``, by the settings of ``encoder``; with ``strict`` the first refused row is raised."""

    def __init__(
        self, dataset: Dataset, encoder: Encoder, *, cache: TokenCache | None = None, clock: Clock | None = None
    ) -> None:
        """``clock`` counts the phases "read" and "encode". Raises ValueError where the settings leave the units' size
        open: what suits the device is the caller's to know."""
        if encoder.settings.unit_tokens is None:
            raise ValueError("unit_tokens: expected a number in the encoder's settings, got None")
        self._dataset = dataset
        self._encoder = encoder
        self._settings = encoder.settings
        self._unit_tokens = encoder.settings.unit_tokens
        self._cache = cache
        self._clock = clock or Clock()
        self._observed: Mapping[tuple[str, str], tuple[str, ...]] | None = None

    def units(self) -> list[UnitInfo]:
        """All units in order. Raises DataError where a study that was asked for has no transcript, and where a file has
        changed since its hash was taken."""
        known = self._cache.read_units() if self._cache else None
        return self._scan() if known is None else known

    def encoded(self, wanted: Sequence[UnitInfo]) -> Iterator[EncodedUnit]:
        """The units ``wanted``, which must ascend. Raises DataError where the data are not what :meth:`units` saw."""
        with closing(self._rows_ahead()) as rows:
            for info in wanted:
                unit = self._cached(info)
                if unit is None:
                    unit = self._encode(self._find(info, rows))
                    if self._cache:
                        with self._clock("encode"):
                            self._cache.write(unit)
                self._refuse(unit.rejects)
                yield unit

    def _rows(self, observed: Observed | None = None) -> Iterator[Unit]:
        """All units; ``observed`` sees their transcripts."""
        of = self._settings
        rows = read(self._dataset, studies=of.studies, limit=of.limit, same_participants=of.same_participants)
        return units(observed.seeing(rows) if observed else rows, unit_tokens=self._unit_tokens)

    def _rows_ahead(self) -> Generator[Unit, None, None]:
        """All units as rows, read in a thread of their own from the moment that the first is asked for."""
        with ahead(timed(self._rows(), self._clock, "read")) as rows:
            yield from rows

    def _scan(self) -> list[UnitInfo]:
        found = []
        studies = set()
        first_reject: RowError | None = None
        num_rejects = 0
        observed = Observed(self._encoder)
        for unit in self._rows(observed):
            self._refuse(unit.rejects)
            found.append(unit.info)
            studies.add(unit.info.study)
            num_rejects += len(unit.rejects)
            first_reject = first_reject or next(iter(unit.rejects), None)
        self._dataset.check_unchanged()
        absent = sorted(set(self._settings.studies or ()) - studies)
        if absent:
            also = f"; {num_rejects:,} rows cannot be used, the first: {first_reject}" if first_reject else ""
            raise DataError(f"studies: no transcript of {', '.join(absent)} in the data{also}")
        self._observed = observed.options()
        if self._cache:
            self._cache.write_units(found)
        return found

    def _cached(self, info: UnitInfo) -> EncodedUnit | None:
        if self._cache is None:
            return None
        with self._clock("read"):
            return self._cache.read(info)

    def _find(self, info: UnitInfo, rows: Iterator[Unit]) -> Unit:
        unit = next((unit for unit in rows if unit.info.index == info.index), None)
        if unit is None or unit.info != info:
            raise DataError(
                f"{', '.join(self._dataset.paths)}: changed while they were read "
                f"(unit {info.index}, study {info.study})"
            )
        return unit

    def _encode(self, unit: Unit) -> EncodedUnit:
        if self._observed is None and self._settings.options == "observed-experiment":
            self._scan()
        with self._clock("encode"):
            return encode_unit(self._encoder, unit, self._observed)

    def _refuse(self, rejects: Sequence[RowError]) -> None:
        if self._settings.strict and rejects:
            raise rejects[0]
