"""Device, dtype and backend: what the user's words mean, and what contradicts a model that is loaded."""

from __future__ import annotations

import pytest
import torch

from psykern.core.errors import BackendError
from psykern.core.settings import Settings
from psykern.kernels.compute import Compute


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Three GPUs, as far as torch is asked."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    return monkeypatch


@pytest.mark.parametrize(
    ("name", "expected"),
    [("auto", "cuda"), ("cuda", "cuda"), ("cuda:0", "cuda:0"), ("cuda:2", "cuda:2"), ("cpu", "cpu")],
)
def test_a_device_is_what_it_says(name: str, expected: str, devices: pytest.MonkeyPatch) -> None:
    compute = Compute.resolve(name, backend="reference")
    assert compute.device == torch.device(expected)
    assert compute.dtype == (torch.float32 if expected == "cpu" else torch.bfloat16)


def test_a_device_that_is_not_there(devices: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match="device 'cuda:3' was asked for, and torch finds 3 here, cuda:0 to cuda:2"):
        Compute.resolve("cuda:3", backend="reference")
    devices.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(
        BackendError, match="device 'cuda:1' was asked for, and torch finds one CUDA device here, cuda:0"
    ):
        Compute.resolve("cuda:1", backend="reference")
    devices.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendError, match="device 'cuda:1' was asked for, and torch finds no CUDA device here"):
        Compute.resolve("cuda:1", backend="reference")


@pytest.mark.parametrize(("loaded", "agrees"), [("cuda", "cuda:0"), ("cuda:0", "cuda"), ("cuda:1", "cuda:1")])
def test_settings_agree_or_are_refused(loaded: str, agrees: str, devices: pytest.MonkeyPatch) -> None:
    compute = Compute.resolve(loaded, "float16", "reference")
    compute.check(Settings())
    compute.check(Settings(device=agrees, dtype="float16", backend="reference"))
    for other in ("cuda:2", "cpu"):
        with pytest.raises(
            ValueError, match=rf"device: expected 'auto' or '{loaded.removesuffix(':0')}', .* got '{other}'"
        ):
            compute.check(Settings(device=other))


def test_a_cpu_is_always_the_current_device() -> None:
    with Compute.resolve("cpu").current():
        assert torch.empty(1).device.type == "cpu"
