"""A run's folder: one record per response, what was rejected, and how the run was made.

    RUN/responses/part-00000.parquet …   one row per response, columns as in SCHEMA
    RUN/rejects.jsonl                    one line per refused row: file, line, reason; absent when none was
    RUN/manifest.json                    model, data, settings, versions, counts, times
    RUN/summary.json                     means per study and over studies

The rule: a file is there whole or not at all. It is written under a temporary name in its own folder, flushed
to the disk and renamed; only rejects.jsonl grows line by line. Equal tables give equal bytes.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import resource
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from psykern.core import (
    Boundary,
    Condition,
    EncodedTranscript,
    OptionSource,
    OverLength,
    Protocol,
    RowError,
    RunFolderError,
    TargetScores,
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
    """What went through a run."""

    transcripts: int
    responses: int
    scored_responses: int
    tokens: int  # of all scored transcripts, as if each were computed alone
    computed_tokens: int  # rows that went through the model
    rejects: int  # rows of the data that were refused
    over_length_transcripts: int  # skipped by the over-length policy
    dropped_responses: int  # left out by the over-length policy "truncate"
    without_metadata_transcripts: int = 0  # left out by the condition persona


@dataclass(frozen=True, slots=True)
class Manifest:
    """How a run was made, and what it took."""

    model_id: str
    model_hash: str
    tokenizer_hash: str
    data: tuple[DataFile, ...]
    protocol: Protocol
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
    counts: Counts
    seconds: Mapping[str, float]  # by phase; reading, encoding, planning and writing go on beside "run"
    tokens_per_second: float
    responses_per_second: float
    peak_memory_bytes: int
    peak_device_bytes: int | None  # of a device with memory of its own; None: there was none
    gpu_idle_share: float | None  # of the time between its first and last wave; see engine.DeviceClock
    started: str  # ISO 8601, UTC
    finished: str
    condition: Condition = "plain"
    discrete: str | None = None  # only responses that match it were scored; None: all
    chat_template_hash: str | None = None  # None: the condition is not chat


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


@dataclass(slots=True)
class RunFolder:
    """A run's folder while the run writes it. Every method raises RunFolderError, naming the path, when it cannot."""

    path: Path
    num_parts: int = 0
    num_rejects: int = 0

    @classmethod
    def create(cls, path: Path) -> RunFolder:
        """Make the folder; it may exist if it is empty."""
        try:
            path.mkdir(parents=True, exist_ok=True)
            found = min((entry.name for entry in path.iterdir()), default=None)
            with tempfile.TemporaryFile(dir=path):  # fails now, not after an hour, if the folder is not writable
                pass
        except OSError as error:
            if path.exists() and not path.is_dir():
                raise RunFolderError(f"{path}: expected a folder to write the run to, got a file") from error
            raise _cannot_write(path, error) from error
        if found is not None:
            raise RunFolderError(f"{path}: expected a new or empty folder to write the run to, it holds {found}")
        return cls(path)

    def write_part(self, table: pa.Table) -> Path:
        """Write ``table``, of :data:`SCHEMA`, as the next part."""
        if table.schema != SCHEMA:
            raise ValueError(f"part: expected the columns of records.SCHEMA, got {table.schema}")
        part = self.path / "responses" / f"part-{self.num_parts:05d}.parquet"
        _write_whole(part, lambda file: pq.write_table(table, file, compression="zstd"))
        self.num_parts += 1
        return part

    def reject(self, error: RowError) -> None:
        """Append a refused row to rejects.jsonl."""
        row = {"file": error.source.file, "line": error.source.line, "reason": error.reason}
        path = self.path / "rejects.jsonl"
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as os_error:
            raise _cannot_write(path, os_error) from os_error
        self.num_rejects += 1

    def write_manifest(self, manifest: Manifest) -> None:
        """Write manifest.json; a run without any part gets an empty one first, so that readers find the columns."""
        if self.num_parts == 0:
            self.write_part(SCHEMA.empty_table())
        self._write_json("manifest.json", dataclasses.asdict(manifest))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json from ``metrics.Summary.to_json()``."""
        self._write_json("summary.json", summary)

    def _write_json(self, name: str, value: Mapping[str, Any]) -> None:
        text = json.dumps(_plain(value), indent=2, allow_nan=False) + "\n"
        _write_whole(self.path / name, lambda file: file.write(text.encode()))


def _write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Put what ``write`` writes at ``path``: all of it or, whatever happens, nothing."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(exist_ok=True)
        try:
            with temporary.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise _cannot_write(path, error) from error


def _cannot_write(path: Path, error: OSError) -> RunFolderError:
    return RunFolderError(f"{path}: cannot be written: {error.strerror or error}")


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


def read_run(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """All responses of the run at ``path``, or ``columns`` of them. Raises RunFolderError when there are none."""
    names = SCHEMA.names if columns is None else columns
    schema = pa.schema([SCHEMA.field(name) for name in names])
    return pa.Table.from_batches(iter_run(path, columns), schema=schema)


def iter_run(path: Path, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
    """The run's responses batch by batch, parts in order, so that memory does not grow with the run."""
    parts = sorted((path / "responses").glob("part-*.parquet"))
    if not parts:
        raise RunFolderError(f"{path}: expected a run's folder with responses/part-*.parquet, found no part")
    for part in parts:
        try:
            with pq.ParquetFile(part) as file:
                if file.schema_arrow != SCHEMA:
                    raise RunFolderError(f"{part}: expected the columns of a run, got {file.schema_arrow.names}")
                for batch in file.iter_batches(columns=columns):
                    yield batch.select(SCHEMA.names if columns is None else columns)
        except (OSError, pa.ArrowException) as error:
            raise RunFolderError(f"{part}: cannot be read: {error}") from error
