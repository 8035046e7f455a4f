"""The dispatch of psykern.kernels: one signature for all backends, checked arguments, errors that say what to do.

The operations' numbers are in the test files named after them.
"""

from __future__ import annotations

import inspect
import re
from types import ModuleType
from typing import Any, get_args, get_type_hints

import pytest
import torch
from support.backends import BACKENDS, PLACES, REFERENCE, Place, each_place, missing
from support.calls import OPS, call, segments
from support.ops import map_tensors

from psykern import kernels
from psykern.kernels import dispatch, reference

each_op = pytest.mark.parametrize("op", OPS)
MODULES = {name: module for name in BACKENDS if (module := dispatch.module(name))}


def skip_values_on_a_device(place: Place, is_value: bool) -> None:
    """Values there are not read, as that would wait for the device; some wrong ones make it unusable."""
    if is_value and place.device.type != "cpu":
        pytest.skip("values on a device are not checked")


@pytest.mark.parametrize("place", PLACES, ids=lambda p: f"{p.backend}-on-{p.device}")
def test_this_place_is_there(place: Place) -> None:
    """Skips, with the reason, for each place that the kernel tests leave out."""
    reason = missing(place)
    if reason is not None:
        pytest.skip(reason)
    for op in OPS:
        call(op, place.backend, place)


@each_op
def test_every_operation_has_the_same_choice_of_backends(op: str) -> None:
    function = getattr(kernels, op)
    backend = inspect.signature(function).parameters["backend"]
    assert get_type_hints(function)["backend"] == kernels.Backend
    assert backend.default == "auto"
    assert backend.kind is inspect.Parameter.KEYWORD_ONLY
    assert set(get_args(kernels.Backend)) == {"auto", *BACKENDS}


@pytest.mark.parametrize("name", MODULES)
def test_every_backend_has_the_names_of_the_reference(name: str) -> None:
    assert public_functions(MODULES[name]) == public_functions(reference)


@each_op
def test_the_reference_takes_what_the_public_function_takes(op: str) -> None:
    public = [name for name in inspect.signature(getattr(kernels, op)).parameters if name != "backend"]
    assert public_functions(reference)[op] == public


def test_there_are_these_operations_and_no_others() -> None:
    assert set(public_functions(reference)) == set(OPS)


def public_functions(module: ModuleType) -> dict[str, list[str]]:
    """Functions that a module defines, or one within it, or that it takes from the reference, with the names of their
    parameters in order."""
    homes = (f"{module.__name__}.", f"{reference.__name__}.")
    return {
        name: list(inspect.signature(value).parameters)
        for name, value in vars(module).items()
        if inspect.isroutine(value)
        and not name.startswith("_")
        and f"{getattr(value, '__module__', '')}.".startswith(homes)
    }


@each_op
def test_an_unknown_backend_is_an_error_that_lists_the_choice(op: str) -> None:
    with pytest.raises(kernels.BackendError, match=r"backend: expected one of auto, reference, .*got 'gpu'"):
        call(op, "gpu")  # type: ignore[arg-type]


@each_op
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
def test_a_missing_backend_is_an_error_that_says_how_to_get_it(op: str, backend: kernels.Backend) -> None:
    if missing(Place(backend, REFERENCE.device)) is None:
        pytest.skip(f"backend {backend!r} is there")
    with pytest.raises(kernels.BackendError, match=f"backend '{backend}' is not available on cpu: .+"):
        call(op, backend)


@each_place
def test_auto_is_a_backend_that_is_there(place: Place) -> None:
    backend = kernels.resolve("auto", place.device)
    assert backend in BACKENDS
    assert missing(Place(backend, place.device)) is None


I32 = torch.int32


