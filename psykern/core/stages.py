"""Stages that overlap: what comes next is prepared, and what is finished put away, in threads beside the caller's.

Each hand-over holds a bounded number of items, so that a slow stage holds the fast ones back. The first error of any
stage stops all and is raised in the caller's thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from queue import Empty, Full, Queue
from typing import Any, TypeVar

T = TypeVar("T")

_POLL_SECONDS = 0.05  # how soon a waiting thread sees that it is to stop
_END = object()


@contextmanager
def ahead(items: Iterable[T], depth: int = 1) -> Iterator[Iterator[T]]:
    """``items``, computed in a thread while the caller works on earlier ones; up to ``depth`` wait, beside the one in
    hand.

    An error of ``items`` is raised where the item would have come. Leaving early stops the thread after the item that
    it computes, and waits for that.
    """
    queue: Queue[Any] = Queue(depth)
    stop = threading.Event()

    def produce() -> None:
        end: tuple[object, BaseException | None] = (_END, None)
        try:
            for item in items:
                if not _put(queue, (None, item), stop):
                    return
        except BaseException as error:
            end = (_END, error)
        finally:
            if close := getattr(items, "close", None):
                close()
        _put(queue, end, stop)

    def consume() -> Iterator[T]:
        while not stop.is_set():
            try:
                mark, value = queue.get(timeout=_POLL_SECONDS)
            except Empty:
                continue
            if mark is not _END:
                yield value
            elif value is not None:
                raise value
            else:
                return

    thread = threading.Thread(target=produce, name="ahead", daemon=True)
    try:  # Ctrl-C may cut start and join short, too: then the threads on both sides see that they are to stop
        thread.start()
        yield consume()
    finally:
        stop.set()
        if thread.is_alive():
            thread.join()


def _put(queue: Queue[Any], item: object, stop: threading.Event) -> bool:
    """Waits for a place in ``queue``; False: told to stop first."""
    while not stop.is_set():
        try:
            queue.put(item, timeout=_POLL_SECONDS)
            return True
        except Full:
            continue
    return False


@contextmanager
def behind(work: Callable[[T], None], depth: int = 1) -> Iterator[Callable[[T], None]]:
    """Gives ``put``: ``put(item)`` returns at once and ``work(item)`` is done in a thread, in order; up to ``depth``
    items wait, then ``put`` does.

    After an error of ``work`` no more work is done, and the next ``put`` or leaving raises it. Leaving waits until what
    was put is done, also when the caller leaves by an error of its own, which then is the one that is raised.
    """
    queue: Queue[Any] = Queue(depth)
    errors: list[BaseException] = []

    def do() -> None:
        while (item := queue.get()) is not _END:
            if errors:
                continue
            try:
                work(item)
            except BaseException as error:
                errors.append(error)

    def put(item: T) -> None:
        if errors:
            raise errors[0]
        queue.put(item)

    thread = threading.Thread(target=do, name="behind", daemon=True)
    thread.start()
    try:
        yield put
    finally:
        queue.put(_END)
        thread.join()
    if errors:
        raise errors[0]
