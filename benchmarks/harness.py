"""What the benchmarks share: timing, memory, and rows for the CSV files in ``results/``."""

from __future__ import annotations

import csv
import ctypes
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import date
from functools import cache
from pathlib import Path

import torch
import transformers
from torch import Tensor

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

    def columns(self) -> dict[str, object]:
        return {
            f"seconds{k}": float(f"{s:.4g}") for k, s in (("", self.median), ("_p20", self.p20), ("_p80", self.p80))
        }


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


_SQUARE = 2048
SGEMM_FLOPS = 2 * _SQUARE**3


@cache
def _squares() -> Tensor:
    return torch.randn(3, _SQUARE, _SQUARE)


def sgemm() -> None:
    """One square fp32 product through torch, SGEMM_FLOPS operations: the machine's own matrix rate."""
    a, b, out = _squares()
    torch.mm(a, b, out=out)


def sgemm_gflops() -> float:
    """The machine's matrix rate now."""
    return SGEMM_FLOPS / time_side_by_side({"sgemm": sgemm}, repeats=7)["sgemm"].median / 1e9


def print_row(row: Mapping[str, object]) -> None:
    print("  ".join(f"{k} {v}" for k, v in row.items() if v != ""), flush=True)


def write_results(name: str, rows: Sequence[Mapping[str, object]], *, x: str, y: str, panel: str) -> None:
    """``rows`` as ``name``.csv, and ``y`` over ``x`` as ``name``.png, a panel per value of ``panel``: a line per
    provider over numbers, a bar over names. Rows without ``y`` are in the file only."""
    from matplotlib import pyplot

    path = write_csv(f"{name}.csv", rows)
    drawn = [row for row in rows if row[y] != ""]
    panels = list(dict.fromkeys(row[panel] for row in drawn))
    places = list(dict.fromkeys(row[x] for row in drawn))
    providers = list(dict.fromkeys(row["provider"] for row in drawn))
    is_number = all(isinstance(place, (int, float)) for place in places)
    width = 5 if is_number else 1 + 0.8 * len(places)
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(width * len(panels), 4), squeeze=False, sharey=True, layout="constrained"
    )
    for axis, value in zip(axes[0], panels, strict=True):
        for p, provider in enumerate(providers):
            points = {row[x]: row[y] for row in drawn if row["provider"] == provider and row[panel] == value}
            if is_number:
                axis.plot(points.keys(), points.values(), marker="o", label=provider)
            else:
                shift = (p + 0.5) / len(providers) - 0.5
                axis.bar(
                    [places.index(k) + 0.8 * shift for k in points],
                    points.values(),
                    0.8 / len(providers),
                    label=provider,
                )
        axis.set(title=f"{panel} {value}", xlabel=x, ylim=(0, None))
        if is_number:
            axis.set_xscale("log", base=2)
        else:
            axis.set_xticks(range(len(places)), places, rotation=30, ha="right")
        axis.grid(alpha=0.3, axis="y")
    axes[0][0].set_ylabel(y)
    axes[0][0].legend()
    figure.suptitle(f"{name}: {machine()['device']}", fontsize=9)
    figure.savefig(path.with_suffix(".png"), dpi=120)
    print(f"written: {path}, {path.with_suffix('.png').name}")


class PeakMemory:
    """Resident bytes above those at the start, sampled every 10 ms: ``ru_maxrss`` never falls, so it cannot tell one
    provider of a process from the next."""

    def __init__(self) -> None:
        self.bytes = 0

    @contextmanager
    def watch(self) -> Iterator[PeakMemory]:
        _return_free_memory()
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


def _return_free_memory() -> None:
    """What earlier runs freed goes back to the system (glibc), so that the next run's memory shows."""
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def available_bytes() -> int:
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
