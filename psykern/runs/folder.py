"""A run's folder: one record per response, what was rejected, and how the run was made.

    RUN/manifest.json                    model, data, settings, versions, counts, times; "finished" is null until then
    RUN/responses/part-000000-….parquet  a unit's responses, one a row, columns as in SCHEMA
    RUN/rejects.jsonl                    one line per refused row: file, line, reason; absent when none was
    RUN/summary.json                     means per study and over studies

The rule: a file is there whole or not at all, and what a part holds follows from its name: the number of its unit, and
a hash of the unit's rows, the model and the settings. So the parts that are there are all that a run has to remember:
it can be stopped at any moment and go on, and several processes can write parts of one run. A part also holds, in its
schema's metadata, what its unit adds to counts, rejects and summary. Equal tables give equal bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import platform
import resource
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from psykern.core.folder import Folder
from psykern.core.types import (
    Boundary,
    Condition,
    EncodedTranscript,
    OptionSource,
    OverLength,
    Protocol,
    RowError,
    RunFolderError,
    Source,
    TargetScores,
    UnitInfo,
)

SCHEMA = pa.schema(
    [
        ("study", pa.string()),
        ("experiment", pa.string()),
        ("participant", pa.string()),
        ("response_index", pa.int32()),  # within the transcript, from 0
        ("response", pa.string()),  # the text between the marks
        ("num_tokens", pa.int32()),  # scored tokens
        ("logprob", pa.float64()),  # nats, sum over the scored tokens; null: none was scored
        ("is_argmax", pa.bool_()),  # every scored token was the vocabulary's argmax; null likewise
        ("entropy", pa.float32()),  # nats, of the distribution at the first scored token; null likewise
        ("options", pa.list_(pa.string())),  # null: the response has no options
        ("option_logprobs", pa.list_(pa.float64())),  # nats, sum over the option's scored tokens; null likewise
        ("option_log_softmax", pa.list_(pa.float64())),  # nats, over the response's options; null likewise
        ("option_index", pa.int32()),  # the option that is the response; null: none is
        ("flag", pa.string()),  # what is unusual about the response; null: nothing
    ]
)

LIBRARIES = ("torch", "transformers", "tokenizers", "numpy", "pyarrow")


def to_table(transcripts: Sequence[EncodedTranscript], scores: TargetScores) -> pa.Table:
    """One row of :data:`SCHEMA` per response of ``transcripts``, in order.

    ``scores`` are those of exactly these transcripts, by target id; sums over tokens are float64. Raises ValueError
    when the scores or branches do not fit the transcripts.
    """
    num_tokens = _concatenate((t.spans_tok[:, 1] - t.spans_tok[:, 0] for t in transcripts), np.int32)  # [R]
    branch_tokens = _concatenate((np.diff(t.branch_offsets) - t.branch_scored_tok for t in transcripts), np.int64)
    num_targets = int(num_tokens.sum() + branch_tokens.sum())
    if len(scores.logprob) != num_targets:
        raise ValueError(f"scores: expected {num_targets} targets for these transcripts, got {len(scores.logprob)}")
    columns = _identity_columns(transcripts)
    columns |= _score_columns(scores, num_tokens)
    columns |= _option_columns(transcripts, scores.logprob[num_tokens.sum() :], branch_tokens)
    return pa.table(columns, schema=SCHEMA)


def _identity_columns(transcripts: Sequence[EncodedTranscript]) -> dict[str, pa.Array]:
    num_responses = np.array([len(t.responses) for t in transcripts], dtype=np.int64)  # [transcripts]
    owner = pa.array(np.repeat(np.arange(len(transcripts)), num_responses))  # [R]
    return {
        "study": pa.array([t.study for t in transcripts], pa.string()).take(owner),
        "experiment": pa.array([t.experiment for t in transcripts], pa.string()).take(owner),
        "participant": pa.array([t.participant for t in transcripts], pa.string()).take(owner),
        "response_index": pa.array(_places(num_responses), pa.int32()),
        "response": pa.array(list(chain.from_iterable(t.responses for t in transcripts)), pa.string()),
        "flag": pa.array(list(chain.from_iterable(t.flags for t in transcripts)), pa.string()),
    }


def _score_columns(scores: TargetScores, num_tokens: np.ndarray) -> dict[str, pa.Array]:
    ends = np.cumsum(num_tokens, dtype=np.int64)  # [R]
    targets = slice(0, ends[-1] if len(ends) else 0)
    unscored = num_tokens == 0
    entropy = np.zeros(len(num_tokens), dtype=np.float32)
    entropy[~unscored] = scores.entropy[(ends - num_tokens)[~unscored]]
    is_argmax = _segment_reduce(np.logical_and, scores.is_argmax[targets], num_tokens)
    logprob = _segment_reduce(np.add, scores.logprob[targets].astype(np.float64), num_tokens)
    return {
        "num_tokens": pa.array(num_tokens, pa.int32()),
        "logprob": pa.array(logprob, pa.float64(), mask=unscored),
        "is_argmax": pa.array(is_argmax, pa.bool_(), mask=unscored),
        "entropy": pa.array(entropy, pa.float32(), mask=unscored),
    }


def _option_columns(
    transcripts: Sequence[EncodedTranscript], branch_target_logprob: np.ndarray, branch_tokens: np.ndarray
) -> dict[str, pa.Array]:
    options = [response_options or () for t in transcripts for response_options in t.options]
    num_options = np.fromiter(map(len, options), dtype=np.int64, count=len(options))  # [R]
    option_index = _concatenate((t.option_index for t in transcripts), np.int32)
    _check_branches(transcripts, num_options, branch_tokens)
    if (option_index >= num_options).any():
        raise ValueError("option_index: expected an index into the response's options, got one past their end")
    logprob = _segment_reduce(np.add, branch_target_logprob.astype(np.float64), branch_tokens)  # [B]

    def lists(values: pa.Array) -> pa.Array:
        ends = np.cumsum(num_options)
        offsets = pa.array(np.concatenate([[0], ends]), pa.int32())
        return pa.ListArray.from_arrays(offsets, values, mask=pa.array(num_options == 0))

    return {
        "options": lists(pa.array(list(chain.from_iterable(options)), pa.string())),
        "option_logprobs": lists(pa.array(logprob)),
        "option_log_softmax": lists(pa.array(_segment_log_softmax(logprob, num_options))),
        "option_index": pa.array(option_index, pa.int32(), mask=option_index < 0),
    }


def _check_branches(
    transcripts: Sequence[EncodedTranscript], num_options: np.ndarray, branch_tokens: np.ndarray
) -> None:
    first = 0
    for t in transcripts:
        expected = np.repeat(np.arange(len(t.responses)), num_options[first : first + len(t.responses)])
        if not np.array_equal(t.branch_response, expected):
            raise ValueError(f"{t.study}, {t.participant}: expected one branch per option, in order of response")
        first += len(t.responses)
    if (branch_tokens < 1).any():  # a sum over nothing would read as probability 1
        raise ValueError("branches: expected at least one scored token in each, got one without")


def _concatenate(arrays: Iterable[np.ndarray], dtype: type[np.number]) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype), *arrays]).astype(dtype, copy=False)


def _places(counts: np.ndarray) -> np.ndarray:
    """0, 1, … within each segment: [2, 0, 3] → [0, 1, 0, 1, 2]."""
    starts = np.cumsum(counts) - counts
    places: np.ndarray = np.arange(counts.sum()) - np.repeat(starts, counts)
    return places


def _segment_reduce(ufunc: np.ufunc, values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """``ufunc`` over neighbouring segments of ``values``, ``counts`` long; 0 where a segment is empty."""
    reduced = np.zeros(len(counts), dtype=values.dtype)
    filled = counts > 0
    if filled.any():  # reduceat gives an empty segment its neighbour's value, so only the others are asked for
        starts = (np.cumsum(counts, dtype=np.int64) - counts)[filled]
        reduced[filled] = ufunc.reduceat(values, starts)
    return reduced


def _segment_log_softmax(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    shifted = values - np.repeat(_segment_reduce(np.maximum, values, counts), counts)
    total = _segment_reduce(np.add, np.exp(shifted), counts)
    log_total: np.ndarray = np.log(np.where(counts > 0, total, 1.0))
    log_softmax: np.ndarray = shifted - np.repeat(log_total, counts)
    return log_softmax


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file that was read."""

    path: str
    hash: str
    bytes: int


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

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            *(one + two for one, two in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True))
        )


