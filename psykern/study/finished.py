"""Finished runs, opened for comparison: what the manifest says, and the responses by column in one order.

    open_runs(folder) ─► FinishedRun … ─ load ─► Responses ─ by_study ─► StudyResponses …

The order is that of study, experiment, participant, transcript and response by name, whatever order a run wrote
its parts in, so that two runs of the same data line up element by element. Only numbers are kept: about 40 bytes
a response, and 4 for each of its options.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from psykern.core import csr
from psykern.core.errors import RunFolderError
from psykern.core.settings import having
from psykern.runs.order import in_order

# What two runs must agree in before their numbers can be set against each other.
COMPARED = having("compared")
_BEFORE = {"marks": "keep"}  # what a manifest means that is older than the setting; None: nothing was chosen
_NAMES = ("study", "experiment", "participant")
_COLUMNS = (*_NAMES, "response_index", "response", "logprob", "is_argmax", "entropy")
_OPTION_COLUMNS = ("option_log_softmax", "option_index")
_BATCH_ROWS = 2**18


@dataclass(frozen=True, slots=True)
class FinishedRun:
    """A run with its manifest: a folder that ``psykern score`` left, or one condition's folder in it."""

    path: Path
    model_id: str
    condition: str  # "plain" where the manifest names none
    date: str | None  # that its prompts hold; None: they hold none
    data: tuple[str, ...]  # hashes of the data files, sorted
    data_read: tuple[str, ...]  # the same in the order in which the files were read
    shared_participants: int  # people who are in several of the files
    responses: int | None  # that its parts hold; None: the manifest does not say
    settings: tuple[tuple[str, str], ...]  # COMPARED, each value as JSON
    device: str
    dtype: str
    versions: tuple[tuple[str, str], ...]
    model_hash: str


def open_runs(path: Path) -> list[FinishedRun]:
    """The run at ``path``, or one for each condition when it holds a run per condition.

    Raises RunFolderError where there is none, or one without a manifest (it was interrupted).
    """
    if (path / "manifest.json").is_file():
        return [_open(path)]
    if not path.is_dir():
        raise RunFolderError(f"{path}: expected a run's folder, found {'a file' if path.exists() else 'nothing'}")
    inner = sorted(child for child in path.iterdir() if (child / "responses").is_dir())
    if (path / "responses").is_dir() or not inner:
        raise RunFolderError(f"{path}: expected manifest.json of a finished run, found none; was the run interrupted?")
    return [_open(child) for child in inner]


def _open(path: Path) -> FinishedRun:
    file = path / "manifest.json"
    try:
        manifest: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if manifest["finished"] is None:
            raise RunFolderError(f"{path}: the run is not finished; the command that began it goes on with it")
        return FinishedRun(
            path=path,
            model_id=manifest["model_id"],
            condition=manifest.get("condition") or "plain",
            date=manifest.get("date"),
            data=tuple(sorted(item["hash"] for item in manifest["data"])),
            data_read=tuple(item["hash"] for item in manifest["data"]),
            shared_participants=_count(manifest, "shared_participants") or 0,
            responses=_count(manifest, "responses"),
            settings=tuple((name, json.dumps(manifest.get(name, _BEFORE.get(name)))) for name in COMPARED),
            device=manifest["device"],
            dtype=manifest["dtype"],
            versions=tuple(manifest["versions"].items()),
            model_hash=manifest["model_hash"],
        )
    except FileNotFoundError as error:
        raise RunFolderError(f"{file}: expected the manifest of a finished run; was the run interrupted?") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunFolderError(f"{file}: cannot be read as a run's manifest: {type(error).__name__}: {error}") from error


def _count(manifest: dict[str, Any], name: str) -> int | None:
    count = manifest.get("counts", {}).get(name)
    return None if count is None else index(count)