MISFITS: list[tuple[str, str, Any, str]] = [
    ("expert_swiglu", "x", torch.ones(3, 0), "[N, K] with K at least 1, got [3, 0]"),
    ("expert_swiglu", "x", torch.ones(4, 4), "[3, K], as routes say, got [4, 4]"),
    ("expert_swiglu", "gates", torch.ones(2, 5, 4), "one for each of 3 experts, got 2"),
    ("expert_swiglu", "gates", torch.ones(3, 5, 3), "[M, 4] each, got [5, 3]"),
    ("expert_swiglu", "gates", torch.ones(3, 5, 4).long(), "torch.float32 or torch.bfloat16 or torch.float16, got"),
    ("expert_swiglu", "ups", torch.ones(3, 6, 4), "[5, 4] like gates, got [6, 4]"),
    ("expert_swiglu", "ups", [torch.ones(5, 4)] * 2 + [torch.ones(6, 4)], "[5, 4] like the first, got [6, 4]"),
    ("expert_swiglu", "ups", [torch.ones(5, 4)] * 2 + [torch.ones(5, 4).bfloat16()], "torch.float32, got"),
    ("expert_swiglu", "out", torch.ones(3, 5), "[6, 5], got [3, 5]"),
    ("expert_linear", "x", torch.ones(6), "[N * k, K] with K at least 1, got [6]"),
    ("expert_linear", "x", torch.ones(3, 4), "[6, K], as routes say, got [3, 4]"),
    ("expert_linear", "x", torch.ones(6, 4).int(), "torch.float32 or torch.bfloat16 or torch.float16, got torch.int32"),
    ("expert_linear", "weights", [], "one for each of 3 experts, got 0"),
    ("expert_linear", "out", torch.ones(6, 5).bfloat16(), "torch.float32 on"),
    ("add_weighted", "total", torch.ones(4), "[N, D], got [4]"),
    ("add_weighted", "weights", torch.ones(2, 3), "[3, k], got [2, 3]"),
    ("add_weighted", "weights", torch.ones(3, 2).bfloat16(), "torch.float32, got torch.bfloat16"),
    ("add_weighted", "x", torch.ones(3, 4), "[6, 4], got [3, 4]"),
    ("add_weighted", "x", torch.ones(6, 4).bfloat16(), "torch.float32 on"),
    ("option_logprobs", "hidden", torch.ones(4), "[R, D], got [4]"),
    ("option_logprobs", "weight", torch.ones(5), "[V, 4], got [5]"),
    ("option_logprobs", "weight", torch.ones(5, 3), "[V, 4], got [5, 3]"),
    ("option_logprobs", "token_offsets", torch.zeros(3, dtype=torch.int64), "[4], got [3]"),
    ("option_logprobs", "token_ids", torch.zeros(3, 1, dtype=I32), "[nnz], got [3, 1]"),
    (
        "option_logprobs",
        "token_ids",
        torch.tensor([0, 5, 1], dtype=I32),
        "ids of the vocabulary, 0 to 4, got 0 to 5",
    ),
    (
        "option_logprobs",
        "token_ids",
        torch.tensor([0, 1, -1], dtype=I32),
        "ids of the vocabulary, 0 to 4, got -1 to 1",
    ),
    ("prefix_attention", "q", torch.ones(3, 16), "[N, Hq, Dh], got [3, 16]"),
    ("prefix_attention", "k", torch.ones(7, 8), "[M, Hkv, Dh] to fit q, got [7, 8]"),
    ("prefix_attention", "k", torch.ones(7, 1, 6), "[M, Hkv, Dh] to fit q, got [7, 1, 6]"),
    ("prefix_attention", "k", torch.ones(7, 3, 8), "[M, Hkv, Dh] to fit q, got [7, 3, 8]"),
    ("prefix_attention", "k", torch.ones(7, 4, 8), "[M, Hkv, Dh] to fit q, got [7, 4, 8]"),  # more than q has
    ("prefix_attention", "v", torch.ones(6, 1, 8), "[7, 1, 8] like k, got [6, 1, 8]"),
    ("prefix_attention", "window", 0, "at least 1, got 0"),
    ("prefix_attention", "softmax_scale", -0.5, "a number above 0, got -0.5"),
    ("prefix_attention", "softmax_scale", float("nan"), "a number above 0, got nan"),
    ("prefix_attention", "out", torch.ones(3, 2, 7), "[3, 2, 8], got [3, 2, 7]"),
    ("prefix_attention", "out", torch.ones(3, 2, 8).double(), "torch.float32 on"),
    ("add_rms_norm", "x", torch.ones(4), "[N, D], got [4]"),
    ("add_rms_norm", "weight", torch.ones(5), "[4], got [5]"),
    ("add_rms_norm", "residual", torch.ones(1, 4), "[3, 4] like x, got [1, 4]"),
    ("qk_norm_rope", "x", torch.ones(3, 16), "[N, H, Dh] with even Dh, got [3, 16]"),
    ("qk_norm_rope", "x", torch.ones(3, 2, 7), "[N, H, Dh] with even Dh, got [3, 2, 7]"),
    ("qk_norm_rope", "weight", torch.ones(4), "[8] or [16], got [4]"),
    ("qk_norm_rope", "weight", torch.ones(2, 8), "[8] or [16], got [2, 8]"),
    ("qk_norm_rope", "cos", torch.ones(6, 8), "[P, 4], got [6, 8]"),
    ("qk_norm_rope", "sin", torch.ones(5, 4), "[6, 4] like cos, got [5, 4]"),
    ("qk_norm_rope", "positions", torch.zeros(2, dtype=I32), "[3], got [2]"),
    ("qk_norm_rope", "out", torch.ones(3, 8, 2), "[3, 2, 8], got [3, 8, 2]"),
    ("silu_mul", "gate", torch.ones(4), "[N, F], got [4]"),
    ("silu_mul", "up", torch.ones(3, 1), "[3, 4] like gate, got [3, 1]"),
    ("silu_mul", "out", torch.ones(4, 3), "[3, 4], got [4, 3]"),
    ("silu_mul", "out", torch.ones(3, 4).bfloat16(), "torch.float32 on"),
    ("gather_rows", "source", torch.ones(4), "[B, M, ..], got [4]"),
    ("gather_rows", "rows", torch.zeros(3, 1, dtype=torch.int64), "[n], got [3, 1]"),
    ("gather_rows", "rows", torch.zeros(3, dtype=I32), "torch.int64, got torch.int32"),
    ("gather_rows", "rows", torch.tensor([0, 5]), "rows of source, 0 to 4, got 0 to 5"),
    ("gather_rows", "out", torch.ones(2, 4, 4), "[2, 3, 4], got [2, 4, 4]"),
    ("gather_rows", "out", torch.ones(2, 3, 4).bfloat16(), "torch.float32 on"),
]


