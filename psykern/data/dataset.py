"""The data of a run: its files, the study that each is of, and what they hold.

Data are the same where the studies and hashes of their files are, wherever the files stand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from psykern.core.errors import DataError
from psykern.data.files import find_files, hash_file, size_of


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file of rows. Filled by :meth:`Dataset.find`."""

    path: Path
    study: str  # of those rows that do not name theirs
    hash: str  # "sha256:…" of its bytes; empty: they were not read
    bytes: int  # its size

    @property
    def tag(self) -> str:
        """The hash's first 8 digits, which names what is this file's own; empty: it was not read."""
        return self.hash.removeprefix("sha256:")[:8]


@dataclass(frozen=True, slots=True)
class Dataset:
    """Files of rows in the order in which they are read: by study, then by path."""

    files: tuple[DataFile, ...]

    @classmethod
    def find(cls, data: str | Path | Sequence[str | Path], *, hashed: bool = True) -> Dataset:
        """The files behind a path of a file or folder, an id of a hub dataset, or several of these.

        Without ``hashed`` no file is read from end to end. Raises DataError as :func:`.files.find_files` does.
        """
        found = find_files([data] if isinstance(data, (str, Path)) else data)
        return cls(
            tuple(DataFile(path, study, hash_file(path) if hashed else "", size_of(path)) for path, study in found)
        )

    def check_unchanged(self) -> None:
        """Raises DataError where a file is not what it was when its hash was taken; that is long ago where several
        conditions are scored one after the other."""
        for file in self.files:
            if file.hash and hash_file(file.path) != file.hash:
                raise DataError(f"{file.path}: changed since the run began; let nothing write to it, and begin again")

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(str(file.path) for file in self.files)
