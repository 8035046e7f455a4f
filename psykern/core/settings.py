"""What a user can choose of a run.

Each field of :class:`Settings` says what the command line tells of it, and its roles, which is how far it reaches:

    tokens     the tokens of the data depend on it
    identity   the records depend on it: processes that share a run's folder must agree in it
    compared   it says what is scored: runs that differ in it cannot be set against each other

A field without a role changes how a run is computed, and a score by no more than rounding.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from functools import cache
from numbers import Integral
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from psykern.core.types import UnitInfo  # which loads numpy

Protocol = Literal["exact", "study"]
Condition = Literal["plain", "chat", "persona"]
Boundary = Literal["joint", "split"]
Marks = Literal["keep", "drop"]
OptionSource = Literal["none", "given", "observed", "observed-experiment"]
OverLength = Literal["error", "skip", "truncate"]
SameParticipants = Literal["merge", "separate", "error"]
Backend = Literal["auto", "reference", "cpu", "triton", "cuda"]
Device = str  # auto, cpu, cuda or one of several: cuda:1
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Implementation = Literal["auto", "native", "transformers"]

Role = Literal["tokens", "identity", "compared"]

# Measured (benchmarks/results/plan_cpu.csv): 1 to 32 run equally fast within the noise, 128 forgoes real shares. A
# share of very few tokens saves nothing and makes paths of more ranges.
MIN_SHARE = 8

_DEVICE = re.compile(r"auto|cpu|cuda(:(0|[1-9][0-9]{0,3}))?")


class About(NamedTuple):
    """What is to be known of a field."""

    help: str
    roles: tuple[Role, ...] = ()


_DATA: tuple[Role, ...] = ("tokens", "identity", "compared")


@dataclass(frozen=True, slots=True)
class Settings:
    """What a run does with its data and how. Raises ``ValueError`` for a value that is not one of its kind."""

    protocol: Annotated[
        Protocol, About("exact: responses by character offsets; study: the published study's own rules", _DATA)
    ] = "exact"
    condition: Annotated[
        Condition,
        About(
            "plain, chat (turns in the tokenizer's chat template) or persona (what is known of a participant first)",
            ("tokens", "identity"),
        ),
    ] = "plain"
    discrete: Annotated[
        str | None, About("score only responses that match this regular expression from end to end", _DATA)
    ] = None
    boundary: Annotated[
        Boundary,
        About("joint: a text is tokenized as one string; split: around the marks, so that no token straddles", _DATA),
    ] = "joint"
    marks: Annotated[
        Marks,
        About("whether << and >> are part of what the model reads; a chat has none either way", _DATA),
    ] = "keep"
    options: Annotated[
        OptionSource,
        About(
            "answer options: none, as given on the row, or the distinct responses observed in the transcript or in its "
            "experiment",
            _DATA,
        ),
    ] = "given"
    max_options: Annotated[int, About("more observed options than this are none", _DATA)] = 26
    over_length: Annotated[
        OverLength, About("what to do with a transcript longer than the model's context", ("identity", "compared"))
    ] = "error"
    date: Annotated[
        str | None,  # a run's identity holds it where its prompts do: see Recipe.date
        About("the day that a chat template prints, YYYY-MM-DD; not given: that on which the run began, UTC"),
    ] = None
    limit: Annotated[int | None, About("take only the first N transcripts of each study", _DATA)] = None
    studies: Annotated[tuple[str, ...] | None, About("take only these studies", _DATA)] = None
    same_participants: Annotated[
        SameParticipants,
        About("a participant's id in two files of one experiment: one person, two, or an error", _DATA),
    ] = "merge"
    implementation: Annotated[
        Implementation,
        About(
            "whose modules compute the layers: psykern's own (native, as auto is), or those of transformers, which has "
            "any causal language model",
            ("identity",),
        ),
    ] = "auto"
    backend: Annotated[Backend, About("kernels to use", ("identity",))] = "auto"
    dtype: Annotated[Dtype, About("arithmetic; auto: float32 on a CPU, bfloat16 on a GPU", ("identity",))] = "auto"
    device: Annotated[Device, About("where to compute: auto, cpu, cuda, or cuda:1 where there are several")] = "auto"
    wave_tokens: Annotated[
        int | None,
        About(
            "tokens computed together, layer by layer: more need more memory, but a long transcript is computed whole "
            "where that needs less; not given: as suits the device"
        ),
    ] = None
    batch_tokens: Annotated[int | None, About("tokens in one matrix product; likewise")] = None
    min_share: Annotated[
        int, About("tokens from which on a common prefix of transcripts is computed once", ("identity",))
    ] = MIN_SHARE
    unit_tokens: Annotated[
        int | None,
        About("about so many tokens are planned together and written as one part; likewise", ("tokens", "identity")),
    ] = None
    strict: Annotated[bool, About("stop at the first row that cannot be used")] = False

    def __post_init__(self) -> None:
        for name, (kind, _) in fields().items():
            value = getattr(self, name)
            if get_origin(kind) is Literal and value not in get_args(kind):
                raise ValueError(f"{name}: expected one of {', '.join(get_args(kind))}, got {value!r}")
            if int in (kind, *get_args(kind)) and value is not None:
                object.__setattr__(self, name, _whole_number(name, value))
        if not (isinstance(self.device, str) and _DEVICE.fullmatch(self.device)):
            raise ValueError(f"device: expected auto, cpu, cuda or cuda:N, N from 0 on, got {self.device!r}")
        if self.protocol == "study" and self.boundary != "joint":
            raise ValueError("boundary: the study's protocol tokenizes a text as one string; use boundary='joint'")
        if self.protocol == "study" and self.marks != "keep":
            raise ValueError("marks: the study's protocol finds responses by their marks; use marks='keep'")
        if self.studies is not None:
            object.__setattr__(self, "studies", _study_names(self.studies))
        if self.discrete is not None:
            try:
                re.compile(self.discrete)
            except re.error as error:
                raise ValueError(f"discrete: expected a regular expression, got {self.discrete!r}: {error}") from error
        if self.date is not None:
            check_date(self.date)


@cache
def fields() -> dict[str, tuple[Any, About]]:
    """The fields of :class:`Settings` in order: each one's type (a Literal, ``int | None``, …), and what is to be known
    of it."""
    hints = get_type_hints(Settings, include_extras=True)
    return {name: get_args(hint) for name, hint in hints.items()}


def having(role: Role) -> tuple[str, ...]:
    """Names of the fields that have ``role``, in order."""
    return tuple(name for name, (_, about) in fields().items() if role in about.roles)


def check_loaded(settings: Settings, loaded: Mapping[str, str]) -> None:
    """Raises ValueError where ``settings`` ask for something else than what is ``loaded``, by the names of fields whose
    ``auto`` leaves it to the model."""
    for name, have in loaded.items():
        asked = getattr(settings, name)
        if asked not in ("auto", have):
            raise ValueError(
                f"{name}: expected 'auto' or {have!r}, as the model is loaded, got {asked!r}; load it so, or leave "
                f"{name} out of the settings"
            )


def check_date(value: object) -> None:
    """Raises ValueError where ``value`` is no day as YYYY-MM-DD."""
    # Newer Pythons read other forms of ISO 8601 too, of which only one may be in use: dates are compared as strings.
    with suppress(ValueError):
        if isinstance(value, str) and date.fromisoformat(value).isoformat() == value:
            return
    raise ValueError(f"date: expected a day as YYYY-MM-DD, got {value!r}")


def _study_names(studies: object) -> tuple[str, ...]:
    """In one order, as another one is the same choice. Raises ValueError."""
    names = studies if isinstance(studies, Collection) and not isinstance(studies, str) else ()
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"studies: expected names, at least one, or None for all, got {studies!r}")
    return tuple(sorted(set(names)))


def _whole_number(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):  # numpy's are, too
        raise ValueError(f"{name}: expected a whole number, got {value!r}")
    number = int(value)
    if number < 1:
        raise ValueError(f"{name}: expected at least 1, got {number}")
    if number >= 2**31:
        raise ValueError(f"{name}: expected at most {2**31 - 1}, got {number}")
    return number


@dataclass(frozen=True, slots=True)
class Shard:
    """The units that one of several processes takes: number ``index``, counted from 0, of ``count``."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(f"shard: expected i/n with 0 <= i < n, got {self.index}/{self.count}")

    def takes(self, unit: UnitInfo) -> bool:
        """Whether ``unit`` is of this shard."""
        return unit.index % self.count == self.index
