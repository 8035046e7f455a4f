"""What the benchmarks share: timing, memory, and rows for the CSV files in ``results/``.

On a CUDA device runs are timed by events between which lies nothing but the run, after a write that clears the L2
cache and a pause in which the host goes ahead, so that its launches count only where they take longer than the pause
and the device.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import io
import json
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
import transformers
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import psykern
from psykern import kernels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

T = TypeVar("T")
RESULTS = Path(__file__).parent / "results"
CPU = torch.device("cpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_FLUSH_BYTES = 256 * 2**20  # more than any L2 cache
_PAUSE_CYCLES = 2_000_000  # of the device's clock, about a millisecond: dozens of launches


def machine(device: torch.device = CPU) -> dict[str, object]:
    """The columns that say where and with what a row was measured."""
    on_gpu = device.type == "cuda"
    columns: dict[str, object] = {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name() if on_gpu else f"{_cpu_name()}, {torch.get_num_threads()} threads",
        "psykern": psykern.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    return {**columns, "cuda": torch.version.cuda, "triton": _version("triton")} if on_gpu else columns


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What all benchmarks that run on a device take."""
    parser.add_argument("--device", type=torch.device, default=CPU)
    parser.add_argument("--dtype", choices=DTYPES, help="of the inputs; default: float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that everything runs")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where files go")


def dtype_of(options: argparse.Namespace) -> torch.dtype:
    return DTYPES[options.dtype or ("float32" if options.device.type == "cpu" else "bfloat16")]


def compiled(function: Callable[..., T], device: torch.device) -> Callable[..., T]:
    """``torch.compile`` on a GPU, for one set of shapes: what was compiled before is forgotten, or torch would silently
    stop to compile after some. On a CPU the function as it is, for there the providers only prove that they run."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False) if device.type == "cuda" else function


def available(names: Sequence[kernels.Backend], device: torch.device) -> list[kernels.Backend]:
    """Those of the backends that are there on ``device``; the others are named with the reason."""
    found: list[kernels.Backend] = []
    for name in names:
        try:
            kernels.resolve(name, device)
            found.append(name)
        except kernels.BackendError as error:
            print(f"not measured: {error}", flush=True)
    return found


def keep_working(
    providers: Mapping[str, Callable[[], T]], check: Callable[[str, T], None], own: str = "psykern"
) -> dict[str, Callable[[], T]]:
    """The providers whose result passes ``check`` (which raises). One of others' that fails is named and left out; a
    failure of psykern's own is raised, so that no wrong result is timed."""
    kept = {}
    for name, run in providers.items():
        try:
            check(name, run())
            kept[name] = run
        except Exception as error:
            if name.startswith(own):
                raise
            print(f"not measured: {name}: {type(error).__name__}: {str(error).strip().splitlines()[:1]}", flush=True)
    return kept


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def write_csv(
    name: str, rows: Sequence[Mapping[str, object]], folder: Path = RESULTS, device: torch.device = CPU
) -> Path:
    """Write ``rows`` (equal keys), the machine's columns behind them, to ``name``.csv; those of a GPU as JSON too. A
    run that is cut leaves whole files."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name.removesuffix('.csv')}.csv"
    columns = machine(device)
    table = io.StringIO()
    writer = csv.DictWriter(table, [*rows[0], *columns], lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, **columns} for row in rows)
    texts = {path: table.getvalue()}
    if device.type == "cuda" or folder != RESULTS:
        texts[path.with_suffix(".json")] = json.dumps({"machine": columns, "rows": list(rows)}, indent=1)
    for file, text in texts.items():
        temporary = file.with_suffix(".part")
        temporary.write_text(text)
        os.replace(temporary, file)
    return path


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of repeated runs."""

    median: float
    p20: float
    p80: float
    best: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        if len(seconds) == 1:
            return cls(*[seconds[0]] * 4)
        fifths = statistics.quantiles(seconds, n=5, method="inclusive")
        return cls(statistics.median(seconds), fifths[0], fifths[3], min(seconds))

    def columns(self) -> dict[str, object]:
        return {
            f"seconds{k}": float(f"{s:.4g}") for k, s in (("", self.median), ("_p20", self.p20), ("_p80", self.p80))
        }


def time_side_by_side(
    providers: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 1, device: torch.device = CPU
) -> dict[str, Timing]:
    """Every provider in turn, ``repeats`` times, so that a drift of the machine's speed meets all of them."""
    if device.type == "cuda":
        return _time_on_gpu(providers, repeats, warmup, device)
    seconds: dict[str, list[float]] = {name: [] for name in providers}
    for turn in range(warmup + repeats):
        for name, provider in providers.items():
            start = time.perf_counter()
            provider()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return {name: Timing.of(values) for name, values in seconds.items()}


def _time_on_gpu(
    providers: Mapping[str, Callable[[], object]], repeats: int, warmup: int, device: torch.device
) -> dict[str, Timing]:
    """By events; see the module."""
    cache_lines = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in providers}
    for turn in range(warmup + repeats):
        for name, provider in providers.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            cache_lines.zero_()
            torch.cuda._sleep(_PAUSE_CYCLES)
            start.record()
            provider()
            end.record()
            torch.cuda.synchronize(device)
            if turn >= warmup:
                events[name].append((start, end))
    return {name: Timing.of([a.elapsed_time(b) / 1e3 for a, b in pairs]) for name, pairs in events.items()}