@dataclass(frozen=True, slots=True)
class Manifest:
    """How a run was made, and what it took. Times, rates and peaks are those of the process that finished it."""

    model_id: str
    model_hash: str
    tokenizer_hash: str
    data: tuple[DataFile, ...]
    protocol: Protocol
    condition: Condition
    discrete: str | None  # only responses that match it were scored; None: all
    chat_template_hash: str | None  # None: the condition is not chat
    boundary: Boundary
    options: OptionSource
    max_options: int
    over_length: OverLength
    limit: int | None  # transcripts per study; None: all
    studies: tuple[str, ...] | None  # None: all
    versions: Mapping[str, str]  # see library_versions
    device: str
    dtype: str
    backend: str
    wave_tokens: int
    batch_tokens: int
    min_share: int
    unit_tokens: int  # about so many make a unit, and a part
    started: str  # ISO 8601, UTC
    counts: Counts = Counts()
    seconds: Mapping[str, float] = field(default_factory=dict)  # by phase; most go on beside "run"
    tokens_per_second: float = 0.0
    responses_per_second: float = 0.0
    peak_memory_bytes: int = 0
    peak_device_bytes: int | None = None  # of a device with memory of its own; None: there was none
    gpu_idle_share: float | None = None  # of the time between its first and last wave; see engine.DeviceClock
    finished: str | None = None  # None: not yet


