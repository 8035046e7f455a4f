"""Where and how a model computes: resolved once, before it is loaded, and then carried by the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from psykern import _cpu
from psykern.core.errors import BackendError
from psykern.core.settings import Backend, Device, Dtype, Settings, check_loaded
from psykern.kernels import resolve

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True, slots=True)
class Compute:
    """A device, the dtype of weights and activations there, and the kernels; part of a run's identity."""

    device: torch.device
    dtype: torch.dtype
    backend: Backend  # never "auto"
    is_own: bool = True  # all arithmetic is that of the kernels; False: a library computes beside them

    @property
    def is_company_free(self) -> bool:
        """Whether a row's bits depend on no other row, on threads or on blocks: all arithmetic is psykern's own."""
        return self.backend == "cpu" and self.is_own

    @property
    def arithmetic(self) -> str | None:
        """What is multiplied and summed, in words; None where a library's products decide that."""
        if not self.is_company_free:
            return None
        widened = self._is_widened
        products = _SHORT[torch.float32 if widened else self.dtype]
        of = f" of {_SHORT[self.dtype]}" if widened else ""
        return f"{products} products{of} ({_cpu.instruction_set()}), fp32 sums"

    @property
    def caveat(self) -> str | None:
        """What bf16 costs where the processor has no fast products of it; None where it has, and for other dtypes."""
        if self.backend != "cpu" or self.dtype != torch.bfloat16 or not self._is_widened:
            return None
        return (
            f"dtype bfloat16: this processor has no fast products of bf16 (instruction set {_cpu.instruction_set()}), "
            "so numbers are widened to fp32: no faster than float32 and less exact, with keys and values in half the "
            "memory"
        )

    @property
    def _is_widened(self) -> bool:
        """Of the C++ kernels: whether products are of fp32 though the numbers are not."""
        is_multiplied = self.dtype == torch.float32 or (self.dtype == torch.bfloat16 and _cpu.multiplies_bf16())
        return not is_multiplied

    @contextmanager
    def current(self) -> Iterator[None]:
        """Within it the device is the one that kernels are launched on and events recorded, of several, and the
        vendor's products sum as :func:`psykern.kernels.linear` says."""
        if self.device.type != "cuda":
            yield
            return
        with torch.cuda.device(self.device), _sums_in_fp32("bf16"), _sums_in_fp32("fp16"):
            yield

    def check(self, settings: Settings) -> None:
        """Raises ValueError where ``settings`` name another device, dtype or kernels."""
        first = {"cuda:0": "cuda"}  # torch has two names for it
        device, asked = str(self.device), settings.device
        loaded = {
            "device": first.get(device, device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "backend": self.backend,
        }
        check_loaded(replace(settings, device=first.get(asked, asked)), loaded)

    @classmethod
    def resolve(cls, device: Device = "auto", dtype: Dtype = "auto", backend: Backend = "auto") -> Compute:
        """What the user's words mean on this machine. Raises BackendError for what is not there."""
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        kind, _, index = device.partition(":")
        if kind == "cuda" and not count:
            raise BackendError(f"device {device!r} was asked for, and torch finds no CUDA device here")
        if index and int(index) >= count:
            found = "one CUDA device here, cuda:0" if count == 1 else f"{count} here, cuda:0 to cuda:{count - 1}"
            raise BackendError(f"device {device!r} was asked for, and torch finds {found}")
        is_gpu = kind == "cuda" or (kind == "auto" and count > 0)
        default = "bfloat16" if is_gpu else "float32"
        on = torch.device((device if kind == "cuda" else "cuda") if is_gpu else "cpu")
        return cls(on, DTYPES[default if dtype == "auto" else dtype], resolve(backend, on))


@contextmanager
def _sums_in_fp32(dtype: str) -> Iterator[None]:
    """By torch's default a product of ``dtype`` whose sum the vendor cuts in parts may add these in ``dtype``."""
    products, name = torch.backends.cuda.matmul, f"allow_{dtype}_reduced_precision_reduction"
    if not getattr(products, name):  # then it may also be that no sum is cut, which stays so
        yield
        return
    setattr(products, name, False)
    try:
        yield
    finally:
        setattr(products, name, True)
