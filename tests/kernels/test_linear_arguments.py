"""What products with weights refuse, as psykern.kernels has them and as the binding does. What those of a mixture of
experts refuse as psykern.kernels has them is in ``test_dispatch.py``."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from support.backends import Place, each_place, short
from support.calls import call
from support.ops import put

from psykern import _cpu, kernels

X, LAYER, OUT = torch.ones(3, 4), (torch.ones(5, 4), torch.ones(5)), torch.ones(3, 5)
MISFITS = {
    "x-of-one-dimension": ({"x": torch.ones(4)}, "x: expected [N, K] with K at least 1, got [4]"),
    "x-without-depth": ({"x": torch.ones(3, 0)}, "x: expected [N, K] with K at least 1, got [3, 0]"),
    "x-int64": ({"x": X.long()}, "x: expected torch.float32 or torch.bfloat16 or torch.float16, got torch.int64"),
    "weight-of-another-K": ({"layers": [(torch.ones(5, 3), None)]}, "weight: expected [M, 4], got [5, 3]"),
    "weight-of-one-dimension": ({"layers": [(torch.ones(4), None)]}, "weight: expected [M, 4], got [4]"),
    "weight-int8": (
        {"layers": [(LAYER[0].to(torch.int8), None)]},
        "weight: expected torch.float32 or torch.bfloat16 or torch.float16, got torch.int8",
    ),
    "bias-of-another-size": ({"layers": [(LAYER[0], torch.ones(4))]}, "bias of weight: expected [5], got [4]"),
    "bias-int64": (
        {"layers": [(LAYER[0], LAYER[1].long())]},
        "bias of weight: expected torch.float32 or torch.bfloat16 or torch.float16, got torch.int64",
    ),
    "no-layers": ({"layers": [], "outs": []}, "outs: expected one for each of 0 layers, at least one, got 0"),
    "too-many-outs": ({"outs": [OUT, OUT]}, "outs: expected one for each of 1 layers, at least one, got 2"),
    "out-of-another-shape": ({"outs": [torch.ones(3, 4)]}, "out: expected [3, 5], got [3, 4]"),
    "out-of-another-dtype": (
        {"outs": [OUT.bfloat16()]},
        "out: expected torch.float32 on {0}, got torch.bfloat16 on {0}",
    ),
}


@each_place
@pytest.mark.parametrize(("changed", "message"), MISFITS.values(), ids=MISFITS)
def test_what_does_not_fit_is_named_with_expected_and_got(place: Place, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message.format(place.device))):
        call("linear", place.backend, place, **{name: put(place, changed)[name] for name in changed})


SWIGLU_MISFITS = {
    "x": ({"x": torch.ones(3, 0)}, "x: expected [N, K] with K at least 1, got [3, 0]"),
    "gate": ({"gate": (torch.ones(5, 3), None)}, "gate: expected [M, 4], got [5, 3]"),
    "up": ({"up": (torch.ones(6, 4), None)}, "up: expected [5, 4] like gate, got [6, 4]"),
    "bias": ({"up": (LAYER[0], torch.ones(6))}, "bias of up: expected [5], got [6]"),
    "out": ({"out": torch.ones(5, 3)}, "out: expected [3, 5], got [5, 3]"),
}


@each_place
@pytest.mark.parametrize(("changed", "message"), SWIGLU_MISFITS.values(), ids=SWIGLU_MISFITS)
def test_what_does_not_fit_swiglu_is_named(place: Place, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call("swiglu", place.backend, place, **put(place, changed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_an_out_that_shares_memory_with_x_is_refused_on_the_cpu(dtype: torch.dtype) -> None:
    x = torch.ones(6, 4, dtype=dtype)
    with pytest.raises(ValueError, match="out: expected an array apart from x, got one that shares memory with it"):
        kernels.linear(x[:4], [(torch.ones(4, 4), None)], [x[2:]], backend="cpu")
    with pytest.raises(ValueError, match="out: expected an array apart from x"):
        kernels.swiglu(x, (torch.ones(4, 4), None), (torch.ones(4, 4), None), out=x, backend="cpu")
    kernels.linear(x[:3], [(torch.ones(4, 4), None)], [x[3:]], backend="cpu")  # side by side is apart
    assert (x == torch.tensor([1.0] * 3 + [4.0] * 3)[:, None]).all()


def part(**changed: Any) -> tuple[Any, ...]:
    given = {"weight": LAYER[0].numpy(), "bias": None, "up": None, "up_bias": None, "out": np.ones((3, 5), np.float32)}
    return tuple((given | changed).values())


def read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


ARRAY = np.ones((3, 4), np.float32)
BINDING_MISFITS: dict[str, tuple[dict[str, Any], str]] = {
    "x-fp64": ({"x": ARRAY.astype(np.float64)}, "x: expected float32, or bfloat16 as int16 or uint16, got float64"),
    "x-of-one-dimension": ({"x": ARRAY[0]}, "x: expected [N, K], got [4]"),
    "x-without-depth": ({"x": ARRAY[:, :0]}, "x: expected [N, K] with K at least 1, got [3, 0]"),
    "x-of-columns": ({"x": np.ones((4, 3), np.float32).T}, "x: expected rows that are dense"),
    "weight-int8": ({"weight": np.ones((5, 4), np.int8)}, "weight: expected float32, or bfloat16 as int16"),
    "weight-of-another-K": ({"weight": np.ones((5, 3), np.float32)}, "weight: expected [M, 4], got [5, 3]"),
    "bias-of-another-size": ({"bias": np.ones(4, np.float32)}, "bias: expected [5], got [4]"),
    "bias-fp64": ({"bias": np.ones(5)}, "bias: expected float32, got float64"),
    "out-of-another-shape": ({"out": np.ones((3, 4), np.float32)}, "out: expected [3, 5], got [3, 4]"),
    "out-of-another-dtype": ({"out": np.ones((3, 5), np.int16)}, "out: expected the dtype of x, got int16"),
    "out-read-only": ({"out": read_only(np.ones((3, 5), np.float32))}, "out: expected an array to write to, got"),
    "up-without-gate": ({"up": np.ones((5, 4), np.float32)}, "up: expected a weight with silu_mul alone, got one"),
    "gate-without-up": ({"epilogue": "silu_mul"}, "up: expected a weight with silu_mul alone, got none"),
    "up-of-another-size": (
        {"epilogue": "silu_mul", "up": np.ones((4, 4), np.float32)},
        "up: expected [5, 4], got [4, 4]",
    ),
    "epilogue": ({"epilogue": "gelu"}, "epilogue: expected store, add or silu_mul, got gelu"),
    "threads": ({"num_threads": 0}, "num_threads: expected at least 1, got 0"),
    "instruction-set": ({"isa": "sse9"}, "does not have 'sse9'"),
}


@pytest.mark.parametrize(("changed", "message"), BINDING_MISFITS.values(), ids=BINDING_MISFITS)
def test_the_binding_refuses_what_does_not_fit(changed: dict[str, Any], message: str) -> None:
    of_part = {name: value for name, value in changed.items() if name in ("weight", "bias", "up", "up_bias", "out")}
    others: dict[str, Any] = {"x": ARRAY, "epilogue": "store", "num_threads": 1}
    others |= {name: value for name, value in changed.items() if name not in of_part}
    with pytest.raises(ValueError, match=re.escape(message)):
        _cpu.linear(others.pop("x"), [part(**of_part)], **others)


INT = np.int32
SLOTS, OFFSETS = np.array([4, 0, 1, 3, 5, 2], INT), np.array([0, 1, 1, 6], INT)  # of 3 rows to 2 of 3 experts
EXPERTS = [np.ones((5, 4), np.float32)] * 3
EXPERT_MISFITS: dict[str, tuple[dict[str, Any], str]] = {
    "x": ({"x": ARRAY[0]}, "x: expected [N, K], got [4]"),
    "no-experts": ({"weights": [], "gates": []}, "s: expected at least one, got none"),
    "a-weight-of-one-dimension": (
        {"weights": [ARRAY[0]] * 3, "gates": [ARRAY[0]] * 3},
        "s: expected [M, K] each, got [4]",
    ),
    "a-weight-of-another-K": (
        {"weights": [EXPERTS[0], ARRAY[:, :3].copy(), EXPERTS[0]]},
        "weights: expected [5, 4], got",
    ),
    "a-weight-of-another-M": ({"gates": [EXPERTS[0], EXPERTS[0], ARRAY]}, "gates: expected [5, 4], got [3, 4]"),
    "an-up-of-another-M": ({"ups": [ARRAY] * 3}, "ups: expected [5, 4], got [3, 4]"),
    "too-few-ups": ({"ups": EXPERTS[:2]}, "ups: expected 3 like gates, got 2"),
    "int8": ({"weights": [np.ones((5, 4), np.int8)] * 3}, "weights: expected float32, or bfloat16 as int16"),
    "slots-too-few": ({"slots": SLOTS[:5]}, "slots: expected [6], got [5]"),
    "slots-int64": ({"slots": SLOTS.astype(np.int64)}, "slots: expected int32, got int64"),
    "slots-behind": ({"slots": SLOTS + INT(1)}, "slots: expected 0 to 5, got 1 to 6"),
    "slots-before": ({"slots": SLOTS - INT(1)}, "slots: expected 0 to 5, got -1 to 4"),
    "slots-twice": ({"slots": np.array([4, 0, 1, 4, 5, 2], INT)}, "slots: expected each once, got 4 again"),
    "offsets-too-few": ({"offsets": OFFSETS[1:]}, "offsets: expected [4], got [3]"),
    "offsets-behind": ({"offsets": np.array([0, 1, 1, 7], INT)}, "offsets: expected 0 to 6, got 0 to 7"),
    "offsets-not-to-the-end": ({"offsets": np.array([0, 1, 1, 5], INT)}, "offsets: expected 0 to 6, got 0 to 5"),
    "offsets-not-from-0": ({"offsets": np.array([1, 1, 1, 6], INT)}, "offsets: expected 0 to 6, got 1 to 6"),
    "offsets-that-fall": ({"offsets": np.array([0, 3, 1, 6], INT)}, "offsets: expected ascending offsets, got"),
    "top_k": ({"top_k": 0}, "top_k: expected at least 1, got 0"),
    "out-of-another-shape": ({"out": np.ones((6, 4), np.float32)}, "out: expected [6, 5], got [6, 4]"),
    "out-of-another-dtype": ({"out": np.ones((6, 5), INT)}, "out: expected float32, or bfloat16 as int16"),
    "out-read-only": ({"out": read_only(np.ones((6, 5), np.float32))}, "out: expected an array to write to, got"),
    "threads": ({"num_threads": 0}, "num_threads: expected at least 1, got 0"),
}


@pytest.mark.parametrize(("changed", "message"), EXPERT_MISFITS.values(), ids=EXPERT_MISFITS)
def test_the_binding_refuses_experts_that_do_not_fit(changed: dict[str, Any], message: str) -> None:
    """Of both functions those that have the argument."""
    rest = {"slots": SLOTS, "offsets": OFFSETS, "out": np.ones((6, 5), np.float32), "num_threads": 1}
    swiglu = {"x": ARRAY, "gates": EXPERTS, "ups": EXPERTS, **rest, "top_k": 2}
    linear = {"x": np.ones((6, 4), np.float32), "weights": EXPERTS, **rest}
    functions: list[tuple[Any, dict[str, Any]]] = [(_cpu.expert_swiglu, swiglu), (_cpu.expert_linear, linear)]
    called = [(function, given) for function, given in functions if given.keys() & changed.keys()]
    assert called
    for function, given in called:
        with pytest.raises(ValueError, match=re.escape(message)):
            function(**{**given, **{name: value for name, value in changed.items() if name in given}})


SUM_MISFITS: dict[str, tuple[dict[str, Any], str]] = {
    "total": ({"total": ARRAY[0]}, "total: expected [N, D], got [4]"),
    "total-read-only": ({"total": read_only(np.ones((3, 4), np.float32))}, "total: expected an array to write to, got"),
    "weights-of-other-rows": ({"weights": np.ones((2, 2), np.float32)}, "weights: expected [3, k], got [2, 2]"),
    "weights-fp64": ({"weights": np.ones((3, 2))}, "weights: expected float32, got float64"),
    "x-of-other-rows": ({"x": ARRAY}, "x: expected [6, 4] like total, got [3, 4]"),
    "x-of-another-dtype": ({"x": np.ones((6, 4), np.int16)}, "x: expected the dtype of total, got int16"),
}


@pytest.mark.parametrize(("changed", "message"), SUM_MISFITS.values(), ids=SUM_MISFITS)
def test_the_binding_refuses_a_sum_that_does_not_fit(changed: dict[str, Any], message: str) -> None:
    given = {"x": np.ones((6, 4), np.float32), "weights": np.ones((3, 2), np.float32), "total": ARRAY.copy()}
    with pytest.raises(ValueError, match=re.escape(message)):
        _cpu.add_weighted(**(given | changed), num_threads=1)
