"""The operations in other people's models: under torch.compile and torch.export, on fake and meta tensors, and beside
autograd, of which they have no part.

What is expected is what the plain call gives, bit for bit, which other files hold against fp64; and torch's own
``opcheck`` of what an operator must keep to.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch._dynamo
from support.backends import Place, assert_same_bits
from support.calls import OPS, arguments, segments
from support.ops import Case, cases, map_tensors, put, tensors
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from psykern import kernels

CPU = Place("cpu", torch.device("cpu"))
CASES = cases(torch.float32)
each_op = pytest.mark.parametrize("op", OPS)


def random_arguments(op: str) -> dict[str, Any]:
    """Those of ``support.calls`` with other numbers than ones. Arrays that are written to are new ones each time."""
    draw = torch.Generator().manual_seed(0)
    return map_arguments(lambda x: torch.randn(x.shape, generator=draw) if x.is_floating_point() else x, arguments(op))


def map_arguments(f: Callable[[Tensor], Tensor], given: dict[str, Any]) -> dict[str, Any]:
    return {name: map_tensors(f, value) for name, value in given.items()}


def outputs(given: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [given] if isinstance(given, Tensor) else list(given)


def plain(op: str) -> list[Tensor]:
    return outputs(getattr(kernels, op)(**random_arguments(op)))


def assert_same(actual: Tensor | Sequence[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(outputs(actual), expected, strict=True):
        assert_same_bits(one, other)


class Recorded(TorchDispatchMode):
    """The operators that are called within it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "psykern":
            self.calls.append((func, copy.deepcopy(args)))
        return func(*args, **(kwargs or {}))


@each_op
def test_an_operator_keeps_torchs_rules_and_computes_what_the_plain_call_does(op: str) -> None:
    with torch.no_grad(), Recorded() as recorded:
        result = getattr(kernels, op)(**random_arguments(op))
    assert_same(result, plain(op))
    ((operator, args),) = recorded.calls
    assert operator is getattr(torch.ops.psykern, op).default
    torch.library.opcheck(operator, args)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_an_operator_takes_every_form_of_a_call(case: Case) -> None:
    given = put(CPU, case.arguments)
    expected = case.run(CPU, given)
    with Recorded() as recorded:
        assert_same(case.run(CPU, given), expected)
    assert [operator for operator, _ in recorded.calls] == [getattr(torch.ops.psykern, case.op).default]


class Every(torch.nn.Module):
    """One call of each operation."""

    def forward(self, given: dict[str, dict[str, Any]]) -> dict[str, Any]:
        return {op: getattr(kernels, op)(**arguments) for op, arguments in given.items()}


@pytest.mark.parametrize("how", ["compiled", "exported"])
def test_a_graph_of_every_operation_gives_the_bits_of_plain_calls(how: str) -> None:
    given = {op: random_arguments(op) for op in OPS}
    with torch.no_grad():
        if how == "compiled":
            traced = torch.compile(Every(), fullgraph=True, backend="aot_eager")
        else:
            exported = torch.export.export(Every(), (copy.deepcopy(given),), strict=False)
            called = [str(node.target) for node in exported.graph.nodes if "psykern" in str(node.target)]
            assert called == [f"psykern.{op}.default" for op in OPS]
            traced = exported.module()
        result = traced(given)
    for op in OPS:
        assert_same(result[op], plain(op))


class Head(torch.nn.Module):
    def forward(self, hidden: Tensor, weight: Tensor, token_offsets: Tensor, token_ids: Tensor) -> Any:
        return kernels.option_logprobs(hidden, weight, token_offsets, token_ids)


class Attention(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, segments: kernels.Segments) -> Any:
        return kernels.prefix_attention(q, k, v, segments, softmax_scale=0.5)


def head(size: int) -> tuple[Any, ...]:
    """So many rows with two tokens each, of a vocabulary of 5."""
    ids = torch.arange(2 * size, dtype=torch.int32) % 5
    return torch.randn(size, 16), torch.randn(5, 16), torch.arange(size + 1) * 2, ids


def attention(size: int) -> tuple[Any, ...]:
    """So many segments of two queries each, the first of which is the path of the others."""
    n = torch.arange(size + 1, dtype=torch.int32)
    path = torch.tensor([0, 2], dtype=torch.int32).repeat(size, 1)
    own = torch.stack([2 * n[:-1], 2 * n[:-1] + 2], dim=1)
    ranges = torch.stack([path, own], dim=1).flatten(0, 1)[1:]
    range_offsets = (2 * n - 1).clamp(min=0)
    positions = torch.cat([n[:2], torch.tensor([2, 3], dtype=torch.int32).repeat(size - 1)])
    q, k, v = (torch.randn(2 * size, 1, 8) for _ in range(3))
    return (q, k, v, kernels.Segments(positions, 2 * n, range_offsets, ranges))


