"""Which devices are given the tiles of a Hopper GPU; launches on the inputs' device, for whose numbers nobody waits."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from psykern import kernels
from psykern.kernels import Routes, dispatch

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from triton_resources import recording

common = importlib.import_module("psykern.kernels.triton.common")

KIB = 1024


@pytest.mark.parametrize(
    ("major", "shared_bytes", "expected"),
    [(8, 163 * KIB, False), (8, 99 * KIB, False), (9, 227 * KIB, True), (10, 227 * KIB, True), (12, 99 * KIB, False)],
    ids=["A100", "RTX-4090", "H100", "B200", "RTX-5090"],
)
def test_large_tiles_are_for_devices_that_hold_them(
    major: int, shared_bytes: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes by the CUDA programming guide's table of compute capabilities."""
    has = SimpleNamespace(major=major, minor=0, shared_memory_per_block_optin=shared_bytes)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: has)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    assert common.is_hopper.__wrapped__(torch.device("cuda")) is expected


def test_a_cpu_is_none_of_them() -> None:
    assert common.is_hopper(torch.device("cpu")) is False


def test_launches_in_these_tests_are_waited_for() -> None:
    assert "CUDA_LAUNCH_BLOCKING" in os.environ


@pytest.mark.parametrize("hopper", [False, True], ids=["loads", "tma"])
def test_experts_are_launched_on_the_device_of_their_rows_and_nothing_is_read_from_it(
    hopper: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On torch's meta device, where reading a number is an error: how many rows an expert has must not be asked for."""
    entered: list[object] = []

    @contextmanager
    def on_device_of(x: torch.Tensor) -> Iterator[None]:
        seen = len(launches)
        yield
        entered.extend([x.device] * (len(launches) - seen))

    for name in ("experts", "elementwise"):
        monkeypatch.setattr(importlib.import_module(f"psykern.kernels.triton.{name}"), "on_device_of", on_device_of)
    monkeypatch.setattr(dispatch, "resolve", lambda backend, device: backend)
    monkeypatch.setattr(dispatch, "is_traced", lambda x: False)  # the backend itself is called with them
    with torch.device("meta"), recording(hopper) as launches:
        x, up, down = (torch.empty(*s, dtype=torch.bfloat16) for s in ((9, 64), (4, 32, 64), (4, 64, 32)))
        routes = Routes.of(torch.empty(9, 2, dtype=torch.int64), 4)
        inner = kernels.expert_swiglu(x, up, up, routes, backend="triton")
        each = kernels.expert_linear(inner, down, routes, backend="triton")
        kernels.add_weighted(each, torch.empty(9, 2), x, backend="triton")
    assert [launch.kernel.__name__ for launch in launches] == [
        *("tiles_kernel", "expert_swiglu_kernel"),
        *("tiles_kernel", "expert_linear_kernel"),
        "add_weighted_kernel",
    ]
    assert [str(device) for device in entered] == ["meta"] * 5
