"""Encoded units on disk, so that scoring twenty checkpoints of one family tokenizes once.

    FOLDER/<key>/units.json              the units that the data are cut into
    FOLDER/<key>/<index>-<key>.arrow     one unit: an Arrow file of a row per transcript, memory-mapped when it is read

The first key is the hash of everything that the tokens depend on: psykern's version, tokenizer, settings, and content
of the data.

The rule: what is found is never trusted. Each file begins with the SHA-256 of the rest and names the unit that it
holds; one that is damaged, foreign or of another version is as good as absent, and is written anew. Files are put there
whole, so that several processes can share a folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import mmap
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from psykern.core.errors import RowError, Source
from psykern.core.folder import Folder
from psykern.core.types import EncodedTranscript, EncodedUnit, UnitInfo
from psykern.data.dataset import Dataset
from psykern.version import __version__

VERSION = 4  # of what is written here; another is not read
_MAGIC = b"psykern tokens\x00\x00"  # 16 bytes
_HEADER = 64  # bytes before the content: the magic, 32 bytes of SHA-256, zeros; Arrow wants its buffers aligned


@dataclass(frozen=True, slots=True)
class TokenCache:
    """The units of one data set under one tokenizer and one way to encode."""

    folder: Folder
    files: tuple[str, ...]  # of the data now: they may have moved since they were encoded

    @classmethod
    def open(cls, folder: str | Path, dataset: Dataset, depends_on: Mapping[str, Any]) -> TokenCache:
        """``depends_on``: JSON values by name, all that the tokens depend on beside the content of ``dataset`` and
        psykern's version.

        Raises RunFolderError where the folder cannot be written to, ValueError for data that were found without
        hashes.
        """
        content = [(file.study, file.hash) for file in dataset.files]
        if not all(digest for _, digest in content):
            raise ValueError("dataset: expected hashed files, as the cache is found by their content")
        text = json.dumps({"version": VERSION, "psykern": __version__, "data": content, **depends_on}, sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()[:32]
        inner = Folder.at(Path(folder) / key)
        inner.create()
        return cls(inner, dataset.paths)

    def read_units(self) -> list[UnitInfo] | None:
        """All units in order; None: not known yet."""
        content = self._read("units.json")
        return None if content is None else [UnitInfo(*fields) for fields in json.loads(bytes(content))]

    def write_units(self, units: Sequence[UnitInfo]) -> None:
        self._write("units.json", json.dumps([dataclasses.astuple(unit) for unit in units]).encode())

    def read(self, info: UnitInfo) -> EncodedUnit | None:
        """The unit; None: it is not there, or not as it was written."""
        content = self._read(_name(info))
        if content is None:
            return None
        table = pa.ipc.open_file(pa.BufferReader(pa.py_buffer(content))).read_all()
        return _unit(info, table, self.files)

    def write(self, unit: EncodedUnit) -> None:
        stream = io.BytesIO()
        table = _table(unit, self.files)
        with pa.ipc.new_file(stream, table.schema) as writer:
            writer.write_table(table)
        self._write(_name(unit.info), stream.getvalue())

    def _read(self, name: str) -> memoryview | None:
        """The content of a file whose hash is right."""
        with suppress(OSError, ValueError), self.folder.open(name) as file:  # an empty file cannot be mapped
            mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            content = mapped[_HEADER:]
            if bytes(mapped[:_HEADER]) == _header(content):
                return content
        return None

    def _write(self, name: str, content: bytes) -> None:
        self.folder.write(name, lambda file: (file.write(_header(content)), file.write(content)))


def _header(content: bytes | memoryview) -> bytes:
    return (_MAGIC + hashlib.sha256(content).digest()).ljust(_HEADER, b"\x00")


def _name(info: UnitInfo) -> str:
    return f"{info.index:06d}-{info.key[:32]}.arrow"


_ARRAYS: Mapping[str, type[np.integer]] = {  # columns of numbers
    "token_ids": np.int32,
    "spans_tok": np.int32,
    "option_index": np.int32,
    "branch_response": np.int32,
    "branch_parent_tok": np.int32,
    "branch_scored_tok": np.int32,
    "branch_offsets": np.int64,
    "branch_token_ids": np.int32,
}


def _table(unit: EncodedUnit, files: Sequence[str]) -> pa.Table:
    """A row per transcript. Lists of options repeat from response to response: the column holds their number, and the
    lists themselves stand in the schema's metadata, with the refused rows and the counts."""
    transcripts = unit.transcripts
    columns: dict[str, pa.Array] = {
        name: pa.array([getattr(t, name) for t in transcripts], pa.string())
        for name in ("study", "experiment", "participant")
    }
    places = [_place(t.source, files) for t in transcripts]
    columns["file"] = pa.array([file for file, _, _ in places], pa.int32())
    columns["member"] = pa.array([member for _, member, _ in places], pa.string())
    columns["line"] = pa.array([line for _, _, line in places], pa.int64())
    for name, dtype in _ARRAYS.items():
        columns[name] = _lists([getattr(t, name).reshape(-1) for t in transcripts], dtype)
    for name in ("responses", "flags"):
        columns[name] = pa.array([list(getattr(t, name)) for t in transcripts], pa.list_(pa.string()))
    distinct = dict.fromkeys(chain.from_iterable(t.options for t in transcripts))
    numbers = {options: number for number, options in enumerate(distinct)}
    columns["options"] = _lists([np.array([numbers[o] for o in t.options], np.int32) for t in transcripts], np.int32)
    for name in ("num_dropped", "place"):
        columns[name] = pa.array([getattr(t, name) for t in transcripts], pa.int64())
    rest = {
        "index": unit.info.index,
        "key": unit.info.key,
        "options": list(numbers),
        "counts": [unit.without_metadata, unit.without_id, unit.shared_participants, unit.repeated],
        "rejects": [(*_place(e.source, files), e.reason) for e in unit.rejects],
    }
    return pa.table(columns).replace_schema_metadata({"psykern": json.dumps(rest)})


def _place(source: Source, files: Sequence[str]) -> tuple[int, str, int]:
    """Number of the file, what follows its name (``!member``), and the line."""
    for number, file in enumerate(files):
        rest = source.file[len(file) :]
        if source.file.startswith(file) and (not rest or rest.startswith("!")):
            return number, rest, source.line
    raise ValueError(f"source: expected one of the data's files, got {source.file}")


def _lists(arrays: Sequence[np.ndarray], dtype: type[np.integer]) -> pa.Array:
    offsets = np.cumsum([0, *map(len, arrays)])
    return pa.LargeListArray.from_arrays(offsets, np.concatenate([np.empty(0, dtype), *arrays]).astype(dtype))


def _unit(info: UnitInfo, table: pa.Table, files: Sequence[str]) -> EncodedUnit | None:
    rest = json.loads(table.schema.metadata[b"psykern"])
    if (rest["index"], rest["key"]) != (info.index, info.key):
        return None
    known = [None if options is None else tuple(options) for options in rest["options"]]
    names = (
        "study",
        "experiment",
        "participant",
        "file",
        "member",
        "line",
        "responses",
        "flags",
        "num_dropped",
        "place",
    )
    columns = {name: table.column(name).to_pylist() for name in names}
    arrays = {name: _arrays(table, name) for name in (*_ARRAYS, "options")}
    transcripts = tuple(
        EncodedTranscript(
            study=columns["study"][i],
            experiment=columns["experiment"][i],
            participant=columns["participant"][i],
            source=Source(files[columns["file"][i]] + columns["member"][i], columns["line"][i]),
            responses=tuple(columns["responses"][i]),
            flags=tuple(columns["flags"][i]),
            options=tuple(known[number] for number in arrays["options"][i].tolist()),
            spans_tok=arrays["spans_tok"][i].reshape(-1, 2),
            num_dropped=columns["num_dropped"][i],
            place=columns["place"][i],
            **{name: arrays[name][i] for name in _ARRAYS if name != "spans_tok"},
        )
        for i in range(table.num_rows)
    )
    rejects = tuple(RowError(Source(files[f] + member, line), reason) for f, member, line, reason in rest["rejects"])
    return EncodedUnit(info, transcripts, rejects, *rest["counts"])


def _arrays(table: pa.Table, name: str) -> list[np.ndarray]:
    """The arrays of a column, views of the mapped file."""
    if not table.num_rows:
        return []
    column = table.column(name).chunk(0)
    values, offsets = column.values.to_numpy(), column.offsets.to_numpy().tolist()
    return [values[i:j] for i, j in pairwise(offsets)]
