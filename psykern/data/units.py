"""Units of work: transcripts of one study that are planned together and written as one part.

How data are cut depends on the data and the settings alone, not on who scores what, so that a run can be stopped,
moved, and split among machines: every process sees the same units. A unit's *key* is the hash of its rows.

What shares a prefix is of one unit, so units are cut along the order of the texts, not of the file. Rows are collected
until their texts come to a *window*, which bounds memory whatever the size of the data and holds most studies whole.
The rows of each of its studies are sorted by their texts and cut, at about a unit's size, where neighbours have the
least in common; a prefix longer than that is computed once more in each unit that it reaches into. Within a unit rows
stand as in the data. Those of one study and window are a *group*: their rows lie among each other in the data, and
``place`` says where, so that readers of a run can give the data's order (``runs.order``).

A window no larger than a unit is not cut, which leaves the rows in their order. Refused rows go with the first unit of
their window, which reports them.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate, pairwise

from psykern.core.errors import RowError
from psykern.core.types import Transcript, UnitInfo

CHARS_PER_TOKEN = 4  # of English prose; a unit is cut by characters, as tokens are known later
WINDOW_TOKENS = 2**24  # 64 Mi characters; of 15 studies of Psych-201 one is larger
_SLACK = 4  # a unit may be larger or smaller by its size over this, for a better place to cut
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


def units(
    rows: Iterable[Transcript | RowError], *, unit_tokens: int, window_tokens: int = WINDOW_TOKENS
) -> Iterator[Unit]:
    """The units of ``rows``, of about ``unit_tokens`` tokens each, cut of windows of about ``window_tokens`` in the
    rows' order. One without transcripts holds the rest of the refused rows."""
    window = max(window_tokens, unit_tokens) * CHARS_PER_TOKEN
    size = unit_tokens * CHARS_PER_TOKEN if window_tokens > unit_tokens else None
    transcripts: dict[str, list[Transcript]] = {}
    rejects: list[RowError] = []
    characters = index = 0
    for row in rows:
        if isinstance(row, RowError):
            rejects.append(row)
        else:
            transcripts.setdefault(row.study, []).append(row)
            characters += len(row.text)
        if characters >= window or len(rejects) >= _MOST_REJECTS:
            for unit in _cut(index, transcripts, rejects, size):
                yield unit
                index += 1
            transcripts, rejects, characters = {}, [], 0
    if transcripts or rejects:
        yield from _cut(index, transcripts, rejects, size)


def _cut(
    index: int, transcripts: Mapping[str, Sequence[Transcript]], rejects: Sequence[RowError], size: int | None
) -> Iterator[Unit]:
    """The units of a window, from number ``index`` on; the first one reports the refused rows. ``size``: characters of
    a unit; None: one for each study."""
    if not transcripts:
        yield _unit(index, "", (), rejects, None)
    for study, of in transcripts.items():
        pieces = [of] if size is None else _pieces(of, size)
        group = index if len(pieces) > 1 else None
        for piece in pieces:
            yield _unit(index, study, piece, rejects, group)
            index, rejects = index + 1, ()


def _pieces(transcripts: Sequence[Transcript], size: int) -> list[Sequence[Transcript]]:
    """``transcripts`` along the order of their texts, in pieces of about ``size`` characters; each in its old order,
    which ``place`` says."""
    order = sorted(range(len(transcripts)), key=lambda place: transcripts[place].text)
    bounds = _bounds([transcripts[place].text for place in order], size)
    if len(bounds) == 2:
        return [transcripts]
    pieces = [sorted(order[first:stop]) for first, stop in pairwise(bounds)]
    return [[replace(transcripts[place], place=place) for place in piece] for piece in pieces]


def _bounds(texts: Sequence[str], size: int) -> list[int]:
    """Where to cut sorted ``texts``, their two ends included: of the places at about ``size`` characters that at which
    neighbours have the least in common."""
    ends = list(accumulate(map(len, texts), initial=0))  # characters before each text
    bounds = [0]
    while ends[-1] - ends[bounds[-1]] > size + size // _SLACK:
        start = ends[bounds[-1]]
        first = max(bisect_left(ends, start + size - size // _SLACK), bounds[-1] + 1)
        stop = max(bisect_right(ends, start + size + size // _SLACK), first + 1)
        if first >= len(texts):
            break
        places = range(first, min(stop, len(texts)))
        bounds.append(min(places, key=lambda k: (_common(texts[k - 1], texts[k]), abs(ends[k] - start - size))))
    return [*bounds, len(texts)]


def _common(one: str, two: str) -> int:
    """Characters that both begin with; by halves, as Python compares long strings much faster than it counts."""
    least, most = 0, min(len(one), len(two))
    while least < most:
        middle = (least + most + 1) // 2
        if one[least:middle] == two[least:middle]:
            least = middle
        else:
            most = middle - 1
    return least


def _unit(
    index: int, study: str, transcripts: Sequence[Transcript], rejects: Sequence[RowError], group: int | None
) -> Unit:
    places = [] if group is None else [t.place for t in transcripts]
    key = _key(transcripts, rejects, places)
    info = UnitInfo(index, study, key, sum(len(t.text) for t in transcripts), group)
    return Unit(info, tuple(transcripts), tuple(rejects))


def _key(transcripts: Sequence[Transcript], rejects: Sequence[RowError], places: Sequence[int]) -> str:
    """64 hexadecimal digits: SHA-256 of everything that the records of these rows and their order can depend on, where
    the files stand left out."""
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
    for place in places:
        add(f"place {place}")
    return digest.hexdigest()


# Of a transcript, all but where it stands; its responses follow from its text.
_CONTENT = tuple(f.name for f in fields(Transcript) if f.name not in ("source", "responses_char", "place"))