@dataclass(frozen=True, slots=True, eq=False)
class Responses:
    """A run's responses in order of study, experiment, participant, transcript and response.

    Ragged levels are CSR: studies hold participants, participants hold responses, responses hold options. A
    response's options are left out where the response is none of them, so every list with options has its index.
    """

    studies: tuple[str, ...]  # [S]
    study_offsets: np.ndarray  # [S+1] int64, participants of each study
    participants: tuple[tuple[str, str, str], ...]  # [P] study, experiment, participant
    participant_offsets: np.ndarray  # [P+1] int64, responses of each participant
    response_index: np.ndarray  # [R] int32, within the transcript
    texts: np.ndarray  # [P] uint64, hash of the participant's responses in order; equal only within this process
    logprob: np.ndarray  # [R] float64, nats; NaN: not scored
    is_argmax: np.ndarray  # [R] float32; NaN: not scored
    entropy: np.ndarray  # [R] float32, nats; NaN: not scored
    option_offsets: np.ndarray  # [R+1] int64, into option_log_softmax
    option_index: np.ndarray  # [R] int32; -1: the response has no options here
    option_log_softmax: np.ndarray  # [option_offsets[-1]] float32, nats


@dataclass(slots=True)
class _Columns:
    """What is read, in the order of the files."""

    response_index: np.ndarray
    text: np.ndarray  # [R] int64, hash of the response's text
    logprob: np.ndarray
    is_argmax: np.ndarray
    entropy: np.ndarray
    num_options: np.ndarray
    option_index: np.ndarray
    log_softmax: list[np.ndarray]


def load(run: FinishedRun) -> Responses:
    """Read all responses of ``run``. Raises RunFolderError for a part that cannot be read, and where parts are missing
    or there twice."""
    parts = sorted((run.path / "responses").glob("part-*.parquet"))
    if not parts:
        raise RunFolderError(f"{run.path}: expected a run's folder with responses/part-*.parquet, found no part")
    num_rows = sum(_num_rows(part) for part in parts)
    if run.responses not in (None, num_rows):
        raise RunFolderError(
            f"{run.path}: expected the {run.responses:,} responses that manifest.json counts, its parts hold "
            f"{num_rows:,}; copy the folder anew, or let the command that wrote it go on"
        )
    columns = _Columns(
        response_index=np.empty(num_rows, np.int32),
        text=np.empty(num_rows, np.int64),
        logprob=np.empty(num_rows, np.float64),
        is_argmax=np.empty(num_rows, np.float32),
        entropy=np.empty(num_rows, np.float32),
        num_options=np.empty(num_rows, np.int32),
        option_index=np.empty(num_rows, np.int32),
        log_softmax=[],
    )
    names: list[tuple[str, str, str]] = []  # of each transcript
    starts: list[np.ndarray] = []  # its first row
    row, last = 0, None
    for batch in in_order(_batches(parts)):
        _fill(columns, batch, row)
        first, owners, last = _transcripts(batch, columns.response_index[row : row + len(batch)], last)
        starts.append(first + row)
        names.extend(owners)
        row += len(batch)
    return _arrange(columns, names, csr.concatenate(starts, np.int64))


def _num_rows(part: Path) -> int:
    try:
        rows: int = pq.read_metadata(part).num_rows
        return rows
    except (OSError, pa.ArrowException) as error:
        raise RunFolderError(f"{part}: cannot be read: {error}") from error


def _batches(parts: Sequence[Path]) -> Iterator[pa.RecordBatch]:
    for part in parts:
        try:
            # Names and responses repeat: read as dictionaries, only their few distinct values become Python strings.
            with pq.ParquetFile(part, read_dictionary=[*_NAMES, "response"]) as file:
                missing = sorted({*_COLUMNS, *_OPTION_COLUMNS} - set(file.schema_arrow.names))
                if missing:
                    raise RunFolderError(f"{part}: expected the columns of a run, found no {', '.join(missing)}")
                yield from file.iter_batches(_BATCH_ROWS, columns=[*_COLUMNS, *_OPTION_COLUMNS])
        except (OSError, pa.ArrowException) as error:
            raise RunFolderError(f"{part}: cannot be read: {error}") from error


