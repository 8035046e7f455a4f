"""What the benchmarks share: timing, memory, and rows for the CSV files in ``results/``."""

from __future__ import annotations

import csv
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
import transformers

import psykern

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, object]:
    """The columns that say where and with what a row was measured."""
    gpu = torch.cuda.is_available()
    return {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name() if gpu else f"{_cpu_name()}, {torch.get_num_threads()} threads",
        "psykern": psykern.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def write_csv(name: str, rows: Sequence[Mapping[str, object]], folder: Path = RESULTS) -> Path:
    """Write ``rows`` (equal keys) with the machine's columns behind them."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    columns = machine()
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *columns], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, **columns} for row in rows)
    return path


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of repeated runs."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        if len(seconds) == 1:
            return cls(seconds[0], seconds[0], seconds[0])
        fifths = statistics.quantiles(seconds, n=5, method="inclusive")
        return cls(statistics.median(seconds), fifths[0], fifths[3])


def time_side_by_side(
    providers: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 1
) -> dict[str, Timing]:
    """Every provider in turn, ``repeats`` times, so that a drift of the machine's speed meets all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in providers}
    for turn in range(warmup + repeats):
        for name, provider in providers.items():
            start = time.perf_counter()
            provider()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return {name: Timing.of(values) for name, values in seconds.items()}


def sgemm_gflops(size: int = 2048) -> float:
    """The machine's own fp32 matrix rate now, through torch: 2 size^3 FLOPs per product."""
    a, b, out = torch.randn(size, size), torch.randn(size, size), torch.empty(size, size)
    timing = time_side_by_side({"sgemm": lambda: torch.mm(a, b, out=out)}, repeats=7)
    return 2 * size**3 / timing["sgemm"].median / 1e9


class PeakMemory:
    """Resident bytes above those at the start, sampled every 10 ms: ``ru_maxrss`` never falls, so it cannot tell one
    provider of a process from the next."""

    def __init__(self) -> None:
        self.bytes = 0

    @contextmanager
    def watch(self) -> Iterator[PeakMemory]:
        start, stop = _resident_bytes(), threading.Event()

        def sample() -> None:
            while not stop.wait(0.01):
                self.bytes = max(self.bytes, _resident_bytes() - start)

        thread = threading.Thread(target=sample, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            stop.set()
            thread.join()


def _resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def available_bytes() -> int:
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