N, M = torch.export.Dim("n", min=2), torch.export.Dim("m", min=2)
HEAD = ({0: N}, None, {0: N + 1}, {0: M})
ATTENTION = ({0: 2 * N}, {0: 2 * N}, {0: 2 * N}, [{0: 2 * N}, {0: N + 1}, {0: N + 1}, {0: 2 * N - 1}])
each_dynamic = pytest.mark.parametrize(
    ("module", "sized", "dynamic"),
    [(Head(), head, HEAD), (Attention(), attention, ATTENTION)],
    ids=["option_logprobs", "prefix_attention"],
)


@each_dynamic
def test_a_compiled_call_takes_other_sizes_and_is_not_compiled_anew(
    module: torch.nn.Module, sized: Callable[[int], tuple[Any, ...]], dynamic: tuple[Any, ...]
) -> None:
    def given(size: int) -> tuple[Any, ...]:
        return pytree.tree_map(marked, sized(size))

    def marked(x: Tensor) -> Tensor:
        torch._dynamo.mark_dynamic(x, 0)
        return x

    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        compiled(*given(5))
        with torch.compiler.set_stance("fail_on_recompile"):
            other = given(7)
            assert_same(compiled(*other), outputs(module(*other)))


@each_dynamic
def test_an_exported_call_takes_other_sizes(
    module: torch.nn.Module, sized: Callable[[int], tuple[Any, ...]], dynamic: tuple[Any, ...]
) -> None:
    is_strict = isinstance(module, Head)  # a way each: through the compiler's front end, and without it
    exported = torch.export.export(module, sized(3), dynamic_shapes=dynamic, strict=is_strict).module()
    given = sized(7)
    assert_same(exported(*given), outputs(module(*given)))


