"""Kills a run at random moments and goes on with it, many times: in the end its records must equal, to the byte, those
of a run that nobody disturbed.

A round is a run in a folder of its own. Its process is killed with SIGKILL, either after a time drawn from the whole
length of a run or at a stage: as the k-th file is being written, flushed, renamed or linked (so also in the middle of a
part, a manifest or a file of the token cache). Then a new process goes on with the run, and is killed likewise, until
one is let through. Processes are forked from one that has everything imported, so a round takes a second.

Used by ``tests/runs/test_torture.py`` and by ``benchmarks/torture.py``.
"""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork

import numpy as np
import pyarrow as pa
import torch

import psykern
from psykern import Settings, demo
from psykern.core import folder as storage

SETTINGS = Settings(device="cpu", studies=("guenther2024substitutions",), unit_tokens=300)
STAGES = ("time", "open", "fsync", "replace", "link")  # the last four: calls by which psykern.core.folder writes a file
MOST_KILLS = 3  # in one round


@dataclass(frozen=True, slots=True)
class Outcome:
    """What many rounds came to."""

    rounds: int
    kills: Counter[str]  # by stage
    equal: int  # rounds whose records equal the undisturbed run's
    seconds: float


def torture(rounds: int, seed: int, folder: Path) -> Outcome:
    """``rounds`` rounds in ``folder``; raises AssertionError where an undisturbed run fails."""
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    rng = np.random.default_rng(seed)
    started = time.perf_counter()
    assert _fork(folder / "expected", None, None)[0] == 0
    length = time.perf_counter() - started
    expected = _contents(folder / "expected")
    kills: Counter[str] = Counter()
    equal = 0
    for i in range(rounds):
        out, cache = folder / f"run-{i}", folder / f"cache-{i}" if i % 2 else None
        for _ in range(int(rng.integers(1, MOST_KILLS + 1))):
            stage = str(rng.choice(STAGES))
            when = rng.uniform(0, 1.1 * length) if stage == "time" else int(rng.integers(1, 25))
            if _fork(out, cache, (stage, when))[1] == signal.SIGKILL:
                kills[stage] += 1
        status, _ = _fork(out, cache, None)
        equal += status == 0 and _contents(out) == expected
        shutil.rmtree(out)
        shutil.rmtree(cache or out, ignore_errors=True)
    return Outcome(rounds, kills, equal, time.perf_counter() - started)


def _fork(out: Path, cache: Path | None, kill: tuple[str, Any] | None) -> tuple[int, int]:
    """One process that goes on with the run in ``out``: its exit status, and the signal that ended it (0: none)."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            if kill is not None:
                _arm(*kill)
            psykern.score(demo.MODEL, demo.SAMPLE, out, SETTINGS, cache=cache)
            status = 0
        finally:
            os._exit(status)
    _, ended = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(ended) if os.WIFEXITED(ended) else -1, os.WTERMSIG(ended)


def _arm(stage: str, when: float) -> None:
    """Kills this process after ``when`` seconds, or at the ``when``-th call of a stage."""
    if stage == "time":
        threading.Timer(when, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return
    lock, calls = threading.Lock(), 0

    def killing(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal calls
            with lock:
                calls += 1
                if calls == when:
                    os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **named)

        return call

    if stage == "open":
        storage.Path.open = killing(storage.Path.open)  # type: ignore[method-assign]
    else:
        setattr(os, stage, killing(getattr(os, stage)))


def _contents(run: Path) -> dict[str, bytes]:
    """All files but the manifest, which holds times, and hidden ones, which a killed process left half written."""
    files = (path for path in run.rglob("*") if path.is_file() and path.name[0] != "." and path.stem != "manifest")
    return {str(path.relative_to(run)): path.read_bytes() for path in files}
