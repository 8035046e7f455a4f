"""Which devices are given the tiles of a Hopper GPU."""

from __future__ import annotations

import importlib
import os
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
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
