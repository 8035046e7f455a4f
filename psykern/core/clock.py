"""Seconds by phase of a run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import TypeVar

T = TypeVar("T")


class Clock:
    """Seconds by phase, and since the start."""

    def __init__(self) -> None:
        self.started = datetime.now(timezone.utc)
        self.seconds: dict[str, float] = {}
        self._start = time.perf_counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    @property
    def day(self) -> str:
        """Of the start, UTC, as YYYY-MM-DD."""
        return self.started.date().isoformat()

    @property
    def total(self) -> float:
        return time.perf_counter() - self._start


def timed(items: Iterator[T], clock: Clock, phase: str) -> Iterator[T]:
    """``items``, with the time that each takes to come counted as ``phase``."""
    while True:
        with clock(phase):
            item = next(items, None)
        if item is None:
            return
        yield item
