"""Units of work: neighbouring transcripts of one study that are planned together and written as one part.

How data are cut depends on the data and the settings alone, not on who scores what, so that a run can be stopped,
moved, and split among machines: every process sees the same units. A unit's *key* is the hash of its rows.

Rows are collected until their texts come to a unit's size; then those of each study are a unit. Refused rows go with
the first of these, which reports them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields

from psykern.core.errors import RowError
from psykern.core.types import Transcript, UnitInfo

CHARS_PER_TOKEN = 4  # of English prose; a unit is cut by characters, as tokens are known later
_MOST_REJECTS = 10_000  # rows refused that one unit reports


@dataclass(frozen=True, slots=True, eq=False)
class Unit:
    """A unit's rows. Filled by :func:`units`."""

    info: UnitInfo
    transcripts: tuple[Transcript, ...]
    rejects: tuple[RowError, ...]

    @property
    def without_id(self) -> int:
        return sum(not transcript.has_id for transcript in self.transcripts)

    @property
    def shared_participants(self) -> int:
        return sum(transcript.joins_files for transcript in self.transcripts)

    @property
    def repeated(self) -> int:
        return sum(transcript.repeats for transcript in self.transcripts)


def units(rows: Iterable[Transcript | RowError], *, unit_tokens: int) -> Iterator[Unit]:
    """The units of ``rows`` in order, of about ``unit_tokens`` tokens each. One without transcripts holds the rest of
    the refused rows."""
    transcripts: dict[str, list[Transcript]] = {}
    rejects: list[RowError] = []
    characters = index = 0
    for row in rows:
        if isinstance(row, RowError):
            rejects.append(row)
        else:
            transcripts.setdefault(row.study, []).append(row)
            characters += len(row.text)
        if characters >= unit_tokens * CHARS_PER_TOKEN or len(rejects) >= _MOST_REJECTS:
            cut = _cut(index, transcripts, rejects)
            yield from cut
            index += len(cut)
            transcripts, rejects, characters = {}, [], 0
    if transcripts or rejects:
        yield from _cut(index, transcripts, rejects)


def _cut(index: int, transcripts: Mapping[str, Sequence[Transcript]], rejects: Sequence[RowError]) -> list[Unit]:
    """A unit for each study; the first one reports the refused rows."""
    return [
        _unit(index + place, study, of, [] if place else rejects)
        for place, (study, of) in enumerate(transcripts.items() or [("", ())])
    ]


def _unit(index: int, study: str, transcripts: Sequence[Transcript], rejects: Sequence[RowError]) -> Unit:
    info = UnitInfo(index, study, _key(transcripts, rejects), sum(len(t.text) for t in transcripts))
    return Unit(info, tuple(transcripts), tuple(rejects))


def _key(transcripts: Sequence[Transcript], rejects: Sequence[RowError]) -> str:
    """64 hexadecimal digits: SHA-256 of everything that the records of these rows can depend on, where the files
    stand left out."""
    digest = hashlib.sha256()

    def add(*texts: str) -> None:
        for text in texts:
            encoded = text.encode("utf-8", "surrogatepass")
            digest.update(b"%d:" % len(encoded))
            digest.update(encoded)

    for transcript in transcripts:
        add(*(str(getattr(transcript, name)) for name in _CONTENT))
    for error in rejects:
        add(str(error.source.line), error.reason)
    return digest.hexdigest()


# Of a transcript, all but where it stands; its responses follow from its text.
_CONTENT = tuple(f.name for f in fields(Transcript) if f.name not in ("source", "responses_char"))
