"""What a CPU's rates are measured against: the processor's own peak, and what libraries make of it.

The peak is that of multiply-adds in registers alone (``csrc/cpu/peak.h``), of the fastest instruction set that is here,
on torch's threads: nothing is loaded, so no product can be faster. Where bf16 is multiplied more slowly than fp32, or
not at all, it may as well be widened: the peak of bf16 is the larger of the two.

Libraries, each with the layout that suits it: ``mm`` is torch.mm (MKL, in bf16 oneDNN), ``onednn`` torch's own linear
layer with weights that were packed beforehand, ``openblas`` numpy's product, which has no bf16.

Compare with what was timed in turn with them, and best runs with best runs: others that use a machine make it slower,
never faster, and another minute is another machine.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import torch
from harness import Timing, keep_working, time_side_by_side
from torch import Tensor

from psykern import _cpu

_PEAK_SECONDS, _PEAK_RUNS = 0.003, 8  # of a turn: short ones, to be alone on all cores now and then
SQUARE = 2048  # side of the libraries' product
SLEEPING = {"OPENBLAS_THREAD_TIMEOUT": "4", "OMP_WAIT_POLICY": "PASSIVE"}  # 2^4 cycles
# They hold a library to the kernels of an older processor, from when it is loaded on.
HOLDING_BACK = ("OPENBLAS_CORETYPE", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA")


@dataclass(frozen=True, slots=True)
class Work:
    """Something to time, and the floating-point operations in it."""

    run: Callable[[], object]
    flops: float

    def gflops(self, timing: Timing) -> float:
        """Of the best run."""
        return self.flops / timing.best / 1e9


@dataclass(frozen=True, slots=True)
class Rates:
    """GFLOP/s on numbers of one dtype, of the best runs, timed in turn."""

    peak: float
    libraries: Mapping[str, float]

    @classmethod
    def of(cls, works: Mapping[str, Work], timings: Mapping[str, Timing]) -> Rates:
        """``works``: as :func:`denominators` gives them."""
        own = {name: work for name, work in works.items() if name.startswith("peak")}
        libraries = {name: work.gflops(timings[name]) for name, work in works.items() if name not in own}
        return cls(best_gflops(own, timings), libraries)

    def share(self, gflops: float) -> float:
        return round(gflops / self.peak, 3)

    def columns(self) -> dict[str, object]:
        """The peak, and the libraries' shares of it; nothing for one that is not here."""
        shares = {f"{name}_of_peak": self.libraries.get(name) for name in ("mm", "onednn", "openblas")}
        values = {name: "" if rate is None else self.share(rate) for name, rate in shares.items()}
        return {"peak_gflops": round(self.peak, 1), **values}


def best_gflops(works: Mapping[str, Work], timings: Mapping[str, Timing]) -> float:
    return max(work.gflops(timings[name]) for name, work in works.items())


def measure(dtype: torch.dtype, side: int | None = None, repeats: int = 7) -> Rates:
    """The rates now."""
    works = denominators(dtype, side)
    return Rates.of(works, time_side_by_side({name: work.run for name, work in works.items()}, repeats))


def denominators(dtype: torch.dtype, side: int | None = None) -> dict[str, Work]:
    """:func:`peaks` and the libraries' products of squares, to be timed with what they are compared with."""
    side = side or SQUARE
    products = {name: Work(run, 2.0 * side**3) for name, run in _squares(dtype, side).items()}
    return peaks(dtype) | products


@cache
def _squares(dtype: torch.dtype, side: int) -> dict[str, Callable[[], Tensor]]:
    x, weight = torch.randn(2, side, side).to(dtype)
    expected = x.float() @ weight.float().T
    tolerance = {"atol": 0.01 * side**0.5, "rtol": 0.01}  # of sums of `side` normal numbers, rounded to bf16

    def check(name: str, result: Tensor) -> None:
        del name
        torch.testing.assert_close(result.float(), expected, **tolerance)

    return keep_working(libraries(x, weight), check)


def libraries(x: Tensor, weight: Tensor) -> dict[str, Callable[[], Tensor]]:
    """x [N, K] times weight [M, K], transposed, to [N, M], by each library that multiplies their dtype."""
    out = x.new_empty(len(x), len(weight))
    found: dict[str, Callable[[], Tensor]] = {"mm": lambda: torch.mm(x, weight.T, out=out)}
    if hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, len(x))
        found["onednn"] = lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    if x.dtype == torch.float32:
        a, b, c = x.numpy(), weight.numpy().T, np.empty(out.shape, np.float32)
        found["openblas"] = lambda: torch.from_numpy(np.matmul(a, b, out=c))
    return found


def peaks(dtype: torch.dtype) -> dict[str, Work]:
    """Multiply-adds at the highest rate that this processor has for numbers of ``dtype``, several a turn: the best
    counts."""
    work = _peak(dtype == torch.bfloat16, torch.get_num_threads())
    return {f"peak {i}": work for i in range(_PEAK_RUNS)}


@cache
def _peak(is_bf16: bool, threads: int) -> Work:
    blocks = 8 * threads
    found: dict[str, tuple[Callable[[int], float], float]] = {}
    for name in ("float32", "bfloat16")[: 1 + is_bf16]:
        for isa in _cpu.instruction_sets():
            run = partial(_cpu.peak, name, num_threads=threads, isa=isa)
            if flops := run(blocks):  # else the set multiplies no such numbers
                found[f"{name} {isa}"] = run, flops
    timings = time_side_by_side({name: partial(run, blocks) for name, (run, _) in found.items()}, repeats=9)
    name = max(found, key=lambda name: found[name][1] / timings[name].best)
    run, flops = found[name]
    times = max(1, round(_PEAK_SECONDS / timings[name].best))
    return Work(partial(run, blocks * times), flops * times)


def begin_unheld() -> None:
    """Begins this program anew without the variables that hold libraries back, where some are set (the tests set them),
    and with those by which threads sleep once they are done: OpenBLAS's else spin for some 30 ms and take the cores
    from what is timed next. They work only from a process's start."""
    found = [name for name in HOLDING_BACK if os.environ.pop(name, None) is not None]
    if found or any(os.environ.get(name) != value for name, value in SLEEPING.items()):
        os.environ |= SLEEPING
        print(f"without {', '.join(found) or 'spinning threads'}", flush=True)
        os.execv(sys.executable, [sys.executable, *sys.argv])
