"""What is seen of a wave while it is computed: how far it is, and when a device began and ended each of its parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

Span = tuple[torch.cuda.Event, torch.cuda.Event]  # a part's begin and end


class Watch:
    """Of one wave. On a CPU ``progress`` is told the share of the layers that is done. On a device the host is ahead of
    what is computed and has nothing true to tell; there the parts are timed."""

    def __init__(self, device: torch.device, progress: Callable[[float], None]) -> None:
        self.spans: list[Span] = []  # of the layers and the head, in order; none on a CPU
        self._is_ahead = device.type == "cuda"
        self._progress = progress

    @contextmanager
    def part(self) -> Iterator[None]:
        """Around the launches of one layer, or of the head."""
        begin = now() if self._is_ahead else None
        yield
        if begin is not None:
            self.spans.append((begin, now()))

    def layers_done(self, share: float) -> None:
        if not self._is_ahead:
            self._progress(share)


def now() -> torch.cuda.Event:
    """In the order of what the device was given."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class DeviceClock:
    """How much of the time between its first and its last wave a device computed. A CPU is not timed.

    Idle is what lies between the layers and heads of all waves: there the device waits for a wave or for a layer's
    weights. Gaps between the launches of one layer are not seen: where a layer is shorter than its launches, ask a
    profiler (``benchmarks/bench_score.py`` does).
    """

    def __init__(self) -> None:
        self._first: torch.cuda.Event | None = None
        self._busy = self._span = 0.0  # milliseconds

    def add(self, spans: Sequence[Span]) -> None:
        """Of a wave that is computed."""
        if not spans:
            return
        self._first = self._first or spans[0][0]
        self._busy += sum(start.elapsed_time(end) for start, end in spans)
        self._span = self._first.elapsed_time(spans[-1][1])

    @property
    def idle_share(self) -> float | None:
        """From 0 to 1; None: no device was timed."""
        return max(0.0, 1.0 - self._busy / self._span) if self._span > 0 else None
