"""The files behind what a user names (files, folders, ids of hub datasets), and a file of rows opened, packed or not.

What no row can come from is refused before anything is read: a Git LFS pointer, an archive without one member of rows,
a file beside a packed copy of itself, what psykern wrote. A run's folder that stands among data is passed over. A study
is called as its file or, where that has a generic name such as ``prompts.jsonl.zip``, as the first folder around it
whose name says something; a folder of the hub's cache is called as its data set.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple, cast
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq

from psykern.core.errors import DataError
from psykern.core.hub import is_hub_id, split_revision

_SUFFIXES = (".jsonl.gz", ".jsonl.zip", ".jsonl", ".zip", ".parquet")  # a longer one stands before its own end

# File and folder names of these words alone say nothing about the study: prompts_jsonl, train-00000-of-00001, 0000,
# part-00000-<uuid>-c000.snappy (Spark), snapshots/<commit> (the hub's cache), refs/convert/parquet's partial-train.
_GENERIC_WORD = re.compile(
    r"(prompts?|data|dataset|default|train|test|validation|valid|val|dev|eval|part|partial|shard|chunk|batch|split|file)?"
    r"\d*|of|tid|c\d{3}|jsonl|json|parquet|snappy|gz|gzip|zstd|snapshots|[0-9a-f]{16}|[0-9a-f]{32}|[0-9a-f]{40}",
    re.IGNORECASE,
)
# Rows under a name or packing that is not read: passed over, they would be missing in silence.
_UNREAD = re.compile(
    r"\.(jsonl|parquet)\.(gz|bz2|xz|lzma|zst|zstd|lz4|br|7z|tar)$|\.(ndjson|jsonlines)(\.\w+)?$", re.IGNORECASE
)
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
_HUB_FOLDER = re.compile(r"datasets--(?:.+--)?(.+)")  # datasets--owner--name
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
# What damaged files raise; the fourth: a directory of an archive whose bytes happen to ask for an unknown feature; the
# fifth: names of members that are not in their encoding, places before the file's start.
DAMAGE = (EOFError, zlib.error, zipfile.BadZipFile, NotImplementedError, ValueError, pa.ArrowException, OSError)


class Located(NamedTuple):
    """A file of rows, and the study of those rows that do not name theirs."""

    path: Path
    study: str


def find_files(data: Sequence[str | Path]) -> list[Located]:
    """The files behind paths of files, paths of folders and ids of hub datasets, each once, sorted by study and path.

    Folders are searched with their sub-folders; files of other kinds in them are ignored, hidden ones too.
    A hub dataset's revision may stand behind its id: ``owner/name@revision``. Raises DataError for what does not exist
    or holds no data, for a Git LFS pointer, an archive without one member of rows, a file that stands beside a packed
    copy of itself, and what is a run's.
    """
    found: dict[str, Located] = {}
    if not data or not all(map(str, data)):  # a variable of the shell that is not set
        raise DataError("data: expected paths or ids of the hub, got nothing, or an empty string")
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


def size_of(path: Path) -> int:
    """A file's bytes; raises DataError if it cannot be reached."""
    try:
        return path.stat().st_size
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def _resolve(item: str) -> list[Located]:
    """The files behind one path or hub id."""
    path = Path(item)
    absolute = Path(os.path.abspath(path))
    stem = _stem(path.name)
    if path.exists():
        _refuse_run(path)
    if path.is_dir():
        return _search(path, [absolute.name, *(parent.name for parent in absolute.parents)])
    if path.exists():
        if stem is None:
            raise DataError(f"{item}: expected a name that ends in {', '.join(_SUFFIXES)}, got {path.name}")
        return [Located(path, _study_name(stem, [parent.name for parent in absolute.parents]))]
    if stem is None and is_hub_id(item):
        dataset, revision = split_revision(item)
        folder = _download(dataset, revision)
        try:
            return _search(folder, [dataset.split("/")[1]])
        except DataError as error:
            hint = f"download it whole (hf download --repo-type dataset {dataset}) and give the folder"
            raise DataError(f"{item}: of the hub only *.parquet is taken: {error}; {hint}") from error
    raise DataError(f"{item}: no such file or folder")


def _search(folder: Path, names: list[str]) -> list[Located]:
    """The data files below a folder; `names`: what the folder is called, then the folders it stands in."""
    found = []
    visited = set()
    for where, subfolders, files in os.walk(folder, followlinks=True, onerror=_raise):
        real = os.path.realpath(where)
        if real in visited:  # a link to a folder around it, or a second way to a folder
            subfolders.clear()
            continue
        visited.add(real)
        if "manifest.json" in files and _is_run(Path(where)):
            subfolders.clear()
            continue
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        inner = [*reversed(Path(where).relative_to(folder).parts), *names]
        for name in sorted(files):
            stem = _stem(name)
            if name.startswith("."):
                continue
            if stem is not None:
                found.append(Located(Path(where, name), _study_name(stem, inner)))
            elif _UNREAD.search(name):
                endings = ", ".join(_SUFFIXES)
                raise DataError(
                    f"{Path(where, name)}: expected a name that ends in {endings}; unpack, rename or move it"
                )
    if not found:
        raise DataError(f"{folder}: expected files that end in {', '.join(_SUFFIXES)}, found none")
    return found


