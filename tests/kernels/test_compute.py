"""Device, dtype and backend: what the user's words mean, and what contradicts a model that is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from psykern import _cpu
from psykern.core.errors import BackendError
from psykern.core.settings import Dtype, Settings
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


@pytest.mark.parametrize("before", [True, False, (False, False)], ids=["default", "fp32", "sums-are-not-cut"])
def test_what_is_computed_with_is_current_and_sums_in_fp32(
    before: bool | tuple[bool, bool], devices: pytest.MonkeyPatch
) -> None:
    """And then all is as it was."""
    products, current = torch.backends.cuda.matmul, [0]

    @contextmanager
    def device(other: torch.device) -> Iterator[None]:
        current.append(other.index)
        yield
        current.pop()

    def flags() -> list[bool]:
        names = [f"allow_{dtype}_reduced_precision_reduction" for dtype in ("bf16", "fp16")]
        return [getattr(products, name + part) for part in ("", "_split_k") for name in names]

    devices.setattr(torch.cuda, "device", device)
    products.allow_bf16_reduced_precision_reduction = products.allow_fp16_reduced_precision_reduction = before
    try:
        found = flags()
        with Compute.resolve("cuda:2", backend="reference").current():
            assert current == [0, 2]
            assert flags() == [False, False, *found[2:]]
        assert current == [0]
        assert flags() == found
    finally:
        products.allow_bf16_reduced_precision_reduction = products.allow_fp16_reduced_precision_reduction = True


def test_a_cpu_is_always_the_current_device() -> None:
    with Compute.resolve("cpu").current():
        assert torch.empty(1).device.type == "cpu"


@pytest.mark.parametrize(
    ("dtype", "has_bf16", "expected"),
    [
        ("float32", True, "fp32 products (some set), fp32 sums"),
        ("float32", False, "fp32 products (some set), fp32 sums"),
        ("bfloat16", True, "bf16 products (some set), fp32 sums"),
        ("bfloat16", False, "fp32 products of bf16 (some set), fp32 sums"),
        ("float16", True, "fp32 products of fp16 (some set), fp32 sums"),
    ],
)
def test_arithmetic_in_words(dtype: Dtype, has_bf16: bool, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cpu, "instruction_set", lambda: "some set")
    monkeypatch.setattr(_cpu, "multiplies_bf16", lambda: has_bf16)
    compute = Compute.resolve("cpu", dtype)
    assert compute.arithmetic == expected
    assert (compute.caveat is not None) is (dtype == "bfloat16" and not has_bf16)
    others = Compute.resolve("cpu", dtype, "reference")
    assert others.arithmetic is None and others.caveat is None


def test_sets_that_multiply_bf16() -> None:
    found = [isa for isa in _cpu.instruction_sets() if _cpu.multiplies_bf16(isa)]
    assert found == [isa for isa in _cpu.instruction_sets() if isa in ("avx512_bf16", "amx")]
    assert _cpu.instruction_set() in _cpu.instruction_sets()
    assert _cpu.multiplies_bf16() is _cpu.multiplies_bf16(_cpu.instruction_set())
    with pytest.raises(ValueError, match="does not have 'sse9'"):
        _cpu.multiplies_bf16("sse9")