def _fill(columns: _Columns, batch: pa.RecordBatch, row: int) -> None:
    rows = slice(row, row + len(batch))

    def numbers(name: str, kind: pa.DataType, null: Any) -> np.ndarray:
        column: np.ndarray = batch.column(name).cast(kind).fill_null(null).to_numpy()
        return column

    columns.response_index[rows] = numbers("response_index", pa.int32(), 0)
    columns.logprob[rows] = numbers("logprob", pa.float64(), np.nan)
    columns.is_argmax[rows] = numbers("is_argmax", pa.float32(), np.nan)
    columns.entropy[rows] = numbers("entropy", pa.float32(), np.nan)
    hashes = np.array([hash(text) for text in batch.column("response").dictionary.to_pylist()], np.int64)
    indices = batch.column("response").indices.fill_null(0).to_numpy()
    columns.text[rows] = hashes[indices] if len(hashes) else 0

    index = numbers("option_index", pa.int32(), -1)
    lists = batch.column("option_log_softmax")
    lengths = lists.value_lengths().fill_null(0).to_numpy()
    known = (index >= 0) & (lengths > 0)
    columns.option_index[rows] = np.where(known, index, -1)
    columns.num_options[rows] = np.where(known, lengths, 0)
    values = lists.flatten().to_numpy()
    columns.log_softmax.append(values[np.repeat(known, lengths)].astype(np.float32))


_Last = tuple[tuple[str, ...], int]  # names and response index of the row before


def _transcripts(
    batch: pa.RecordBatch, response_index: np.ndarray, last: _Last | None
) -> tuple[np.ndarray, list[tuple[str, str, str]], _Last | None]:
    """Rows of the batch at which a transcript begins, whose it is, and the batch's last row.

    A transcript begins where a name changes, or where the response index does not rise: a participant can have two.
    """
    if not len(batch):
        return np.empty(0, np.int64), [], last
    new = np.zeros(len(batch), bool)
    codes, names = [], []
    for name in _NAMES:
        column = batch.column(name)
        code = column.indices.fill_null(-1).to_numpy()
        codes.append(code)
        names.append([str(value) for value in column.dictionary.to_pylist()] + [""])  # -1: the last
        new[1:] |= code[1:] != code[:-1]
    new[1:] |= response_index[1:] <= response_index[:-1]

    def owner(row: int) -> tuple[str, str, str]:
        study, experiment, participant = (of[code[row]] for of, code in zip(names, codes, strict=True))
        return study, experiment, participant

    new[0] = last is None or owner(0) != last[0] or response_index[0] <= last[1]
    first = np.flatnonzero(new)
    return first, [owner(row) for row in first.tolist()], (owner(len(batch) - 1), int(response_index[-1]))


def _arrange(columns: _Columns, names: list[tuple[str, str, str]], starts: np.ndarray) -> Responses:
    """Transcripts, and with them their rows, by name; equal names keep the order of the files."""
    num_rows = len(columns.response_index)
    order = sorted(range(len(names)), key=names.__getitem__)
    new = [i for i, t in enumerate(order) if i == 0 or names[t] != names[order[i - 1]]]  # a participant's first
    rows, bounds = csr.take(np.arange(num_rows), np.append(starts, num_rows), np.array(order, np.int64))
    log_softmax = csr.concatenate(columns.log_softmax, np.float32)
    option_offsets = csr.offsets_of(columns.num_options)
    columns.log_softmax.clear()
    if order != list(range(len(order))):
        log_softmax, option_offsets = csr.take(log_softmax, option_offsets, rows)
        for name in ("response_index", "text", "logprob", "is_argmax", "entropy", "option_index"):
            setattr(columns, name, getattr(columns, name)[rows])
    participants = tuple(names[order[i]] for i in new)
    offsets = bounds[[*new, len(order)]]
    studies, study_offsets = _studies_of(participants)
    return Responses(
        studies=studies,
        study_offsets=study_offsets,
        participants=participants,
        participant_offsets=offsets,
        response_index=columns.response_index,
        texts=_text_hashes(columns.text, offsets),
        logprob=columns.logprob,
        is_argmax=columns.is_argmax,
        entropy=columns.entropy,
        option_offsets=option_offsets,
        option_index=columns.option_index,
        option_log_softmax=log_softmax,
    )


