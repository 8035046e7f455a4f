"""Files are put into a folder whole or not at all, on a disk and where fsspec reaches."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from psykern.core.errors import RunFolderError
from psykern.core.folder import Folder

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(params=["path", "file-url", "memory-url"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Folder]:
    if request.param == "memory-url":
        yield Folder.at(f"memory://{uuid.uuid4().hex}/run")
    else:
        yield Folder.at(tmp_path / "run" if request.param == "path" else f"file://{tmp_path}/run")


def put(content: bytes) -> object:
    return lambda file: file.write(content)


def test_what_is_written_is_read(folder: Folder) -> None:
    assert folder.files() == folder.files("responses") == []
    folder.create()
    folder.create()
    folder.write("a.json", put(b"one"))
    folder.write("responses/part", put(b"two"))
    folder.write("a.json", put(b"three"))
    assert folder.read("a.json") == b"three"
    assert folder.read("responses/part") == b"two"
    assert "a.json" in folder.files() and folder.files("responses") == ["part"]
    with pytest.raises(RunFolderError, match=r"nothing\.json: cannot be read"):
        folder.read("nothing.json")


def test_a_new_file_is_left_as_it_is(folder: Folder) -> None:
    folder.create()
    assert folder.write_new("a.json", put(b"one"))
    assert not folder.write_new("a.json", put(b"two"))
    assert folder.read("a.json") == b"one"
    assert folder.files() == ["a.json"]


def test_only_local_folders_have_a_path(tmp_path: Path) -> None:
    assert Folder.at(tmp_path).local == tmp_path
    assert Folder.at(f"file://{tmp_path}").local == tmp_path
    assert Folder.at("memory://run").local is None


def test_of_many_writers_of_a_new_file_one_succeeds(tmp_path: Path) -> None:
    folder = Folder.at(tmp_path)
    won: list[int] = []
    start = threading.Barrier(8)

    def write(i: int) -> None:
        start.wait()
        if folder.write_new("a", put(str(i).encode() * 1000)):
            won.append(i)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert folder.read("a") == str(won[0]).encode() * 1000
    assert os.listdir(tmp_path) == ["a"]


def test_a_writer_that_fails_leaves_what_was_there(folder: Folder) -> None:
    def fail(file: IO[bytes]) -> None:
        file.write(b"half")
        raise RuntimeError("mine")

    folder.create()
    folder.write("a", put(b"old"))
    for name in ("a", "b"):
        with pytest.raises(RuntimeError, match="mine"):
            folder.write(name, fail)
    assert folder.read("a") == b"old"
    assert folder.files() == ["a"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_writer_that_is_killed_leaves_what_was_there(call: str, tmp_path: Path) -> None:
    script = (
        "import os, signal, sys, psykern.core.folder as s\n"
        "folder = s.Folder.at(sys.argv[1])\n"
        "folder.write('a', lambda file: file.write(b'old'))\n"
        f"os.{call} = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)\n"
        "folder.write('a', lambda file: file.write(b'new'))\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    folder = Folder.at(tmp_path)
    assert folder.read("a") == b"old"
    assert folder.files() == ["a"]
    assert len(os.listdir(tmp_path)) == 2
    folder.remove_unfinished("")
    assert os.listdir(tmp_path) == ["a"]


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        folder = Folder.at(disk)
        folder.write("small", put(b"x" * 100))
        with pytest.raises(RunFolderError, match=r"large: cannot be written: No space left on device"):
            folder.write("large", put(b"x" * 100_000))
        assert folder.files() == ["small"]
        assert os.listdir(disk) == ["small"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_places_that_cannot_be_a_folder_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunFolderError, match="file: expected a folder to write the run to, got a file"):
        Folder.at(tmp_path / "file").create()
    with pytest.raises(RunFolderError, match=r"file/run: cannot be written: Not a directory"):
        Folder.at(tmp_path / "file" / "run").create()
    with pytest.raises(RunFolderError, match=r"responses/part: cannot be written"):
        (tmp_path / "responses").write_text("mine")
        Folder.at(tmp_path).write("responses/part", put(b""))
    with pytest.raises(RunFolderError, match=r"nonsense://a: cannot be opened"):
        Folder.at("nonsense://a")
    assert (tmp_path / "file").read_text() == (tmp_path / "responses").read_text() == "mine"


def test_an_empty_string_is_not_the_folder_at_hand() -> None:
    with pytest.raises(RunFolderError, match="expected a folder or URL to write to, got an empty string"):
        Folder.at("")