def _raise(error: OSError) -> None:
    raise error


def _download(dataset: str, revision: str | None) -> Path:
    """The local folder with the parquet files of a hub dataset."""
    import huggingface_hub  # here, because most runs need no hub and the import takes long

    try:
        folder = huggingface_hub.snapshot_download(
            dataset, repo_type="dataset", revision=revision, allow_patterns="*.parquet"
        )
    except Exception as error:  # the hub's own errors and those of whichever HTTP library it uses share no base
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        name, option = (f"{dataset}@{revision}", f" --revision {revision}") if revision else (dataset, "")
        raise DataError(
            f"{name}: no such file or folder, and the hub gives no dataset of that name ({reason}); "
            f"download it first (hf download --repo-type dataset {dataset}{option}) or give a folder"
        ) from error
    return Path(folder)


def _stem(name: str) -> str | None:
    """A data file's name without its suffix; None for files of other kinds."""
    return next((name[: -len(suffix)] for suffix in _SUFFIXES if name.lower().endswith(suffix)), None)


def _study_name(stem: str, folder_names: list[str]) -> str:
    """The first name that says something, of the file's and then those of the folders around it."""
    names = (None if _is_generic(stem) else stem, *map(_folder_study, folder_names))
    return next((name for name in names if name), stem)


def _folder_study(name: str) -> str | None:
    """The study that a folder's name tells of: of the folders ``key=value`` of a partitioned table only a study's."""
    if hub := _HUB_FOLDER.fullmatch(name):
        return hub[1]
    key, equals, value = name.partition("=")
    if equals:
        return unquote(value) if key == "study" and value != "__HIVE_DEFAULT_PARTITION__" else None
    return None if _is_generic(name) else name


def partition_keys(path: Path) -> list[str]:
    """The columns of a partitioned table that folders hold in their names: ``key=value``."""
    return [parent.name.partition("=")[0] for parent in Path(os.path.abspath(path)).parents if "=" in parent.name]


def _is_generic(name: str) -> bool:
    return all(_GENERIC_WORD.fullmatch(word) for word in re.split(r"[-_. ]", _UUID.sub("", name)))


def _is_run(folder: Path) -> bool:
    """Whether the folder is a run's: psykern's manifest is there from the moment that a run begins."""
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(manifest, dict) and {"model_hash", "tokenizer_hash", "data"} <= manifest.keys()


def _refuse_run(path: Path) -> None:
    """Refuse what is named and belongs to a run, such as its rejects.jsonl, which a pattern of the shell can hit."""
    real = Path(os.path.realpath(path))
    for folder in (real, *real.parents):
        if _is_run(folder):
            raise DataError(
                f"{path}: expected data, got what psykern wrote: {folder} holds a run; name data outside of it"
            )


def _check_no_copies(files: list[Located]) -> None:
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
    if path.exists() and not path.is_file():  # a pipe, which nobody may ever write to
        raise DataError(f"{path}: expected a file, as data are read more than once")
    try:
        with path.open("rb") as stream:
            start = stream.read(len(_LFS_POINTER))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    if start == _LFS_POINTER:
        raise DataError(f"{path}: expected data, got a Git LFS pointer; run `git lfs pull` in its repository")
    if path.name.lower().endswith(".zip"):
        with suppress(*DAMAGE), zipfile.ZipFile(path) as archive:  # read() reports a damaged one
            _find_member(archive, path)
    if path.name.lower().endswith(".parquet"):
        with suppress(*DAMAGE):
            schema = pq.read_schema(path)
            if b"psykern" in (schema.metadata or {}) and "text" not in schema.names:
                raise DataError(f"{path}: expected data, got a part of a run that psykern wrote")


@contextmanager
def open_lines(path: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """A JSON Lines file, unpacked while it is read, and its name for messages."""
    name = path.name.lower()
    if name.endswith(".zip"):
        with zipfile.ZipFile(path) as archive:
            member = _find_member(archive, path)
            with archive.open(member) as stream:
                yield f"{path}!{member.filename}", stream
    elif name.endswith(".gz"):
        if not size_of(path):  # which Python takes for a packed empty file
            raise EOFError("the file is empty")
        with gzip.open(path, "rb") as unpacked:
            yield str(path), cast(IO[bytes], unpacked)
    else:
        with path.open("rb") as stream:
            yield str(path), stream


def _find_member(archive: zipfile.ZipFile, path: Path) -> zipfile.ZipInfo:
    """The one member `prompts.jsonl`, else the one member `*.jsonl`; hidden ones (macOS adds
    `__MACOSX/._prompts.jsonl`) are passed over as in a folder."""
    members = [
        member
        for member in archive.infolist()
        if not member.is_dir() and not PurePosixPath(member.filename).name.startswith(".")
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
