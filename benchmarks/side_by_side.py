"""Tasks in forked processes, some at once: they share what is imported, and one that crashes takes no other with it."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from typing import NamedTuple, TypeVar

T = TypeVar("T")
_SECONDS = 60  # that a task may take


class _Running(NamedTuple):
    process: ForkProcess
    answer: Connection
    end: float  # by the monotonic clock


def run_in_processes(
    tasks: Mapping[T, Callable[[], object]], processes: int, seconds: float = _SECONDS
) -> dict[T, str]:
    """Runs all, at most ``processes`` at once, each for ``seconds`` at most. Gives those that failed, and why."""
    waiting, running, failures = list(tasks), dict[T, _Running](), dict[T, str]()
    while waiting or running:
        while waiting and len(running) < processes:
            name = waiting.pop(0)
            running[name] = _start(tasks[name], seconds)
        for name, one in list(running.items()):
            if (why := _ended(one)) is not None:
                del running[name]
                failures |= {name: why} if why else {}
        time.sleep(0.02)
    return failures


def _start(task: Callable[[], object], seconds: float) -> _Running:
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(task, sending), daemon=True)
    process.start()
    sending.close()
    return _Running(process, receiving, time.monotonic() + seconds)


def _run(task: Callable[[], object], answer: Connection) -> None:
    try:
        task()
        answer.send("")
    except Exception as error:
        answer.send(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def _ended(one: _Running) -> str | None:
    """Why it failed, "" if it did not; None while it runs."""
    if one.process.is_alive():
        if time.monotonic() < one.end:
            return None
        one.process.kill()
    one.process.join()
    try:
        return str(one.answer.recv())
    except EOFError:
        return f"ended with exit status {one.process.exitcode}"