def test_a_compiled_function_may_make_segments_and_routes_itself() -> None:
    def call(q: Tensor, positions: Tensor, offsets: Tensor, ranges: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        made = kernels.Segments(positions, 4 * offsets, offsets, ranges)
        rows = kernels.prefix_attention(q, q, q, made, softmax_scale=0.5).flatten(1)
        return kernels.expert_linear(rows, weights, kernels.Routes.of(experts, 3))

    draw = torch.Generator().manual_seed(0)
    offsets, ranges = (torch.tensor(x, dtype=torch.int32) for x in ([0, 1], [[0, 4]]))
    q, weights = torch.randn(4, 2, 8, generator=draw), torch.randn(3, 5, 16, generator=draw)
    given = (q, torch.arange(4, dtype=torch.int32), offsets, ranges, torch.tensor([[0, 2], [1, 0]]), weights)
    with torch.no_grad():
        assert_same(torch.compile(call, fullgraph=True, backend="aot_eager")(*given), [call(*given)])


def test_segments_and_routes_are_trees_of_tensors_and_are_checked_when_they_are_made_again() -> None:
    made, routes = segments(), kernels.Routes.of(torch.tensor([[0, 2], [1, 0]]), 3)
    again, same = pytree.tree_map(torch.clone, (made, routes))
    assert torch.equal(again.key_ranges, made.key_ranges) and again.key_span == made.key_span
    assert torch.equal(same.slots, routes.slots) and same.top_k == 2
    with pytest.raises(ValueError, match="query_offsets: expected to ascend from 0 to 3"):
        pytree.tree_map(lambda x: x + 1, made)


def test_an_exported_call_checks_the_values_that_it_is_run_with() -> None:
    exported = torch.export.export(Head(), head(3), strict=False).module()
    hidden, weight, offsets, ids = head(3)
    with pytest.raises(ValueError, match="token_ids: expected ids of the vocabulary, 0 to 4, got 0 to 9"):
        exported(hidden, weight, offsets, torch.where(ids == 4, 9, ids))


@each_op
@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_tensors_without_numbers_give_shapes(op: str, kind: str) -> None:
    given, expected = random_arguments(op), plain(op)
    if kind == "meta":
        result = outputs(getattr(kernels, op)(**map_arguments(lambda x: x.to("meta"), given)))
    else:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            result = outputs(getattr(kernels, op)(**map_arguments(mode.from_tensor, given)))
    assert [(x.shape, x.dtype, x.stride()) for x in result] == [(x.shape, x.dtype, x.stride()) for x in expected]
    assert {x.device.type for x in result} == {"meta" if kind == "meta" else "cpu"}


def test_shapes_and_dtypes_are_checked_of_tensors_without_numbers() -> None:
    x = torch.empty(3, 4, device="meta")
    with pytest.raises(ValueError, match=r"up: expected \[3, 4\] like gate, got \[3, 5\]"):
        kernels.silu_mul(x, torch.empty(3, 5, device="meta"))
    with pytest.raises(ValueError, match=r"rows: expected torch.int64, got torch.int32"):
        kernels.gather_rows(x, torch.empty(2, dtype=torch.int32, device="meta"))


def floats(op: str) -> list[str]:
    """The arguments of an operation that hold floats, or lists of tensors of floats."""
    return [name for name, value in random_arguments(op).items() if any(x.is_floating_point() for x in tensors(value))]


def learned(op: str, name: str) -> dict[str, Any]:
    """A call with the last tensor of argument ``name`` as something that a gradient is wanted of."""
    given = random_arguments(op)
    last = tensors(given[name])[-1]
    given[name] = map_tensors(lambda x: x.requires_grad_() if x is last else x, given[name])
    return given


@each_op
def test_an_input_that_requires_gradients_is_refused_by_its_name(op: str) -> None:
    for name in floats(op):
        refused = pytest.raises(
            ValueError,
            match=rf"^{name}: .* no tensor that requires gradients.* give its \.detach\(\), or",
        )
        with refused:
            getattr(kernels, op)(**learned(op, name))
        with torch.no_grad():
            assert_same(getattr(kernels, op)(**learned(op, name)), plain(op))
    with torch.inference_mode():
        getattr(kernels, op)(**learned(op, name))


@pytest.mark.parametrize("op", ["silu_mul", "qk_norm_rope", "swiglu", "gather_rows"])
def test_so_is_an_array_to_write_to(op: str) -> None:
    out = plain(op)[0].requires_grad_()
    with pytest.raises(ValueError, match=r"^out: .* no tensor that requires gradients"):
        getattr(kernels, op)(**random_arguments(op), out=out)


@each_op
def test_an_operator_refuses_it_too(op: str) -> None:
    name = floats(op)[0]
    with torch.no_grad(), Recorded() as recorded:
        getattr(kernels, op)(**random_arguments(op))
    ((operator, args),) = recorded.calls
    args[0].requires_grad_()
    with pytest.raises(ValueError, match=rf"^{name}: .* no tensor that requires gradients"):
        operator(*args)
    with torch.no_grad():
        operator(*args)


def test_a_compiled_call_refuses_it_while_it_is_compiled_and_afterwards() -> None:
    given = random_arguments("silu_mul")
    compiled = torch.compile(lambda gate, up: kernels.silu_mul(gate, up), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=r"ValueError\(.up: expected no tensor that requires gradients"):
        compiled(given["gate"], given["up"].clone().requires_grad_())
    compiled(**given)
    with pytest.raises(Exception, match=r"ValueError\(.up: expected no tensor that requires gradients"):
        compiled(given["gate"], given["up"].clone().requires_grad_())


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # by torch's own forward derivatives
def test_a_forward_derivative_is_refused_too() -> None:
    x = torch.ones(3, 4)
    with forward_ad.dual_level(), pytest.raises(ValueError, match=r"^up: .* no tensor that requires gradients"):
        kernels.silu_mul(x, forward_ad.make_dual(x, x))
    with pytest.raises(ValueError, match=r"^gate: .* no tensor that requires gradients"):
        torch.func.grad(lambda gate: kernels.silu_mul(gate, x).sum())(x)


@pytest.mark.parametrize("transform", [torch.vmap, torch.func.functionalize])
def test_a_transform_that_knows_no_rule_for_an_operator_says_so(transform: Callable[..., Any]) -> None:
    """And is not given the numbers of what a kernel read and wrote behind its back."""
    with pytest.raises(RuntimeError, match=r"psykern::silu_mul"):
        transform(lambda x: kernels.silu_mul(x.view(-1, 4), x.view(-1, 4)))(torch.ones(2, 3, 4))


def test_a_gradient_that_needs_what_was_overwritten_is_an_error() -> None:
    """torch's own operations say so, as the gradient would be of other numbers."""
    weight, x = torch.ones(3, 4, requires_grad=True), torch.ones(3, 4)
    loss = (weight * x).sum()
    kernels.silu_mul(torch.ones(3, 4), torch.ones(3, 4), out=x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
