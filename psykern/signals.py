"""SIGINT and SIGTERM: the first lets a command finish what it has in hand, a second ends the process at once.

What is on disk is whole at any moment, so that a process may end at any. Its exit status is 128 and the signal.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

EXIT_SIGNAL = 128  # a signal's number is added


class Stop:
    """The signals to stop that have come."""

    def __init__(self, *, begun: bool) -> None:
        self.received: list[int] = []
        self._begun = begun  # False: nothing is computed yet, which a signal would have to wait for

    def asked(self) -> bool:
        """Asked before each wave."""
        self._begun = True
        return bool(self.received)

    def handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        name = signal.Signals(number).name
        if self.received or not self._begun:
            again = " again" if self.received else ""
            os.write(2, f"\npsykern: {name}{again}: stopped; records written so far are kept\n".encode())
            os._exit(EXIT_SIGNAL + number)
        self.received.append(number)
        os.write(2, f"\npsykern: {name}: finishing the wave in hand; once more stops at once\n".encode())


@contextmanager
def stop_signals(*, at_once: bool) -> Iterator[Stop]:
    """Gives what has come of SIGINT and SIGTERM. ``at_once``: before anything is computed, they end the process."""
    stop = Stop(begun=not at_once)
    with handling(stop.handle, signal.SIGINT, signal.SIGTERM):
        yield stop


@contextmanager
def handling(handler: Callable[[int, FrameType | None], Any], *numbers: signal.Signals) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only that may handle signals
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, own in before.items():
            signal.signal(number, own)