def restrict(responses: Responses, participants: Sequence[tuple[str, str, str]]) -> Responses:
    """The responses of those of ``participants`` who are there, in the same order."""
    wanted = set(participants)
    keep = np.array([participant in wanted for participant in responses.participants], bool)
    kept = tuple(participant for participant in responses.participants if participant in wanted)
    every = np.arange(len(responses.response_index))
    rows, participant_offsets = csr.take(every, responses.participant_offsets, np.flatnonzero(keep))
    log_softmax, option_offsets = csr.take(responses.option_log_softmax, responses.option_offsets, rows)
    studies, study_offsets = _studies_of(kept)
    return Responses(
        studies=studies,
        study_offsets=study_offsets,
        participants=kept,
        participant_offsets=participant_offsets,
        response_index=responses.response_index[rows],
        texts=responses.texts[keep],
        logprob=responses.logprob[rows],
        is_argmax=responses.is_argmax[rows],
        entropy=responses.entropy[rows],
        option_offsets=option_offsets,
        option_index=responses.option_index[rows],
        option_log_softmax=log_softmax,
    )


def _studies_of(participants: Sequence[tuple[str, str, str]]) -> tuple[tuple[str, ...], np.ndarray]:
    """The studies of ``participants``, who are in order of study, and where each one's participants begin."""
    studies = Counter(study for study, _, _ in participants)
    return tuple(studies), csr.offsets_of(np.array(list(studies.values()), np.int64))


def _text_hashes(text: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """[P] uint64: Σ over a participant's responses of their hash times an odd number that differs by place."""
    place = csr.places(np.diff(offsets)).astype(np.uint64)
    mixed = text.astype(np.uint64) * (place * np.uint64(0x9E3779B97F4A7C15) | np.uint64(1))
    return csr.reduce(np.add, mixed, offsets)


@dataclass(frozen=True, slots=True, eq=False)
class StudyResponses:
    """One study's slice of a run's responses."""

    name: str
    offsets: np.ndarray  # [P+1] int64, responses of each participant, from 0
    nll: np.ndarray  # [R] float64
    hits: np.ndarray  # [R] float32
    entropy: np.ndarray  # [R] float32
    known: np.ndarray  # [R] bool, has options; the next three are of those responses
    log_softmax: np.ndarray  # float32
    option_offsets: np.ndarray  # int64, from 0
    option_index: np.ndarray  # int32

    @property
    def options(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As the functions of :mod:`psykern.study.metrics` take them: log-softmax, offsets, index."""
        return self.log_softmax, self.option_offsets, self.option_index


def by_study(responses: Responses) -> Iterator[StudyResponses]:
    """The responses study by study."""
    for place, name in enumerate(responses.studies):
        first, last = responses.study_offsets[place : place + 2]
        offsets = responses.participant_offsets[first : last + 1]
        rows = slice(int(offsets[0]), int(offsets[-1]))
        bounds = responses.option_offsets[rows.start : rows.stop + 1]
        known = responses.option_index[rows] >= 0
        yield StudyResponses(
            name=name,
            offsets=offsets - offsets[0],
            nll=-responses.logprob[rows],
            hits=responses.is_argmax[rows],
            entropy=responses.entropy[rows],
            known=known,
            log_softmax=responses.option_log_softmax[bounds[0] : bounds[-1]],
            option_offsets=np.append(bounds[:-1][known], bounds[-1]) - bounds[0],
            option_index=responses.option_index[rows][known],
        )
