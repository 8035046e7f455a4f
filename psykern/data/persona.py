"""What a row tells about its participant, and the interview that the condition *persona* puts before the transcript.

    Interviewer: What is your age?
    Interviewee: 24.0

The fields, their order and the questions are the published study's, and so is the way in which it writes values: an
age is a float, most scores are whole numbers. Rows of the released data set hold the fields under their published
names; rows of a single study hold some under other names (`sex`, `phq8`, …), and sexes, diagnoses and two cities are
spelled as the study spells them. Its long tables of country codes and school degrees are not applied: such values
stand as the row has them.

Source: github.com/marcelbinz/Psych-201, ``0_analyses/eval_meta.py``, ``psych201_generate.py`` and ``utils.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal

_MISSING = frozenset(("", "N/A", "nan"))
_GENDERS = {
    "Female": "female",
    "F": "female",
    "Woman": "female",
    "Male": "male",
    "M": "male",
    "Man": "male",
    "NB": "other",
    "Other": "other",
    "no-specify": "N/A",
    "no-spe": "N/A",
    "Prefer not to answer": "N/A",
    "Prefer not to say": "N/A",
    "Rather not say": "N/A",
}
_DIAGNOSES = {
    "Healthy": "N/A",
    "no-lesion-control": "N/A",
    "Depression": "depression",
    "Bipolar": "bipolar",
    "non-PFC-lesion": "brain-lesion",
}
_PLACES = {"Basel": "Switzerland", "Berlin": "Germany", "Unknown": "N/A"}


def _age(value: str | float) -> str:
    try:
        age = float(value)
    except (ValueError, OverflowError):
        return "N/A"
    return str(age) if 0 <= age <= 100 else "N/A"


def _whole(value: str | float) -> str:
    return str(int(value)) if isinstance(value, float) and math.isfinite(value) else str(value)


def _spelled(table: Mapping[str, str]) -> Callable[[str | float], str]:
    return lambda value: table.get(str(value), str(value))


@dataclass(frozen=True, slots=True)
class Field:
    """One thing that is known of a participant."""

    name: str  # the released data set's column
    question: str
    aliases: tuple[str, ...] = ()  # columns of single studies
    write: Callable[[str | float], str] = str


def _score(name: str, *aliases: str, write: Callable[[str | float], str] = _whole) -> Field:
    return Field(name, f"What is your {name} score?", aliases, write)


FIELDS = (
    Field("age", "What is your age?", (), _age),
    Field("gender", "What is your gender?", ("sex",), _spelled(_GENDERS)),
    Field("nationality", "What is your nationality?", ("location",), _spelled(_PLACES)),
    Field("education", "What is your highest level of education?"),
    Field("clinical diagnosis", "Do you have any clinical diagnoses?", ("diagnosis",), _spelled(_DIAGNOSES)),
    _score("STICSA-T somatic", "STICSAsoma", write=str),
    _score("STICSA-T cognitive", "STICSAcog", write=str),
    _score("STAI-S", "STAI", write=str),
    _score("STAI-T", "stai_total", "stai"),
    _score("IUS", write=str),
    _score("RRQ", write=str),
    _score("AUDIT", "audit_total"),
    _score("DAST", write=str),
    _score("PSWQ", "pswq", write=str),
    _score("GAD-7", "gad7", write=str),
    _score("SDS", "sds_total"),
    _score("OCI", "oci_total"),
    _score("PHQ-9", "PHQ"),
    _score("PHQ-8", "phq8"),
    _score("BAS Drive", "bas_drive"),
    _score("BAS Fun Seeking", "bas_fun_seeking"),
    _score("BAS Reward Responsiveness", "bas_reward_response"),
    _score("BDI-II", "BDI-II score"),
    _score("BIS-11", "BIS", "bis"),
    _score("BIS-10", "bis_total"),
)
COLUMNS = tuple(column for field in FIELDS for column in (field.name, *field.aliases))


def metadata(row: Mapping[str, object]) -> tuple[tuple[str, str], ...]:
    """Name and value of each field that the row holds, in the published order. What is no string or finite number, or
    stands for nothing (``N/A``), is left out."""
    known = []
    for field in FIELDS:
        for column in (field.name, *field.aliases):
            value = row.get(column)
            if isinstance(value, Decimal):
                value = float(value)
            if isinstance(value, bool) or not isinstance(value, (str, int, float)):
                continue
            if isinstance(value, float) and not math.isfinite(value):
                continue
            written = field.write(value)
            if written not in _MISSING:
                known.append((field.name, written))
                break
    return tuple(known)


def interview(known: tuple[tuple[str, str], ...]) -> str:
    """The front for a participant of whom ``known`` is known; "" where nothing is."""
    questions = {field.name: field.question for field in FIELDS}
    return "".join(f"Interviewer: {questions[name]}\nInterviewee: {value}\n\n" for name, value in known)
