"""What is read ahead: the next part's pages, no others. Scores and memory do not know of it."""

from __future__ import annotations

import ctypes
import errno
import gc
import itertools
import mmap
import os
import sys
import threading
import time
from pathlib import Path
from queue import Empty, Queue

import numpy as np
import pytest
import torch
from support.checkpoints import CONFIGS, make_model
from support.groups import random_group
from torch import Tensor

from psykern.engine.engine import Engine
from psykern.engine.plan import plan
from psykern.kernels.compute import Compute
from psykern.models import readahead
from psykern.models.model import Model
from psykern.models.readahead import ReadAhead, bring_in
from psykern.models.spec import EMBEDDING, HEAD

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pages are read ahead on Linux alone")

PARTS = [[torch.full((4,), part), torch.full((3,), part)] for part in range(3)]
CPU = Compute.resolve("cpu")
NEVER = threading.Event()


class Asked:
    """Stands for :func:`bring_in`: what the thread brings in, in order."""

    def __init__(self) -> None:
        self._places: Queue[tuple[int, int]] = Queue()

    def __call__(self, address: int, size: int, is_over: threading.Event) -> None:
        self._places.put((address, size))

    def take(self, count: int) -> list[tuple[int, int]]:
        """The addresses and sizes of the next ``count``, waited for; and no more come."""
        taken = [self._places.get(timeout=10) for _ in range(count)]
        with pytest.raises(Empty):
            self._places.get(timeout=0.02)
        return taken


def places(tensors: list[Tensor]) -> list[tuple[int, int]]:
    return [(tensor.data_ptr(), tensor.nbytes) for tensor in tensors]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """And each wave reads something from disk."""
    spy, reads = Asked(), itertools.count()
    monkeypatch.setattr(readahead, "_disk_reads", lambda: next(reads))
    monkeypatch.setattr(readahead, "bring_in", spy)
    return spy


def test_each_part_asks_for_the_next_one_once(asked: Asked) -> None:
    ahead = ReadAhead(PARTS)
    for part, upcoming in ((2, 0), (0, 1), (1, 2), (2, 0)):
        ahead.entered(part)
        ahead.entered(part)
        assert asked.take(2) == places(PARTS[upcoming])


def test_nothing_is_asked_for_after_a_wave_that_read_nothing_from_disk(
    asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = iter([7, 9, 9, 9, 10])  # of the process when a wave begins, as the kernel counts them
    monkeypatch.setattr(readahead, "_disk_reads", lambda: next(reads))
    ahead = ReadAhead(PARTS)
    for is_read in (True, True, False, False, True):
        for part in (2, 0, 1):
            ahead.entered(part)
        asked.take(6 if is_read else 0)


def test_the_thread_ends_with_its_model(asked: Asked) -> None:
    before, ahead = threading.enumerate(), ReadAhead(PARTS)
    ahead.entered(0)
    asked.take(2)
    (thread,) = set(threading.enumerate()).difference(before)
    del ahead
    gc.collect()
    assert not thread.is_alive()  # waited for: what it reads may be freed now


def test_a_thread_that_reads_stops_between_two_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """And is waited for, when its model is let go and when Python ends: weakref's finalizers are called then."""
    begun, pieces = threading.Event(), list[int]()

    def advise(address: int, size: int, advice: int) -> int:
        pieces.append(address)
        begun.set()
        time.sleep(0.05)
        return 0

    monkeypatch.setattr(readahead, "_advise", advise)
    monkeypatch.setattr(readahead, "_PIECE", mmap.PAGESIZE)
    before, ahead = threading.enumerate(), ReadAhead([[], [torch.zeros(100 * mmap.PAGESIZE, dtype=torch.uint8)] * 9])
    ahead.entered(0)
    assert begun.wait(10)
    (thread,) = set(threading.enumerate()).difference(before)
    del ahead
    gc.collect()
    assert not thread.is_alive()
    assert len(pieces) < 20


@pytest.mark.parametrize("num_slots", [None, 2], ids=["mapped", "slots"])
def test_a_model_asks_for_the_layer_to_come(asked: Asked, tmp_path: Path, num_slots: int | None) -> None:
    """Mapped: the next one, and around the layers what else a wave needs. Two slots: the one behind that copied."""
    make_model(tmp_path, **CONFIGS["qwen3-one-kv-head"])
    model = Model(tmp_path, CPU, num_slots=num_slots)
    source = model._source

    def layer(index: int) -> list[tuple[int, int]]:
        spec = model.spec.layers[index]
        return places([source.tensor(spec.prefix + name) for name in spec.tensors()])

    embedding, head = (places([source.tensor(name)]) for name in (EMBEDDING, HEAD))
    count = len(layer(0))
    model.embed(torch.tensor([0]))
    assert asked.take(count + 1) == layer(0) + embedding
    model.layer(0, 1)
    if num_slots is None:
        assert asked.take(count) == layer(1)
    else:
        assert asked.take(2 * count) == layer(1) + layer(2)
    model.layer(1, 1)
    assert asked.take(count if num_slots is None else 1) == (layer(2) if num_slots is None else head)
    if num_slots is None:
        model.layer(2, 1)
        assert asked.take(1) == head
        model.head()
        assert asked.take(count + 1) == layer(0) + embedding


@pytest.fixture
def mapped(tmp_path: Path) -> Tensor:
    """80 pages and a bit of a file, from within a page on; none is in memory where the file system can do without."""
    path, size = tmp_path / "file", 81 * mmap.PAGESIZE
    path.write_bytes(bytes(size))
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)[96:]


