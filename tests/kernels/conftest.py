"""How the kernels' tests run on a GPU, and fixtures of those of the C++ backend."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial

import pytest
import torch
from support.quick_interpreter import look_up_builtins_once

from psykern import _cpu

# Read when CUDA begins: so a kernel's fault shows in the test that launched it, not in a later one. Name these tests
# alone on the command line, for those of the engine are of launches that nobody waits for.
os.environ.setdefault("CUDA_LAUNCH_BLOCKING", "1")

if os.environ.get("TRITON_INTERPRET") == "1":
    with suppress(ImportError):  # where there is no Triton
        look_up_builtins_once()

OPS = (
    "linear",
    "expert_swiglu",
    "expert_linear",
    "add_weighted",
    "option_logprobs",
    "prefix_attention",
    "add_rms_norm",
    "qk_norm_rope",
    "silu_mul",
)


@pytest.fixture(params=_cpu.instruction_sets())
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The C++ backend held to one instruction set."""
    for op in OPS:
        monkeypatch.setattr(_cpu, op, partial(getattr(_cpu, op), isa=request.param))
    return str(request.param)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads for the rest of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
