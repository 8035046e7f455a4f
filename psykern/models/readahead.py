"""Weights of mapped files are read from disk while what comes before them is computed with.

Without that a layer waits for its pages where they are touched first, a few at a time. The parts of a model (its
layers, and what stands behind them) are used in turn, wave by wave. Once one is computed with, a thread brings the next
one's pages into memory and maps them. A wave during which no page of the process had to be read from disk says that all
is in memory, and in the next one nothing is done. On other systems than Linux nothing ever is.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import sys
import threading
from collections.abc import Sequence
from queue import SimpleQueue
from weakref import finalize

import torch
from torch import Tensor

_PIECE = 1 << 25  # bytes asked for at a time: a thread that is to end does so soon
_POPULATE_READ = 22  # MADV_POPULATE_READ of Linux 5.14: reads, maps, and returns when it is done

Queue = SimpleQueue[Sequence[Tensor] | None]


class ReadAhead:
    """See the module. One thread at a time tells it what is entered."""

    def __init__(self, parts: Sequence[Sequence[Tensor]]) -> None:
        """``parts``: the mapped tensors of each, in the order in which a wave uses them; the first follows the last."""
        self._parts = parts
        self._current: int | None = None
        self._disk_reads = -1  # of the process, when the wave began; -1: there was none
        self._is_needed = True
        self._queue: Queue | None = None

    def entered(self, part: int) -> None:
        """``part`` is computed with from now on: the next one's turn to be read."""
        if part == self._current or sys.platform != "linux":
            return
        self._current, upcoming = part, (part + 1) % len(self._parts)
        if upcoming == 0:
            before, self._disk_reads = self._disk_reads, _disk_reads()
            self._is_needed = self._disk_reads != before
        if self._is_needed:
            self._thread().put(self._parts[upcoming])

    def _thread(self) -> Queue:
        """The queue of a thread that runs."""
        if self._queue is None:
            self._queue = SimpleQueue()
            # A daemon, unlike an executor's: the end of a program does not wait for what is read for nobody.
            threading.Thread(target=_work, args=(self._queue,), name="readahead", daemon=True).start()
            finalize(self, self._queue.put, None)
        return self._queue


def _work(queue: Queue) -> None:
    while (tensors := queue.get()) is not None:
        for tensor in tensors:
            bring_in(tensor)


def bring_in(tensor: Tensor) -> None:
    """Reads the pages of a mapped tensor that are not in memory, and maps them. No error where that cannot be: then
    they are read where they are used."""
    begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    begin -= begin % mmap.PAGESIZE
    for first in range(begin, end, _PIECE):
        if _advise(first, min(_PIECE, end - first)) == errno.EINVAL:  # an older kernel
            _touch(tensor)
            return


def _touch(tensor: Tensor) -> None:
    """Each page once."""
    tensor.detach().reshape(-1).view(torch.uint8).numpy()[:: mmap.PAGESIZE].max(initial=0)


def _advise(address: int, size: int) -> int:
    """The kernel's error number, 0 for none. Others go on meanwhile: ctypes gives Python's lock away."""
    libc = ctypes.CDLL(None, use_errno=True)
    failed = libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), _POPULATE_READ)
    return ctypes.get_errno() if failed else 0


def _disk_reads() -> int:
    """Pages of this process that had to be read from disk, so far."""
    import resource  # which other systems may not have

    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt
