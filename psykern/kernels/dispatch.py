"""From an operation's name to the function that computes it.

Called with plain tensors this is the backend's own function: the engine calls some of them a thousand times a wave, and
a round through torch's dispatcher takes as long as a small one of them. Where torch traces, or an argument is a tensor
of another kind, it is the operator of :mod:`psykern.kernels.torch_ops`, which torch can put into a graph.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from types import ModuleType
from typing import Any, get_args

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from psykern.core.errors import BackendError
from psykern.core.settings import Backend
from psykern.kernels import traced
from psykern.kernels.checks import expect_no_gradients, is_traced, tensors_of

_HOW_TO_GET = {
    "triton": "it needs triton (`pip install triton`) and a CUDA device, or TRITON_INTERPRET=1 in the environment",
    "cuda": "it needs a CUDA device and psykern built from source where nvcc is found",
}


def resolve(backend: Backend, device: torch.device) -> Backend:
    """The backend that ``backend`` means on ``device``. Raises :class:`BackendError` where there is none."""
    if backend not in get_args(Backend):
        raise BackendError(f"backend: expected one of {', '.join(get_args(Backend))}, got {backend!r}")
    if backend == "auto":
        if device.type != "cuda":
            return "cpu" if device.type == "cpu" else "reference"
        return "triton" if module("triton") else "reference"
    if backend == "cpu" and device.type != "cpu":
        raise BackendError(f"backend 'cpu' computes on the CPU; the inputs are on {device}")
    interpreted = backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if backend in _HOW_TO_GET and (module(backend) is None or not (device.type == "cuda" or interpreted)):
        raise BackendError(f"backend {backend!r} is not available on {device}: {_HOW_TO_GET[backend]}")
    return backend


@cache
def module(backend: str) -> ModuleType | None:
    """The module of a backend, imported when it is first asked for; None: something that it needs is not installed."""
    try:
        return import_module(f"psykern.kernels.{backend}")
    except ImportError:
        if backend in _HOW_TO_GET:
            return None
        raise


def operation(name: str, backend: Backend, x: Tensor) -> Callable[..., Any]:
    """What computes an operation whose inputs are where ``x`` is: it takes what the reference's function takes."""
    if is_traced(x):
        return partial(getattr(traced, name), backend=backend)
    # A small wave on a CPU is a thousand operations that are shorter than to look around for their backend.
    is_known = backend == "cpu" and x.is_cpu
    function = getattr((module("cpu") if is_known else None) or module(resolve(backend, x.device)), name)
    return partial(_beside_autograd, function) if torch.is_grad_enabled() else function


_WRITTEN = {"out", "outs", "normed", "summed", "total"}


def _beside_autograd(function: Callable[..., Any], *args: Any) -> Any:
    """Calls a backend's function, of which autograd knows nothing: what it would lose is refused, and what is written
    is marked as changed, so that a gradient that needs what stood there before is an error and not wrong."""
    names, written = _names(function)
    expect_no_gradients(names, args)
    result = function(*args)
    for place in written:
        for x in tensors_of(args[place]):
            if not x.is_inference():  # which autograd cannot keep
                increment_version(x)
    return result


@cache
def _names(function: Callable[..., Any]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Of its arguments, and the places of those that it writes to."""
    names = tuple(inspect.signature(function).parameters)
    return names, tuple(i for i, name in enumerate(names) if name in _WRITTEN)