def matrix_gflops(device: torch.device, dtype: torch.dtype, repeats: int = 9) -> float:
    """The matrix rate of a GPU now: a square product of 8,192 in ``dtype``. For a CPU see ``rates.py``."""
    side = 8192
    a, b, out = (torch.randn(side, side, device=device).to(dtype) for _ in range(3))
    timing = time_side_by_side({"product": lambda: torch.mm(a, b, out=out)}, repeats, 3, device)["product"]
    return 2 * side**3 / timing.median / 1e9


def print_row(row: Mapping[str, object]) -> None:
    print("  ".join(f"{k} {v}" for k, v in row.items() if v != ""), flush=True)


def write_results(
    name: str,
    rows: Sequence[Mapping[str, object]],
    *,
    x: str,
    y: str,
    panel: str,
    folder: Path = RESULTS,
    device: torch.device = CPU,
) -> None:
    """``rows`` as ``name``.csv, and ``y`` over ``x`` as ``name``.png, a panel per value of ``panel``: a line per
    provider over numbers, a bar over names. Rows without ``y`` are in the file only."""
    path = write_csv(name, rows, folder, device)
    figure = _drawn([row for row in rows if row[y] != ""], x, y, panel)
    figure.suptitle(f"{name}: {machine(device)['device']}", fontsize=9)
    figure.savefig(path.with_suffix(".png"), dpi=120)
    print(f"written: {path}, {path.with_suffix('.png').name}")


def _drawn(rows: Sequence[Mapping[str, Any]], x: str, y: str, panel: str) -> Figure:
    from matplotlib import pyplot

    panels = list(dict.fromkeys(row[panel] for row in rows))
    places = list(dict.fromkeys(row[x] for row in rows))
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    width = 5 if _are_numbers(places) else 1 + 0.8 * len(places)
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(width * len(panels), 4), squeeze=False, sharey=True, layout="constrained"
    )
    for axis, value in zip(axes[0], panels, strict=True):
        own = [row for row in rows if row[panel] == value]
        points = {p: {row[x]: row[y] for row in own if row["provider"] == p} for p in providers}
        _draw_panel(axis, points, places)
        axis.set(title=f"{panel} {value}", xlabel=x, ylim=(0, None))
        axis.grid(alpha=0.3, axis="y")
    axes[0][0].set_ylabel(y)
    axes[0][0].legend()
    return figure


def _draw_panel(axis: Axes, points: Mapping[str, Mapping[Any, float]], places: Sequence[Any]) -> None:
    """``points``: of each provider, which may lack some of the ``places``."""
    if _are_numbers(places):
        for provider, values in points.items():
            axis.plot(values.keys(), values.values(), marker="o", label=provider)
        axis.set_xscale("log", base=2)
        return
    width = 0.8 / len(points)  # of a bar; a place has 1
    for p, (provider, values) in enumerate(points.items()):
        shift = (p + 0.5) * width - 0.4
        axis.bar([places.index(place) + shift for place in values], values.values(), width, label=provider)
    axis.set_xticks(range(len(places)), places, rotation=30, ha="right")


def _are_numbers(places: Sequence[Any]) -> bool:
    return all(isinstance(place, (int, float)) for place in places)


class PeakMemory:
    """Resident bytes above those at the start, sampled every 10 ms: ``ru_maxrss`` never falls, so it cannot tell one
    provider of a process from the next. On a GPU what torch allocated above that, at most."""

    def __init__(self, device: torch.device = CPU) -> None:
        self.bytes = 0
        self._device = device

    @contextmanager
    def watch(self) -> Iterator[PeakMemory]:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            before = torch.cuda.memory_allocated(self._device)
            yield self
            self.bytes = torch.cuda.max_memory_allocated(self._device) - before
            return
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


def profile_kernels(run: Callable[[], object]) -> tuple[float | None, list[dict[str, object]]]:
    """``idle_share`` of the kernels that a run starts on a GPU, as torch's profiler saw them, and what each took, the
    longest first: calls, milliseconds, its share of the time of all. Copies are listed, but do not count as busy."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
    events = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
    taken: dict[str, list[float]] = {}
    for event in events:
        taken.setdefault(event.name, []).append((event.time_range.end - event.time_range.start) / 1e3)
    total = sum(sum(ms) for ms in taken.values())
    rows: list[dict[str, object]] = [
        {"kernel": name[:200], "calls": len(ms), "ms": round(sum(ms), 3), "share": round(sum(ms) / total, 4)}
        for name, ms in sorted(taken.items(), key=lambda item: -sum(item[1]))
    ]
    kernels = [
        (event.time_range.start, event.time_range.end)
        for event in events
        if not event.name.startswith(("Memcpy", "Memset"))
    ]
    return idle_share(np.array(kernels)) if kernels else None, rows


def idle_share(spans: np.ndarray) -> float:
    """The share of the time from the first start to the last end that lies in none of the spans [n, 2]."""
    starts, ends = spans[spans[:, 0].argsort()].T
    ends = np.maximum.accumulate(ends)
    return float((starts[1:] - ends[:-1]).clip(min=0).sum() / (ends[-1] - starts[0]))