def resident(tensor: Tensor) -> np.ndarray:
    """Whether each page of ``tensor`` is in memory."""
    begin = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    size = tensor.data_ptr() + tensor.nbytes - begin
    found = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
    assert (
        ctypes.CDLL(None).mincore(ctypes.c_void_p(begin), ctypes.c_size_t(size), found.ctypes.data_as(ctypes.c_void_p))
        == 0
    )
    return found & 1


@pytest.mark.parametrize("is_old", [False, True], ids=["kernel", "old-kernel"])
def test_all_pages_are_brought_in(mapped: Tensor, is_old: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if resident(mapped).all():
        pytest.skip("the file system keeps the file in memory")
    monkeypatch.setattr(readahead, "_PIECE", 5 * mmap.PAGESIZE)
    if is_old:
        kernel = readahead._advise
        monkeypatch.setattr(readahead, "_advise", lambda *of: errno.EINVAL if of[2] == 22 else kernel(*of))
    bring_in(mapped.data_ptr(), mapped.nbytes, NEVER)
    deadline = time.monotonic() + 10  # older kernels only begin to read
    while not resident(mapped).all() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert resident(mapped).all()


def test_the_kernel_is_asked_for_every_page_of_a_tensor_and_no_other(
    mapped: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readahead, "_PIECE", 5 * mmap.PAGESIZE)
    pages: list[int] = []

    def advise(address: int, size: int, advice: int) -> int:
        pages.extend(range(address, address + size, mmap.PAGESIZE))
        return 0

    monkeypatch.setattr(readahead, "_advise", advise)
    bring_in(mapped.data_ptr(), mapped.nbytes, NEVER)
    first = mapped.data_ptr() - 96  # where the file begins
    assert pages == list(range(first, first + 81 * mmap.PAGESIZE, mmap.PAGESIZE))


def test_a_file_cut_short_while_it_is_mapped_does_not_end_the_process(mapped: Tensor, tmp_path: Path) -> None:
    os.truncate(tmp_path / "file", 20 * mmap.PAGESIZE)
    bring_in(mapped.data_ptr(), mapped.nbytes, NEVER)


def test_scores_are_the_same_bytes_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model(tmp_path, **CONFIGS["qwen3"])
    planned = plan(random_group(np.random.default_rng(0), 4, 320, 2), wave_tokens=128, batch_tokens=64)
    one = Engine(Model(tmp_path, CPU)).run(planned)
    monkeypatch.setattr(ReadAhead, "entered", lambda self, part: None)
    two = Engine(Model(tmp_path, CPU)).run(planned)
    for field in ("logprob", "entropy", "is_argmax"):
        assert getattr(one, field).tobytes() == getattr(two, field).tobytes(), field


def anonymous_bytes() -> int:
    """Of this process: memory that is no file's."""
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024


def test_memory_does_not_grow_with_the_layers(tmp_path: Path) -> None:
    """The weights stay the files': 20 layers more are 31 MB as stored, 63 MB widened."""
    planned = plan(random_group(np.random.default_rng(0), 4, 320, 2), wave_tokens=4096, batch_tokens=512)
    for layers in (4, 24):
        sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": layers}
        make_model(tmp_path / str(layers), dtype=torch.bfloat16, **CONFIGS["llama"], **sizes)
    gc.collect()
    peaks = []
    for layers in (4, 4, 24):  # the first also allocates what the process keeps
        folder = tmp_path / str(layers)
        seen: list[int] = []
        Engine(Model(folder, CPU)).run(planned, lambda share, seen=seen: seen.append(anonymous_bytes()))
        assert len(seen) > layers
        peaks.append(max(seen))
    assert peaks[2] - peaks[1] < 16e6
