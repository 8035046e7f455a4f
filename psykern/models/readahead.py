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

from torch import Tensor

_PIECE = 1 << 25  # bytes asked for at a time: a thread that is to end does so soon
_OLD_PIECE = 1 << 17  # the same of older kernels, which read no more than a device's read-ahead at a time
_POPULATE_READ = 22  # MADV_POPULATE_READ of Linux 5.14: reads, maps, and returns when it is done
_WILL_NEED = 3  # MADV_WILLNEED: begins to read

Places = Sequence[tuple[int, int]]  # first address and bytes


class ReadAhead:
    """See the module. One thread at a time tells it what is entered."""

    def __init__(self, parts: Sequence[Sequence[Tensor]]) -> None:
        """``parts``: the mapped tensors of each, in the order in which a wave uses them; the first follows the last."""
        self._mapped = parts  # as long as the thread may read
        self._parts = [[(tensor.data_ptr(), tensor.nbytes) for tensor in part] for part in parts]
        self._current: int | None = None
        self._disk_reads = -1  # of the process, when the wave began; -1: there was none
        self._is_needed = True
        self._queue: SimpleQueue[Places] | None = None

    def entered(self, part: int) -> None:
        """``part`` is computed with from now on: the next one's turn to be read."""
        if part == self._current or sys.platform != "linux":
            return
        self._current, upcoming = part, (part + 1) % len(self._parts)
        if upcoming == 0:
            before, self._disk_reads = self._disk_reads, _disk_reads()
            self._is_needed = self._disk_reads != before
        if self._is_needed:
            self._of_thread().put(self._parts[upcoming])

    def _of_thread(self) -> SimpleQueue[Places]:
        """The queue of a thread that runs."""
        if self._queue is None:
            self._queue, is_over = SimpleQueue[Places](), threading.Event()
            # A daemon, as Python waits for others before it tells them to end.
            thread = threading.Thread(target=_work, args=(self._queue, is_over), name="readahead", daemon=True)
            thread.start()
            finalize(self, _end, thread, self._queue, is_over)
        return self._queue


def _work(queue: SimpleQueue[Places], is_over: threading.Event) -> None:
    """In the thread, which knows addresses alone: to free a tensor while Python ends would end the process."""
    while not is_over.is_set():
        for address, size in queue.get():
            bring_in(address, size, is_over)


def _end(thread: threading.Thread, queue: SimpleQueue[Places], is_over: threading.Event) -> None:
    """Before the tensors are freed, and before Python ends; it takes as long as a piece."""
    is_over.set()
    queue.put(())
    if thread is not threading.current_thread():  # in which a garbage collection may come to it
        thread.join(timeout=10)


def bring_in(address: int, size: int, is_over: threading.Event) -> None:
    """Reads the pages of mapped memory that are not there, and maps them. No error where that cannot be: then they are
    read where they are used."""
    begin, end = address - address % mmap.PAGESIZE, address + size
    piece, advice = _PIECE, _POPULATE_READ
    while begin < end and not is_over.is_set():
        if _advise(begin, min(piece, end - begin), advice) == errno.EINVAL and advice == _POPULATE_READ:
            piece, advice = _OLD_PIECE, _WILL_NEED
        else:
            begin += piece


def _advise(address: int, size: int, advice: int) -> int:
    """The kernel's error number, 0 for none. Others go on meanwhile: ctypes gives Python's lock away."""
    libc = ctypes.CDLL(None, use_errno=True)
    failed = libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), advice)
    return ctypes.get_errno() if failed else 0


def _disk_reads() -> int:
    """Pages of this process that had to be read from disk, so far."""
    import resource  # which other systems may not have

    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt
