"""What many callers ask at the same time, computed together by one thread.

    caller ─ submit ─► waiting ─ take ─► a batch ─ compute ─► each caller's result

The rule: first come, first served. A batch is the request that has waited longest and those behind it that can be
computed with it, up to a limit of tokens. What arrives while a batch is computed is the next one. Before a batch is
begun, requests of callers who are not alone wait a moment for each other; a caller that is alone does not. (A task of
asyncio is never taken to be alone, as those beside it cannot ask before it waits.)

Where a batch fails, each of its requests is computed alone, so that one caller's fault is not another's.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

from psykern.core.errors import PsykernError

WINDOW_SECONDS = 0.003  # without a new request, until a batch is begun
_MOST_WINDOWS = 10  # that its first request waits


class Kind(Protocol):
    """How requests of one kind are computed; requests of equal kinds can be computed together."""

    def compute(self, items: Sequence[Any], stop: Callable[[], bool]) -> Sequence[Any]:
        """A result for each of ``items``. ``stop`` is asked between waves: nobody waits any more; then raises
        InterruptedRun."""


@dataclass(slots=True, eq=False)
class Request:
    """One caller's. ``future`` gives the result; one that waits can be cancelled by it."""

    kind: Kind
    item: Any
    tokens: int
    patient: bool  # its caller is one of many: it waits a moment for others
    future: Future[Any] = field(default_factory=Future)
    abandoned: bool = False  # nobody wants the result any more


class Queue:
    """Requests on their way to the one thread that computes. Any thread may submit."""

    def __init__(self, most_tokens: int, window: float = WINDOW_SECONDS) -> None:
        """``most_tokens``: of a batch that is more than one request."""
        self._most_tokens = most_tokens
        self._window = window
        self._waiting: deque[Request] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._callers = 0  # that block in :meth:`result`
        self._closed = False
        self._dropped = False
        self._process = os.getpid()

    def submit(self, kind: Kind, item: Any, tokens: int, *, patient: bool = True) -> Request:
        """Puts a request behind the others. Raises PsykernError where the queue is closed, or another process's."""
        self._check_process()
        request = Request(kind, item, tokens, patient)
        with self._changed:
            if self._dropped:
                return request  # of a thread that the end of the process has overtaken
            self.check()
            self._waiting.append(request)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="psykern", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        return request

    def result(self, kind: Kind, item: Any, tokens: int) -> Any:
        """Submits and waits. Ctrl-C, and any other exception in the waiting thread, gives the request up."""
        self._check_process()
        with self._changed:
            self._callers += 1
            patient = self._callers > 1
        request = None
        try:
            request = self.submit(kind, item, tokens, patient=patient)
            return request.future.result()
        except BaseException:
            if request is not None:
                give_up(request)
            raise
        finally:
            with self._changed:
                self._callers -= 1

    async def wait(self, kind: Kind, item: Any, tokens: int) -> Any:
        """Submits and awaits; a cancelled task gives the request up."""
        request = self.submit(kind, item, tokens)
        try:
            return await asyncio.wrap_future(request.future)
        except BaseException:  # cancelled, or left where it waits
            give_up(request)
            raise

    def close(self) -> None:
        """Lets the batch in hand end; what waits fails. May be called twice."""
        if os.getpid() != self._process:  # of a fork, whose copy of the lock may be held for ever
            return
        with self._changed:
            self._closed = True
            left, self._waiting = self._waiting, deque()
            self._changed.notify_all()
        for request in left:
            if request.future.set_running_or_notify_cancel():
                request.future.set_exception(PsykernError("the scorer was closed before this was computed"))
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def drop(self) -> None:
        """Nobody can want a result any more, as the scorer is gone or the interpreter ends: the batch in hand stops
        with its wave. A thread that still waits, or asks, is told nothing."""
        if os.getpid() != self._process:
            return
        with self._changed:
            self._dropped = True
            self._waiting.clear()
        self.close()

    def check(self) -> None:
        """Raises PsykernError where nothing can be computed any more: the queue is closed, or this is a fork."""
        self._check_process()
        if self._closed:
            raise PsykernError("the scorer is closed; load the model again")

    def _check_process(self) -> None:
        """A fork has a copy of the locks and none of the threads that hold them."""
        if os.getpid() != self._process:
            raise PsykernError(
                f"the scorer was loaded in process {self._process}, of which this is a fork; load the model in this "
                "one, or use threads, which may share a scorer"
            )

    def _work(self) -> None:
        while batch := self._take():
            self._compute(batch)
            del batch  # it holds the model, which others may want to be gone while this waits

    def _compute(self, batch: Sequence[Request]) -> None:
        def stop() -> bool:
            return self._dropped or all(request.abandoned for request in batch)

        try:
            results = batch[0].kind.compute([request.item for request in batch], stop)
        except BaseException as error:
            if self._dropped:
                return
            if len(batch) == 1:
                batch[0].future.set_exception(error)
                return
            for request in batch:
                self._compute([request])
            return
        for request, result in zip(batch, results, strict=True):
            request.future.set_result(result)

    def _take(self) -> list[Request]:
        """The next batch; none: the queue is closed."""
        with self._changed:
            while True:
                while not self._waiting and not self._closed:
                    self._changed.wait()
                if not self._waiting:
                    return []
                self._wait_for_others()
                if batch := self._pick():
                    return batch

    def _wait_for_others(self) -> None:
        """Until none has come for a window's time, or there are tokens enough."""
        if not any(request.patient for request in self._waiting):
            return
        end = time.monotonic() + _MOST_WINDOWS * self._window
        while not self._closed and sum(request.tokens for request in self._waiting) < self._most_tokens:
            count, left = len(self._waiting), end - time.monotonic()
            if left > 0:
                self._changed.wait(min(self._window, left))
            if len(self._waiting) <= count:
                return

    def _pick(self) -> list[Request]:
        """Takes the first that is still wanted, and those behind it that go with it: none overtakes its like."""
        batch: list[Request] = []
        others: deque[Request] = deque()
        tokens, is_full = 0, False
        while self._waiting:
            request = self._waiting.popleft()
            is_like = not batch or request.kind == batch[0].kind
            is_full = is_full or (bool(batch) and is_like and tokens + request.tokens > self._most_tokens)
            if not is_like or is_full:
                others.append(request)
            elif request.future.set_running_or_notify_cancel():  # it was not cancelled while it waited
                batch.append(request)
                tokens += request.tokens
        self._waiting = others
        return batch


def give_up(request: Request) -> None:
    """Nobody waits for it any more: it is cancelled, or its batch stopped where all of that are given up."""
    request.abandoned = True
    request.future.cancel()
