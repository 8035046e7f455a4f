"""Rows of JSON Lines (plain, gzip, zip) and parquet files become transcripts, one at a time.

    paths and ids ─ find_data ─► DataFile… ─ read ─► Transcript…

The rule: a row is used as it stands or refused with file, line and reason; nothing is repaired, and a bad row
never stops the rest. Only one row (of parquet: one small batch of rows) is in memory, whatever the file's size.

A row holds `text`, and if it likes `study`, `experiment`, `participant` (or `participant_reindexed`) and `options`;
what is known of the participant (the columns of :mod:`.persona`) is kept, other columns are ignored. None and
NaN count as missing. A study's name is its column, else the file's name, else, where that is a generic one such as
`prompts.jsonl.zip`, the name of the folder.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import json
import math
import os
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from psykern.core.errors import DataError, RowError, Source
from psykern.core.types import Transcript
from psykern.data import persona

_SUFFIXES = (".jsonl.gz", ".jsonl.zip", ".jsonl", ".zip", ".parquet")  # a longer one stands before its own end
_COLUMNS = ("text", "study", "experiment", "participant", "participant_reindexed", "options", *persona.COLUMNS)
_PARQUET_BATCH = 64  # rows decoded together
_PARQUET_BUFFER = 1 << 20  # bytes read ahead per column, instead of the whole column of a row group

# File and folder names that say nothing about the study: prompts, prompts_jsonl, data, train-00000-of-00001, 0000.
_GENERIC_NAME = re.compile(
    r"(prompts?|data|dataset|default|train|test|validation|val|part|shard)?(_jsonl)?([-_]?\d+)?(-of-\d+)?(-[0-9a-f]{16})?",
    re.IGNORECASE,
)
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
_KINDS = {
    type(None): "null",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
}
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
# What damaged files raise; the fourth: a directory of an archive whose bytes happen to ask for an unknown feature; the
# fifth: names of members that are not in their encoding, places before the file's start.
_DAMAGE = (EOFError, zlib.error, zipfile.BadZipFile, NotImplementedError, ValueError, pa.ArrowException, OSError)


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file of rows, and the study of those rows that do not name theirs."""

    path: Path
    study: str


def find_data(data: Sequence[str | Path]) -> list[DataFile]:
    """The files behind paths of files, paths of folders and ids of hub datasets, each once, sorted by study and path.

    Folders are searched with their sub-folders; files of other kinds in them are ignored, hidden ones too.
    Raises DataError for what does not exist or holds no data, for a Git LFS pointer, an archive without one member of
    rows, and a file that stands beside a packed copy of itself.
    """
    found: dict[str, DataFile] = {}
    for item in data:
        try:
            files = _resolve(str(item))
        except OSError as error:
            raise DataError(f"{error.filename or item}: cannot be read: {error.strerror or error}") from error
        for file in files:
            found.setdefault(os.path.realpath(file.path), file)
    files = sorted(found.values(), key=lambda file: (file.study, str(file.path)))
    _check_no_copies(files)
    for file in files:
        _check_content(file.path)
    return files


def hash_file(path: str | Path) -> str:
    """`sha256:` and the digest of a file's bytes in hexadecimal; raises DataError if it cannot be read."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    return f"sha256:{digest.hexdigest()}"


def _resolve(item: str) -> list[DataFile]:
    """The files behind one path or hub id."""
    path = Path(item)
    absolute = Path(os.path.abspath(path))
    stem = _stem(path.name)
    if path.is_dir():
        return _search(path, [absolute.name, *(parent.name for parent in absolute.parents)])
    if path.exists():
        if stem is None:
            raise DataError(f"{item}: expected a name that ends in {', '.join(_SUFFIXES)}, got {path.name}")
        return [DataFile(path, _study_name(stem, [parent.name for parent in absolute.parents]))]
    if stem is None and _HUB_ID.fullmatch(item):
        return _search(_download(item), [item.split("/")[1]])
    raise DataError(f"{item}: no such file or folder")


def _search(folder: Path, names: list[str]) -> list[DataFile]:
    """The data files below a folder; `names`: what the folder is called, then the folders it stands in."""
    found = []
    visited = set()
    for where, subfolders, files in os.walk(folder, followlinks=True, onerror=_raise):
        real = os.path.realpath(where)
        if real in visited:  # a link to a folder around it, or a second way to a folder
            subfolders.clear()
            continue
        visited.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        inner = [*reversed(Path(where).relative_to(folder).parts), *names]
        for name in sorted(files):
            stem = _stem(name)
            if stem is not None and not name.startswith("."):
                found.append(DataFile(Path(where, name), _study_name(stem, inner)))
    if not found:
        raise DataError(f"{folder}: expected files that end in {', '.join(_SUFFIXES)}, found none")
    return found


def _raise(error: OSError) -> None:
    raise error


def _download(dataset: str) -> Path:
    """The local folder with the parquet files of a hub dataset."""
    import huggingface_hub  # here, because most runs need no hub and the import takes long

    try:
        return Path(huggingface_hub.snapshot_download(dataset, repo_type="dataset", allow_patterns="*.parquet"))
    except Exception as error:  # the hub's own errors and those of whichever HTTP library it uses share no base
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{dataset}: no such file or folder, and the hub gives no dataset of that name ({reason}); "
            f"download it first (hf download --repo-type dataset {dataset}) or give a folder"
        ) from error


def _stem(name: str) -> str | None:
    """A data file's name without its suffix; None for files of other kinds."""
    return next((name[: -len(suffix)] for suffix in _SUFFIXES if name.lower().endswith(suffix)), None)


def _study_name(stem: str, folder_names: list[str]) -> str:
    """The first name that says something, of the file's and then those of the folders around it."""
    return next((name for name in (stem, *folder_names) if not _GENERIC_NAME.fullmatch(name)), stem)


def _check_no_copies(files: list[DataFile]) -> None:
    """Refuse `x.jsonl` beside `x.jsonl.zip`: read both, and every participant counts twice."""
    seen: dict[tuple[str, str | None], Path] = {}
    for path in (file.path for file in files):
        other = seen.setdefault((os.path.abspath(path.parent), _stem(path.name)), path)
        if other is not path:
            raise DataError(
                f"{path}: stands beside {other.name}, expected one file of that name; name the one you mean"
            )


def _check_content(path: Path) -> None:
    """Refuse, before anything is read, what no row can come from."""
    try:
        with path.open("rb") as stream:
            start = stream.read(len(_LFS_POINTER))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    if start == _LFS_POINTER:
        raise DataError(f"{path}: expected data, got a Git LFS pointer; run `git lfs pull` in its repository")
    if path.name.lower().endswith(".zip"):
        with suppress(*_DAMAGE), zipfile.ZipFile(path) as archive:  # read() reports a damaged one
            _find_member(archive, path)


def read(
    files: Sequence[DataFile],
    *,
    studies: Collection[str] | None = None,
    limit: int | None = None,
    reject: Callable[[RowError], None],
) -> Iterator[Transcript]:
    """Transcripts in the order of the files and their rows.

    `studies` keeps only those studies, `limit` only the first accepted transcripts of each study; rows that they
    leave out are not checked. `reject` gets each bad row (and each damaged file, once, at the line reached); if it
    returns, reading goes on. Raises DataError for a file that cannot be opened or an archive with no rows to find.
    """
    for row in read_rows(files, studies=studies, limit=limit):
        if isinstance(row, RowError):
            reject(row)
        else:
            yield row


def read_rows(
    files: Sequence[DataFile], *, studies: Collection[str] | None = None, limit: int | None = None
) -> Iterator[Transcript | RowError]:
    """The same, with the error of each bad row in its place."""
    taken: Counter[str] = Counter()

    def wanted(study: str) -> bool:
        return (studies is None or study in studies) and (limit is None or taken[study] < limit)

    for file in files:
        for row in _rows_until_damage(file.path):
            if not row.may_name_study and not wanted(file.study):
                if file.path.suffix.lower() == ".parquet":
                    break  # columns are the same for all rows, so none of the others is wanted
                continue
            try:
                fields = row.load()
                study = _study(fields, file.study)
                if not wanted(study):
                    continue
                transcript = _transcript(fields, study, row.source)
            except ValueError as error:
                yield RowError(row.source, str(error))
                continue
            taken[study] += 1
            yield transcript


@dataclass(frozen=True, slots=True)
class _Row:
    source: Source
    may_name_study: bool  # False: the row has no column `study`
    load: Callable[[], Mapping[str, object]]  # the row's columns; raises ValueError with the reason why there are none


def _rows_until_damage(path: Path) -> Iterator[_Row]:
    """All rows that can be reached; behind them, where a damaged file ends, one that says so when it is loaded."""
    source = Source(str(path), 0)
    is_parquet = path.suffix.lower() == ".parquet"
    try:
        for row in _parquet_rows(path) if is_parquet else _json_rows(path):
            source = row.source
            yield row
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    except _DAMAGE as error:
        unit = "row" if is_parquet else "line"
        reason = f"file is damaged or truncated after {unit} {source.line}: {error}"
        yield _Row(Source(source.file, source.line + 1), True, partial(_refuse, reason))


def _refuse(reason: str) -> Mapping[str, object]:
    raise ValueError(reason)


def _json_rows(path: Path) -> Iterator[_Row]:
    with _open_lines(path) as (name, stream):
        for number, line in enumerate(stream, start=1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                yield _Row(Source(name, number), b'"study"' in line, partial(_parse, line))


@contextmanager
def _open_lines(path: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """A JSON Lines file, unpacked while it is read, and its name for messages."""
    name = path.name.lower()
    if name.endswith(".zip"):
        with zipfile.ZipFile(path) as archive:
            member = _find_member(archive, path)
            with archive.open(member) as stream:
                yield f"{path}!{member.filename}", stream
    elif name.endswith(".gz"):
        with gzip.open(path, "rb") as unpacked:
            yield str(path), cast(IO[bytes], unpacked)
    else:
        with path.open("rb") as stream:
            yield str(path), stream


def _find_member(archive: zipfile.ZipFile, path: Path) -> zipfile.ZipInfo:
    """The one member `prompts.jsonl`, else the one member `*.jsonl` (macOS adds `__MACOSX/._prompts.jsonl`)."""
    members = [
        member for member in archive.infolist() if not member.is_dir() and not member.filename.startswith("__MACOSX/")
    ]
    rows = [member for member in members if PurePosixPath(member.filename).name == "prompts.jsonl"]
    rows = rows or [member for member in members if member.filename.lower().endswith(".jsonl")]
    if len(rows) != 1:
        names = ", ".join(member.filename for member in members) or "nothing"
        raise DataError(f"{path}: expected one member prompts.jsonl, or one that ends in .jsonl; it holds {names}")
    member = rows[0]
    if member.flag_bits & 0x1:
        raise DataError(f"{path}: member {member.filename} is encrypted; expected one that needs no password")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        method = member.compress_type
        raise DataError(f"{path}: member {member.filename}: expected packing by deflate or none, got method {method}")
    return member


def _parse(line: bytes) -> Mapping[str, object]:
    try:
        fields = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        byte = f"0x{line[error.start]:02x}"
        raise ValueError(f"not UTF-8: byte {byte} at byte {error.start} of the line ({error.reason})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} (character {error.pos} of the line)") from error
    except ValueError as error:  # an integer longer than Python converts
        reason = str(error).split(";")[0]  # behind it stands advice for programmers
        raise ValueError(f"not JSON that can be read: {reason}") from error
    except RecursionError as error:
        raise ValueError("not JSON that can be read: nested too deeply") from error
    if not isinstance(fields, dict):
        raise ValueError(f"row: expected an object, got {_kind(fields)}")
    return fields


def _parquet_rows(path: Path) -> Iterator[_Row]:
    number = 0
    with pq.ParquetFile(path, buffer_size=_PARQUET_BUFFER, pre_buffer=False) as parquet:
        columns = [name for name in parquet.schema_arrow.names if name in _COLUMNS]
        if "text" not in columns:
            reason = f"text: expected a column of that name, got columns {', '.join(parquet.schema_arrow.names)}"
            yield _Row(Source(str(path), 1), True, partial(_refuse, reason))
            return
        for group in range(parquet.num_row_groups):  # one by one, so that damage costs no row of the group before
            for batch in parquet.iter_batches(_PARQUET_BATCH, row_groups=[group], columns=columns):
                for place in range(batch.num_rows):
                    number += 1
                    yield _Row(Source(str(path), number), "study" in columns, partial(_take, batch, place))


def _take(batch: pa.RecordBatch, place: int) -> Mapping[str, object]:
    try:
        columns = zip(batch.schema.names, batch.columns, strict=True)
        return {name: column[place].as_py() for name, column in columns}
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: byte 0x{error.object[error.start]:02x} ({error.reason})") from error


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


def _transcript(fields: Mapping[str, object], study: str, source: Source) -> Transcript:
    text = fields.get("text")
    if _is_missing(text):
        raise ValueError("text: missing")
    text = _string("text", text)
    responses_char = find_responses(text)
    participant = fields.get("participant")
    if _is_missing(participant):
        participant = fields.get("participant_reindexed")
    return Transcript(
        study=study,
        experiment=_string_or_number("experiment", fields.get("experiment"), missing=""),
        participant=_string_or_number("participant", participant, missing=str(source.line)),
        text=text,
        responses_char=responses_char,
        options=_options(fields.get("options"), len(responses_char)),
        source=source,
        metadata=persona.metadata(fields),
    )


def _study(fields: Mapping[str, object], default: str) -> str:
    study = fields.get("study")
    study = _string("study", default if _is_missing(study) else study)
    if not study:
        raise ValueError("study: expected a name, got an empty string")
    return study


def _options(value: object, num_responses: int) -> tuple[tuple[str, ...], ...] | None:
    """One tuple per response, from one list for all responses or one list (or null) per response."""
    if _is_missing(value):
        return None
    if not isinstance(value, list):
        raise ValueError(f"options: expected a list, got {_kind(value)}")
    per_response = any(isinstance(item, list) for item in value) or (value != [] and all(map(_is_missing, value)))
    if not per_response:
        return (_option_list("options", value),) * num_responses
    if len(value) != num_responses:
        raise ValueError(f"options: expected one list for each of {num_responses} responses, got {len(value)} lists")
    equal: dict[tuple[str, ...], tuple[str, ...]] = {}  # equal lists become one object
    lists = (_option_list(f"options of response {number}", item) for number, item in enumerate(value, start=1))
    return tuple(equal.setdefault(options, options) for options in lists)


def _option_list(name: str, value: object) -> tuple[str, ...]:
    if _is_missing(value):
        return ()
    if not isinstance(value, list):
        raise ValueError(f"{name}: expected a list or null, got {_kind(value)}")
    options: dict[str, None] = {}  # an ordered set
    for number, item in enumerate(value, start=1):
        is_number = isinstance(item, (int, float)) and not isinstance(item, bool) and math.isfinite(item)
        option = str(item) if is_number else _string(f"{name}: option {number}", item)
        if not option:
            raise ValueError(f"{name}: option {number} is empty")
        if option in options:
            raise ValueError(f"{name}: option {number} repeats {option!r}")
        options[option] = None
    return tuple(options)


def _string_or_number(name: str, value: object, *, missing: str) -> str:
    """Numbers as people write ids: 7 and 7.0 are both `7`."""
    if _is_missing(value):
        return missing
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else str(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str):
        return _string(name, value)
    raise ValueError(f"{name}: expected a string or a number, got {_kind(value)}")


def _string(name: str, value: object) -> str:
    """The value if it is a string that UTF-8 can hold; JSON's escapes can spell half of a surrogate pair."""
    if not isinstance(value, str):
        raise ValueError(f"{name}: expected a string, got {_kind(value)}")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            code = f"U+{ord(value[error.start]):04X}"
            raise ValueError(f"{name}: lone surrogate {code} at character {error.start}, not Unicode text") from error
    return value


def _is_missing(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _kind(value: object) -> str:
    """A value's type for messages, as JSON calls it."""
    return _KINDS.get(type(value), type(value).__name__)
