"""Rows become transcripts, wherever they come from: files (:mod:`.read`) or memory (:mod:`.memory`).

The rule: a row is used as it stands or refused with its place and the reason; nothing is repaired, and a bad row never
stops the rest.

A row holds `text`, and if it likes `study`, `experiment`, `participant` (or `participant_reindexed`) and `options`;
what is known of the participant (the columns of :mod:`.persona`) is kept, other columns are ignored. What these may
hold is said in :mod:`.values`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from psykern.core.errors import RowError, Source
from psykern.core.types import Transcript
from psykern.data import persona
from psykern.data.values import answer_options, identifier, is_blank, is_missing, string

IDS = ("experiment", "participant", "participant_reindexed")
COLUMNS = ("text", "study", *IDS, "options", *persona.COLUMNS)


@dataclass(frozen=True, slots=True)
class Row:
    """A row that is not looked into yet."""

    source: Source
    may_name_study: bool  # False: the row has no column `study`
    load: Callable[[], Mapping[str, object]]  # the row's columns; raises ValueError with the reason why there are none


def refuse(reason: str) -> Mapping[str, object]:
    """``Row.load`` of a row that cannot be read."""
    raise ValueError(reason)


class Choice:
    """The rows that are wanted: those of some studies, the first of each."""

    def __init__(self, studies: Collection[str] | None = None, limit: int | None = None) -> None:
        """``studies``: None for all; ``limit``: transcripts of each, None for all."""
        self._studies = studies
        self._limit = limit
        self._taken: Counter[str] = Counter()

    def wants(self, study: str) -> bool:
        in_studies = self._studies is None or study in self._studies
        return in_studies and (self._limit is None or self._taken[study] < self._limit)

    def take(self, study: str) -> None:
        """A row of ``study`` can be used."""
        self._taken[study] += 1

    @property
    def absent(self) -> list[str]:
        """Studies that were asked for, of which none has been taken."""
        return sorted(set(self._studies or ()) - set(self._taken))


def transcripts(
    rows: Iterable[Row], study: str, choice: Choice, name: Callable[[int], str]
) -> Iterator[Transcript | RowError]:
    """Transcripts in the order of ``rows``; the error of a bad row stands in its place. Rows that ``choice`` leaves out
    are not checked.

    study: of those rows that do not name theirs. name: of a person whom the row of that line does not name.
    """
    for row in rows:
        if not row.may_name_study and not choice.wants(study):
            continue
        try:
            fields = row.load()
            own = _study(fields, study)
            if not choice.wants(own):
                continue
            transcript = _transcript(fields, own, row.source, name(row.source.line))
        except ValueError as error:
            yield RowError(row.source, str(error))
            continue
        choice.take(own)
        yield transcript


def unusable(columns: Sequence[str]) -> str | None:
    """Why no row of a table with ``columns`` can be used; None: they can."""
    counts = Counter(columns)
    if not counts["text"]:
        return f"text: expected a column of that name, got columns {', '.join(columns)}"
    twice = next((name for name in COLUMNS if counts[name] > 1), None)
    return twice and f"{twice}: expected one column of that name, got {counts[twice]}"


def find_responses(text: str) -> np.ndarray:
    """[R, 2] int64: first and one-past-last character of each response, which stands between `<<` and `>>`.

    Marks are taken from left to right: `<<a>>>` is the response `a` and then `>`, `<<<a>>` is the response `<a`.
    Raises ValueError for nested or unbalanced marks; characters are counted from 0.
    """
    spans = []
    place = 0
    while (opened := text.find("<<", place)) >= 0:  # str.find is much faster than a regular expression here
        if (stray := text.find(">>", place, opened)) >= 0:
            raise ValueError(f"text: '>>' at character {stray} without '<<' before it")
        closed = text.find(">>", opened + 2)
        nested = text.find("<<", opened + 2, closed if closed >= 0 else len(text))
        if nested >= 0:
            raise ValueError(f"text: '<<' at character {nested} inside the response that '<<' at {opened} opens")
        if closed < 0:
            raise ValueError(f"text: '<<' at character {opened} is never closed")
        spans.append((opened + 2, closed))
        place = closed + 2
    if (stray := text.find(">>", place)) >= 0:
        raise ValueError(f"text: '>>' at character {stray} without '<<' before it")
    return np.array(spans, dtype=np.int64).reshape(-1, 2)


def _transcript(fields: Mapping[str, object], study: str, source: Source, name: str) -> Transcript:
    """``name``: what the person is called where the row does not say."""
    text = fields.get("text")
    if is_missing(text):
        raise ValueError("text: missing")
    text = string("text", text)
    responses_char = find_responses(text)
    names = (fields.get("participant"), fields.get("participant_reindexed"))
    participant = next((value for value in names if not is_blank(value)), None)
    return Transcript(
        study=study,
        experiment=identifier("experiment", fields.get("experiment"), missing=""),
        participant=identifier("participant", participant, missing=name),
        text=text,
        responses_char=responses_char,
        options=answer_options(fields.get("options"), text, responses_char),
        source=source,
        metadata=persona.metadata(fields),
        has_id=participant is not None,
    )


def _study(fields: Mapping[str, object], default: str) -> str:
    study = fields.get("study")
    study = string("study", default if is_missing(study) else study)
    if is_blank(study):
        raise ValueError("study: expected a name, got an empty string")
    return study