@each_place
@pytest.mark.parametrize(("op", "name", "bad", "message"), MISFITS, ids=[f"{op}-{name}" for op, name, _, _ in MISFITS])
def test_an_argument_that_does_not_fit_is_named_with_expected_and_got(
    place: Place, op: str, name: str, bad: Any, message: str
) -> None:
    skip_values_on_a_device(place, message.startswith(("ids of", "rows of")))
    given = map_tensors(lambda tensor: tensor.to(place.device), bad)
    with pytest.raises(ValueError, match=f"^{name}: expected {re.escape(message)}"):
        call(op, place.backend, place, **{name: given})


SEGMENT_MISFITS = [
    ("positions", torch.zeros(3, 1, dtype=I32), "[N], got [3, 1]"),
    ("positions", torch.zeros(3), "torch.int32, got torch.float32"),
    ("query_offsets", torch.zeros(1, 2, dtype=I32), "[S+1], got [1, 2]"),
    ("query_offsets", torch.tensor([0, 2], dtype=I32), "to ascend from 0 to 3, got [0, 2]"),
    ("range_offsets", torch.zeros(3, dtype=I32), "[2], got [3]"),
    ("range_offsets", torch.tensor([1, 1], dtype=I32), "to ascend from 0 to 1, got [1, 1]"),
    ("range_offsets", torch.tensor([0, 1]), "torch.int32, got torch.int64"),
    ("key_ranges", torch.zeros(2, dtype=I32), "[n, 2], got [2]"),
    ("key_ranges", torch.zeros(2, 3, dtype=I32), "[n, 2], got [2, 3]"),
]


@pytest.mark.parametrize(("name", "bad", "message"), SEGMENT_MISFITS, ids=[name for name, _, _ in SEGMENT_MISFITS])
def test_segments_that_do_not_fit_are_refused_when_they_are_made(name: str, bad: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected {re.escape(message)}"):
        segments(**{name: bad})


@each_place
@pytest.mark.parametrize(
    ("name", "bad", "message"),
    [
        (
            "positions",
            {"positions": torch.ones(4, dtype=I32), "query_offsets": torch.tensor([0, 4]).int()},
            "[3], got [4]",
        ),
        ("key_ranges", {"key_ranges": torch.tensor([[5, 8]]).int()}, "rows of k, 0 to 7, got 5 to 8"),
        ("key_ranges", {"key_ranges": torch.tensor([[-1, 2]]).int()}, "rows of k, 0 to 7, got -1 to 2"),
    ],
    ids=["queries", "behind-k", "before-k"],
)
def test_segments_of_other_queries_or_keys_are_refused(
    place: Place, name: str, bad: dict[str, torch.Tensor], message: str
) -> None:
    skip_values_on_a_device(place, message.startswith("rows of"))
    with pytest.raises(ValueError, match=f"^{name}: expected {re.escape(message)}"):
        call("prefix_attention", place.backend, place, segments=segments(place, **bad))


@each_place
@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("hidden", torch.ones(3, 4, dtype=torch.int64)),
        ("weight", torch.ones(5, 4, dtype=torch.int8)),
        ("token_offsets", torch.tensor([0.0, 1.0, 1.0, 3.0])),
        ("token_ids", torch.tensor([0.0, 1.5, 2.0])),
    ],
    ids=["hidden-int64", "weight-int8", "token_offsets-fp32", "token_ids-fp32"],
)
def test_option_logprobs_refuses_dtypes_that_do_not_fit(place: Place, name: str, bad: torch.Tensor) -> None:
    """As its docstring says; int8 weights, for instance, would give plausible numbers."""
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        call("option_logprobs", place.backend, place, **{name: bad.to(place.device)})


@each_place
@pytest.mark.parametrize("offsets", [[0, 1, 1, 2], [0, 1, 1, 4], [1, 1, 1, 3], [0, 2, 1, 3]], ids=str)
def test_option_logprobs_refuses_offsets_that_do_not_cover_the_tokens(place: Place, offsets: list[int]) -> None:
    """A token that no row has would be left without a logit."""
    skip_values_on_a_device(place, is_value=True)
    with pytest.raises(ValueError, match=r"^token_offsets: expected"):
        call("option_logprobs", place.backend, place, token_offsets=torch.tensor(offsets, device=place.device))
