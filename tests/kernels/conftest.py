"""Fixtures of the tests of the C++ backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch

from psykern import _cpu

OPS = ("linear", "option_logprobs", "prefix_attention", "add_rms_norm", "qk_norm_rope", "silu_mul")


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
