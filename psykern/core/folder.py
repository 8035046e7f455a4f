"""A folder that files are put into whole: on this machine, or anywhere that fsspec reaches (``s3://…``, ``gs://…``).

The rule: a file is there whole or not at all, also after a power cut. On a local or mounted disk it is written under a
temporary name, flushed and renamed. An object store shows an object only when all of it has arrived; other remote
systems get a temporary name and a move.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, Any

from psykern.core.errors import RunFolderError

# Protocols whose writes are atomic: a reader sees the old object or the new one.
_ATOMIC = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "memory"}
_TEMPORARY = ".tmp"


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder by its path or URL. Every method raises RunFolderError, naming the file, when it cannot."""

    path: str  # as the user gave it
    _fs: Any  # an fsspec file system; None: the local disk
    _root: str  # of the file system

    @classmethod
    def at(cls, path: str | Path) -> Folder:
        """The folder ``path``; it need not exist. A string with ``://`` is an fsspec URL."""
        text = str(path)
        if not text:
            raise RunFolderError("expected a folder or URL to write to, got an empty string")
        if "://" not in text or text.startswith("file://"):
            return cls(text.removeprefix("file://"), None, os.path.abspath(text.removeprefix("file://")))
        import fsspec  # here, because most runs need none of it

        try:
            fs, root = fsspec.core.url_to_fs(text)
        except (ImportError, ValueError, OSError) as error:
            raise RunFolderError(f"{text}: cannot be opened: {error}") from error
        return cls(text, fs, root)

    def name(self, file: str) -> str:
        """``file`` of this folder, for messages."""
        return f"{self.path.rstrip('/')}/{file}"

    @property
    def local(self) -> Path | None:
        """The path, where the folder is on the local disk."""
        return None if self._fs else Path(self.path)

    def create(self) -> None:
        """Make the folder and see that it can be written to."""
        if self._fs:
            self._try("", lambda: self._fs.makedirs(self._root, exist_ok=True))
            return
        root = Path(self._root)
        try:
            root.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise RunFolderError(f"{self.path}: expected a folder to write the run to, got a file") from error
        except OSError as error:
            raise cannot_write(self.path, error) from error
        probe = root / f".{uuid.uuid4().hex}{_TEMPORARY}"  # fails now, not after an hour
        try:
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def files(self, below: str = "") -> list[str]:
        """Names of what stands in the folder, or in its folder ``below``, sorted; not what is still being written."""
        try:
            if self._fs:
                self._fs.invalidate_cache()
                found = [entry.rstrip("/").rpartition("/")[2] for entry in self._fs.ls(self._at(below), detail=False)]
            else:
                found = os.listdir(self._at(below))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise RunFolderError(f"{self.name(below)}: cannot be read: {error.strerror or error}") from error
        return sorted(name for name in found if not (name.startswith(".") and name.endswith(_TEMPORARY)))

    def read(self, file: str) -> bytes:
        """Raises RunFolderError where it is not there, too."""
        try:
            with self.open(file) as stream:
                return stream.read()
        except OSError as error:
            raise RunFolderError(f"{self.name(file)}: cannot be read: {error.strerror or error}") from error

    def open(self, file: str) -> IO[bytes]:
        """To read it. Raises OSError."""
        if self._fs:
            stream: IO[bytes] = self._fs.open(self._at(file), "rb")
            return stream
        return open(self._at(file), "rb")

    def write(self, file: str, write: Callable[[IO[bytes]], object]) -> None:
        """Put what ``write`` writes at ``file``: all of it or, whatever happens, nothing."""
        if self._fs:
            content = BytesIO()
            write(content)
            self._try(file, lambda: self._send(file, content.getvalue()))
            return
        self._write_local(file, write, os.replace)

    def write_new(self, file: str, write: Callable[[IO[bytes]], object]) -> bool:
        """The same unless ``file`` is there, which is left as it is; whether it was written. Of several writers on one
        disk one succeeds; on a remote system without such a promise the last may win, so read what is there."""
        if self._fs:
            if file in self.files():
                return False
            self.write(file, write)
            return True
        try:
            self._write_local(file, write, _publish_new)
        except _AlreadyThere:
            return False
        return True

    def remove_unfinished(self, below: str) -> None:
        """Removes what writers that were killed left half written in the folder ``below``; nobody may be writing."""
        if self._fs:
            return
        for path in Path(self._at(below)).glob(f".*{_TEMPORARY}"):
            path.unlink(missing_ok=True)

    def _at(self, file: str) -> str:
        return f"{self._root}/{file}" if file else self._root

    def _try(self, file: str, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError as error:
            raise cannot_write(self.name(file) if file else self.path, error) from error

    def _send(self, file: str, content: bytes) -> None:
        folder = self._at(file).rpartition("/")[0]
        self._fs.makedirs(folder, exist_ok=True)
        protocols = {self._fs.protocol} if isinstance(self._fs.protocol, str) else set(self._fs.protocol)
        if protocols & _ATOMIC:
            self._fs.pipe_file(self._at(file), content)
            return
        temporary = f"{folder}/.{uuid.uuid4().hex}{_TEMPORARY}"
        self._fs.pipe_file(temporary, content)
        self._fs.mv(temporary, self._at(file))

    def _write_local(self, file: str, write: Callable[[IO[bytes]], object], publish: Callable[..., None]) -> None:
        path = Path(self._at(file))
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{_TEMPORARY}")
        try:
            path.parent.mkdir(exist_ok=True)
            try:
                with temporary.open("wb") as stream:
                    write(stream)
                    stream.flush()
                    os.fsync(stream.fileno())
                publish(temporary, path)
                _flush_folder(path.parent)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            raise cannot_write(self.name(file), error) from error


class _AlreadyThere(Exception):
    """Another writer was first."""


def _publish_new(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)
    except FileExistsError as error:
        raise _AlreadyThere from error
    except OSError:  # a file system without links: two writers at the same moment are not told apart there
        if path.exists():
            raise _AlreadyThere from None
        os.replace(temporary, path)


def cannot_write(path: str, error: OSError) -> RunFolderError:
    return RunFolderError(f"{path}: cannot be written: {error.strerror or error}")


def _flush_folder(folder: Path) -> None:
    """The renaming itself reaches the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
