"""Where a kernel test runs: every backend that is there, on the devices that it is for.

A test takes ``@each_place`` and calls the public operation with ``place.backend`` and inputs on ``place.device``. The
places that are missing are skipped once for all, with their reason, by ``test_kernels.py``, not once for each case.
``check`` holds the rule: the reference on the CPU is within a tolerance of fp64, and all else is at most twice as far
from fp64 as that is in the same dtype, plus that tolerance.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from psykern import kernels

BACKENDS: tuple[kernels.Backend, ...] = ("reference", "cpu", "triton", "cuda")
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's own switch: kernels run on CPU tensors
_LARGEST_TILE = 256  # of tokens, in Triton's tables
LONGEST_TILE = 32 if _INTERPRETED else 128  # of queries; the interpreter is slow, and in fp32 its tiles are small
_DEVICES = {
    "reference": ("cpu", "cuda"),
    "cpu": ("cpu",),
    "triton": ("cpu" if _INTERPRETED else "cuda",),
    "cuda": ("cuda",),
}


@dataclass(frozen=True, slots=True)
class Place:
    backend: kernels.Backend
    device: torch.device

    def put(self, *tensors: Tensor) -> list[Tensor]:
        """Copies on the place's device, so that an operation that writes to its inputs spoils no other test."""
        return [t.to(self.device, copy=True) for t in tensors]

    @property
    def has_own_products(self) -> bool:
        """Whether a row's products are summed in an order of psykern's own, whatever its company.

        The C++ kernels' are. The reference's are torch's (MKL, oneDNN), those of ``tl.dot`` under Triton's interpreter
        numpy's (OpenBLAS): such a library takes the kernel that fits the processor and the number of rows, and each
        rounds differently. On a GPU psykern itself takes tiles by the number of rows, or the vendor's products.
        """
        return self.backend == "cpu"


REFERENCE = Place("reference", torch.device("cpu"))


def missing(place: Place) -> str | None:
    """Why nothing can run there; None: it can."""
    try:
        kernels.resolve(place.backend, place.device)
    except kernels.BackendError as error:
        return str(error)
    return "needs a CUDA device" if place.device.type == "cuda" and not torch.cuda.is_available() else None


def _parameter(place: Place) -> Any:
    marks = [pytest.mark.gpu] if place.device.type == "cuda" else []
    return pytest.param(place, id=f"{place.backend}-on-{place.device}", marks=marks)


PLACES = [Place(backend, torch.device(device)) for backend in BACKENDS for device in _DEVICES[backend]]
each_place = pytest.mark.parametrize("place", [_parameter(p) for p in PLACES if missing(p) is None])


def short(dtype: torch.dtype) -> str:
    """The name of a dtype in a test's id."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def sized(place: Place, vocabulary: int) -> int:
    """The vocabulary for a case that asks for every token, or that is one of several at the same size.

    Under the interpreter a tile is milliseconds of Python, and so is each token wanted of a row in each tile. It takes
    the least vocabulary from one tile on that leaves the same remainder for the tiles (64 to 256).
    """
    is_slow = _INTERPRETED and place.backend == "triton" and vocabulary > _LARGEST_TILE
    return _LARGEST_TILE + vocabulary % _LARGEST_TILE if is_slow else vocabulary


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """New arrays hold NaN, or the largest integer, until they are written: what a kernel leaves out shows."""
    torch.set_deterministic_debug_mode("warn")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode("default")


def check(
    place: Place, run: Callable[[Place], Sequence[Tensor]], truth: Sequence[Tensor], tolerance: float
) -> list[Tensor]:
    """Runs ``run`` at ``place``, compares with the fp64 ``truth`` by the rule above, and gives what it computed."""
    with poisoned_memory():
        got = [t.cpu() for t in run(place)]
        reference = run(REFERENCE) if place != REFERENCE else truth
    assert [t.shape for t in got] == [t.shape for t in truth]
    for i, (actual, expected, other) in enumerate(zip(got, truth, reference, strict=True)):
        assert torch.equal(actual.isnan(), expected.isnan()), f"output {i}: NaN elsewhere than in fp64"
        assert torch.equal(actual.isinf(), expected.isinf()), f"output {i}: inf elsewhere than in fp64"
        error, allowed = _error(actual, expected), 2 * _error(other, expected) + tolerance
        assert error <= allowed, f"output {i}: error {error:.3g}, allowed {allowed:.3g}"
    return got


def _error(actual: Tensor, expected: Tensor) -> float:
    """Largest distance of finite elements: absolute for numbers up to 1, relative above."""
    finite = expected.isfinite()
    a, e = actual[finite].double(), expected[finite].double()
    return float(((a - e).abs() / e.abs().clamp(min=1)).max()) if len(a) else 0.0


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Equal bytes, NaN included; the message gives the first place that differs."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    differs = (actual != expected) & ~(actual.isnan() & expected.isnan())
    if differs.any():
        place = differs.nonzero()[0].tolist()
        pytest.fail(
            f"{int(differs.sum())} elements differ, first {place}: {actual[tuple(place)]} != {expected[tuple(place)]}"
        )


def assert_agrees(place: Place, actual: Tensor, expected: Tensor, tolerance: float | None) -> None:
    """Two ways to the same numbers: equal bits where psykern promises them, which is for results without a matrix
    product (``tolerance`` None) and where the products are its own; else within ``tolerance``, or 1e-6 of the number.
    """
    if tolerance is None or place.has_own_products:
        assert_same_bits(actual, expected)
    else:
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=tolerance, equal_nan=True)