# What two processes must agree in to write parts of one run. Budgets and machines may differ: they change scores by
# no more than rounding, and a run that goes on takes the budgets that it began with.
IDENTITY = (
    "model_hash",
    "tokenizer_hash",
    "data",
    "protocol",
    "condition",
    "discrete",
    "chat_template_hash",
    "boundary",
    "options",
    "max_options",
    "over_length",
    "limit",
    "studies",
    "dtype",
    "backend",
    "min_share",
    "unit_tokens",
)


def _identity(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Of a manifest as JSON; files of data count by their content."""
    values = {name: manifest.get(name) for name in IDENTITY}
    values["data"] = sorted(file["hash"] for file in manifest["data"])
    return values


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


@dataclass(frozen=True, slots=True)
class UnitReport:
    """What one unit adds to a run beside its records."""

    counts: Counts
    rejects: tuple[RowError, ...]
    sums: Mapping[str, Sequence[float]]  # metrics.SummaryAccumulator.sums


_METADATA = b"psykern"


@dataclass(frozen=True, slots=True, eq=False)
class RunFolder:
    """A run's folder while the run writes it. Every method raises RunFolderError, naming the path, when it cannot."""

    folder: Folder
    manifest: dict[str, Any]  # as JSON, as the run began
    _identity: str
    _parts: dict[str, UnitReport | None]  # by name, those that are known to be there; None: not read yet

    @classmethod
    def open(cls, path: str | Path, manifest: Manifest, *, resume: bool = True) -> RunFolder:
        """Begin the run in a new or empty folder, or go on with the same run.

        With ``resume=False`` only a new or empty folder will do. Raises RunFolderError where something else stands in
        the folder, and where the run there is another; the message says in what the two differ.
        """
        folder = Folder.at(path)
        folder.create()
        found = folder.files()
        if found and not (resume and "manifest.json" in found):
            hint = "" if resume else " (or --resume, to go on with the run there)"
            raise RunFolderError(
                f"{path}: expected a new or empty folder to write the run to{hint}, it holds {found[0]}"
            )
        began = _plain(dataclasses.asdict(manifest))
        if not folder.write_new("manifest.json", _json_writer(began)):
            began = _check_same(folder, began)
        parts: dict[str, UnitReport | None] = dict.fromkeys(folder.files("responses"))
        return cls(folder, began, json.dumps(_identity(began), sort_keys=True), parts)

    def part_name(self, unit: UnitInfo) -> str:
        digest = hashlib.sha256(f"{self._identity}{unit.key}".encode()).hexdigest()
        return f"part-{unit.index:06d}-{digest[:16]}.parquet"

    def has(self, unit: UnitInfo) -> bool:
        """Whether the unit's part is there, as far as this process knows; one that cannot be read is not."""
        name = self.part_name(unit)
        if name in self._parts and self._parts[name] is None:
            try:
                self._parts[name] = _read_report(self.folder, f"responses/{name}")
            except RunFolderError:
                del self._parts[name]
        return name in self._parts

    def look_again(self) -> None:
        """Sees what other processes have written since."""
        for name in self.folder.files("responses"):
            self._parts.setdefault(name, None)

    def write_part(self, unit: UnitInfo, table: pa.Table, report: UnitReport) -> str:
        """Write the unit's records ``table``, of :data:`SCHEMA`; gives the part's name."""
        if table.schema != SCHEMA:
            raise ValueError(f"part: expected the columns of records.SCHEMA, got {table.schema}")
        name = self.part_name(unit)
        table = table.replace_schema_metadata({_METADATA: json.dumps(_report_json(report))})
        self.folder.write(f"responses/{name}", lambda file: pq.write_table(table, file, compression="zstd"))
        self._parts[name] = report
        return name

    def reports(self, units: Iterable[UnitInfo]) -> Iterator[UnitReport]:
        """Of those units whose parts are there, in order."""
        for unit in units:
            if self.has(unit):
                report = self._parts[self.part_name(unit)]
                assert report is not None  # `has` reads it
                yield report

    def finish(self, manifest: Manifest, summary: Mapping[str, Any], rejects: Iterable[RowError]) -> None:
        """All parts are there: write the rest, the manifest last; ``summary`` is ``metrics.Summary.to_json()``."""
        if not self._parts:  # readers find the columns
            self.write_part(UnitInfo(0, "", "", 0), SCHEMA.empty_table(), UnitReport(Counts(), (), {}))
        lines = [json.dumps(_reject_json(error)) + "\n" for error in rejects]
        if lines:
            self.folder.write("rejects.jsonl", lambda file: file.write("".join(lines).encode()))
        self.folder.write("summary.json", _json_writer(summary))
        self.folder.write("manifest.json", _json_writer(dataclasses.asdict(manifest)))
        self.folder.remove_unfinished("responses")


def _check_same(folder: Folder, mine: dict[str, Any]) -> dict[str, Any]:
    """The manifest that is there. Raises RunFolderError where it is of another run."""
    path = folder.name("manifest.json")
    try:
        there = json.loads(folder.read("manifest.json"))
        one, two = _identity(there), _identity(mine)
        _check_beginning(there)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RunFolderError(f"{path}: cannot be read as a run's manifest: {type(error).__name__}: {error}") from error
    differences = [
        f"{name}: {_short(one[name])} there, {_short(two[name])} here" for name in one if one[name] != two[name]
    ]
    if differences:
        raise RunFolderError(f"{folder.path}: holds another run, which differs in {'; '.join(differences)}")
    return dict(there)


def _check_beginning(manifest: Mapping[str, Any]) -> None:
    """What a run that goes on takes over from the one that began. Raises ValueError, KeyError."""
    if not isinstance(manifest["started"], str):
        raise ValueError(f"started: expected a string, got {_short(manifest['started'])}")
    for name in ("wave_tokens", "batch_tokens"):
        value = manifest[name]
        if not (type(value) is int and 1 <= value < 2**31):  # JSON's true is an int of Python's
            raise ValueError(f"{name}: expected a number from 1 to {2**31 - 1}, got {_short(value)}")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _json_writer(value: Mapping[str, Any]) -> Callable[[IO[bytes]], object]:
    text = json.dumps(_plain(value), indent=2, allow_nan=False) + "\n"
    return lambda file: file.write(text.encode())


def _reject_json(error: RowError) -> dict[str, Any]:
    return {"file": error.source.file, "line": error.source.line, "reason": error.reason}


def _report_json(report: UnitReport) -> dict[str, Any]:
    return {
        "counts": dataclasses.asdict(report.counts),
        "rejects": [_reject_json(error) for error in report.rejects],
        "sums": report.sums,
    }


def _read_report(folder: Folder, name: str) -> UnitReport:
    try:
        with folder.open(name) as file:
            metadata = pq.read_schema(file).metadata or {}
        report = json.loads(metadata[_METADATA])
        rejects = tuple(RowError(Source(r["file"], r["line"]), r["reason"]) for r in report["rejects"])
        return UnitReport(Counts(**report["counts"]), rejects, report["sums"])
    except (OSError, pa.ArrowException, ValueError, KeyError, TypeError, RecursionError) as error:
        raise RunFolderError(f"{folder.name(name)}: cannot be read: {error}") from error


def _plain(value: Any) -> Any:
    """``value`` as JSON's own types; what is not finite becomes null, because JSON has no NaN."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def read_run(path: str | Path, columns: Sequence[str] | None = None) -> pa.Table:
    """All responses of the run at ``path``, or ``columns`` of them. Raises RunFolderError when there are none."""
    names = SCHEMA.names if columns is None else columns
    schema = pa.schema([SCHEMA.field(name) for name in names])
    return pa.Table.from_batches(iter_run(path, columns), schema=schema)


def iter_run(path: str | Path, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
    """The run's responses batch by batch, parts in order, so that memory does not grow with the run."""
    folder = Folder.at(path)
    parts = [name for name in folder.files("responses") if name.startswith("part-") and name.endswith(".parquet")]
    if not parts:
        raise RunFolderError(f"{path}: expected a run's folder with responses/part-*.parquet, found no part")
    names = SCHEMA.names if columns is None else list(columns)
    schema = pa.schema([SCHEMA.field(name) for name in names])
    for part in parts:
        try:
            with folder.open(f"responses/{part}") as stream, pq.ParquetFile(stream) as file:
                if file.schema_arrow != SCHEMA:
                    raise RunFolderError(
                        f"{folder.name(part)}: expected the columns of a run, got {file.schema_arrow.names}"
                    )
                for batch in file.iter_batches(columns=names):
                    yield batch.select(names).replace_schema_metadata(schema.metadata)
        except (OSError, pa.ArrowException) as error:
            raise RunFolderError(f"{folder.name(part)}: cannot be read: {error}") from error
