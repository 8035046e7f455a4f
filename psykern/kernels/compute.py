"""Where and how a model computes: resolved once, before it is loaded, and then carried by the model."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from psykern.core.errors import BackendError
from psykern.core.settings import Backend, Device, Dtype, Settings
from psykern.kernels import resolve

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Compute:
    """A device, the dtype of weights and activations there, and the kernels; part of a run's identity."""

    device: torch.device
    dtype: torch.dtype
    backend: Backend  # never "auto"

    def check(self, settings: Settings) -> None:
        """Raises ValueError where ``settings`` name another device, dtype or kernels."""
        for name, asked, have in (
            ("device", settings.device, str(self.device)),
            ("dtype", settings.dtype, str(self.dtype).removeprefix("torch.")),
            ("backend", settings.backend, self.backend),
        ):
            if asked not in ("auto", have):
                raise ValueError(
                    f"{name}: expected 'auto' or {have!r}, as the model is loaded, got {asked!r}; load it so, or leave "
                    f"{name} out of the settings"
                )

    @classmethod
    def resolve(cls, device: Device = "auto", dtype: Dtype = "auto", backend: Backend = "auto") -> Compute:
        """What the user's words mean on this machine. Raises BackendError for what is not there."""
        has_gpu = torch.cuda.is_available()
        if device == "cuda" and not has_gpu:
            raise BackendError("device 'cuda' was asked for, and torch finds no CUDA device here")
        is_gpu = device == "cuda" or (device == "auto" and has_gpu)
        default = "bfloat16" if is_gpu else "float32"
        on = torch.device("cuda" if is_gpu else "cpu")
        return cls(on, DTYPES[default if dtype == "auto" else dtype], resolve(backend, on))
