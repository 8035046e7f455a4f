"""What is to be known of a run: how it is made (its recipe), and what came of it (its outcome).

``manifest.json`` holds both side by side, the outcome's fields empty until the run is finished.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import platform
import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from psykern.core.settings import (
    Boundary,
    Condition,
    Marks,
    OptionSource,
    OverLength,
    Protocol,
    SameParticipants,
    having,
)

LIBRARIES = ("torch", "transformers", "tokenizers", "numpy", "pyarrow")


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file that was read."""

    path: str
    hash: str
    bytes: int


@dataclass(frozen=True, slots=True)
class InputAdapter:
    """What was merged into the base's weights."""

    path: str
    hash: str


@dataclass(frozen=True, slots=True)
class Counts:
    """What went through a run, or one unit of it."""

    transcripts: int = 0
    responses: int = 0
    scored_responses: int = 0
    tokens: int = 0  # of all scored transcripts, as if each were computed alone
    computed_tokens: int = 0  # rows that went through the model
    rejects: int = 0  # rows of the data that were refused
    over_length_transcripts: int = 0  # skipped by the over-length policy
    dropped_responses: int = 0  # left out by the over-length policy "truncate"
    without_metadata_transcripts: int = 0  # left out by the condition persona
    without_id_transcripts: int = 0  # rows that name no participant
    shared_participants: int = 0  # people whose id more than one file of their experiment has
    repeated_transcripts: int = 0  # rows that repeat an earlier one of their participant, text and all

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            *(one + two for one, two in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True))
        )


@dataclass(frozen=True)
class Recipe:
    """How a run is made; fixed when it begins."""

    model_id: str  # with an adapter "BASE + ADAPTER"
    model_hash: str  # of config and weights, the adapter's too
    adapter: InputAdapter | None  # None: the base alone
    weights: str | None  # what was done to them on their way from the files, as dequantising; None: nothing
    tokenizer_hash: str
    beyond_embedding: int | None  # token ids from here on, which the tokenizer has, are not in the embedding
    data: tuple[InputFile, ...]
    protocol: Protocol
    condition: Condition
    discrete: str | None  # only responses that match it were scored; None: all
    chat_template_hash: str | None  # None: the condition is not chat
    date: str | None  # that the prompts hold, YYYY-MM-DD; None: they hold none
    boundary: Boundary
    marks: Marks  # whether << and >> are part of what the model reads; a manifest without it: they are
    options: OptionSource
    max_options: int
    over_length: OverLength
    limit: int | None  # transcripts per study; None: all
    studies: tuple[str, ...] | None  # None: all
    same_participants: SameParticipants
    versions: Mapping[str, str]  # see library_versions
    device: str
    dtype: str
    implementation: str  # of the layers: "native", or "transformers: …" and how; a manifest without it: native
    backend: str
    arithmetic: (
        str | None
    )  # of the CPU's kernels, and of the processor; "; " between those of start and end; None: others
    company_free: bool  # a score's bits depend on its own text alone, not on what was computed beside it
    wave_tokens: int
    batch_tokens: int
    min_share: int
    unit_tokens: int  # about so many make a unit, and a part
    started: str  # ISO 8601, UTC


@dataclass(frozen=True)
class Outcome:
    """What a run came to. Times, rates and peaks are those of the process that finished it."""

    counts: Counts = Counts()
    seconds: Mapping[str, float] = field(default_factory=dict)  # by phase; most go on beside "run"
    tokens_per_second: float = 0.0
    responses_per_second: float = 0.0
    peak_memory_bytes: int = 0
    peak_device_bytes: int | None = None  # of a device with memory of its own; None: there was none
    gpu_idle_share: float | None = None  # of the time between its first and last wave; see engine.watch.DeviceClock
    finished: str | None = None  # ISO 8601, UTC; None: not yet


@dataclass(frozen=True)
class Manifest(Outcome, Recipe):
    """A run's recipe and its outcome, flat as ``manifest.json`` holds them."""

    @classmethod
    def of(cls, recipe: Recipe, outcome: Outcome) -> Manifest:
        """Both side by side."""
        return cls(**vars(recipe), **vars(outcome))


# What two processes must agree in to write parts of one run. Budgets and machines may differ: they change scores by
# no more than rounding (of bf16, where one multiplies it and another widens it), and a run that goes on takes the
# budgets that it began with where they change even that.
IDENTITY = ("model_hash", "tokenizer_hash", "data", "chat_template_hash", "date", *having("identity"))


def identity(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Of a manifest as JSON; files of data count by their content. A date counts only where there is one, marks where
    they are dropped, and the implementation (without its reasons) where it is not psykern's own, so that else names of
    parts are as ever. Raises KeyError, TypeError for what is none."""
    values = {name: manifest.get(name) for name in IDENTITY}
    for name, usual in (("date", None), ("marks", "keep"), ("implementation", "native")):
        if values[name] in (None, usual):
            del values[name]
    if "implementation" in values:
        values["implementation"] = str(values["implementation"]).partition(", because ")[0]
    values["data"] = sorted(file["hash"] for file in manifest["data"])
    return values


# What the tokens depend on beside the data; how much of a transcript fits a context is seen to later.
_TOKENS_DEPEND_ON = ("tokenizer_hash", "beyond_embedding", "chat_template_hash", "date", *having("tokens"))
_TOKENIZERS = ("transformers", "tokenizers")  # libraries: a later version may cut or render a text otherwise


def tokens_depend_on(recipe: Recipe) -> dict[str, Any]:
    """JSON values of all that a run's tokens depend on beside the data."""
    values = {name: getattr(recipe, name) for name in _TOKENS_DEPEND_ON}
    return values | {name: recipe.versions.get(name) for name in _TOKENIZERS}


def library_versions(psykern: str) -> dict[str, str]:
    """Versions of psykern (as given), Python and those of :data:`LIBRARIES` that are installed."""
    versions = {"psykern": psykern, "python": platform.python_version()}
    for library in LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def peak_memory_bytes() -> int:
    """The largest resident size that this process has had, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB, macOS bytes


def plain(value: Any) -> Any:
    """``value`` as JSON's own types; what is not finite becomes null, because JSON has no NaN."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
