"""The operations as operators of torch, ``torch.ops.psykern.*``: what ``torch.compile``, ``torch.export``, fake and
meta tensors see of them, as one node of a graph each. They are there once ``psykern.kernels`` is.

Run, an operator is the public function of its name, with all of its checks; traced, it computes nothing. It is called
with tensors and numbers alone: a layer comes as weight and bias, :class:`Routes` and :class:`Segments` as their arrays,
experts as a list of one tensor each, or of one [E, M, K] for all. All write into arrays that they are given but
``option_logprobs``, which gives four new ones. None has a derivative: inputs that require gradients are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from psykern import kernels  # half made when this is read; used in calls alone
from psykern.core.settings import Backend
from psykern.kernels.checks import expect_no_gradients
from psykern.kernels.routes import Routes
from psykern.kernels.segments import Segments

_ARRAYS = ("positions", "query_offsets", "range_offsets", "key_ranges")  # of segments


def linear(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    outs: list[Tensor],
    add: bool,
    backend: Backend = "auto",
) -> None:
    kernels.linear(x, list(zip(weights, biases, strict=True)), outs, add=add, backend=backend)


def swiglu(
    x: Tensor,
    gate: Tensor,
    gate_bias: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    out: Tensor,
    backend: Backend = "auto",
) -> None:
    kernels.swiglu(x, (gate, gate_bias), (up, up_bias), out=out, backend=backend)


def expert_swiglu(
    x: Tensor,
    gates: list[Tensor],
    ups: list[Tensor],
    slots: Tensor,
    offsets: Tensor,
    top_k: int,
    out: Tensor,
    backend: Backend = "auto",
) -> None:
    routes = Routes(slots, offsets, top_k)
    kernels.expert_swiglu(x, _experts(gates), _experts(ups), routes, out=out, backend=backend)


def expert_linear(
    x: Tensor,
    weights: list[Tensor],
    slots: Tensor,
    offsets: Tensor,
    top_k: int,
    out: Tensor,
    backend: Backend = "auto",
) -> None:
    kernels.expert_linear(x, _experts(weights), Routes(slots, offsets, top_k), out=out, backend=backend)


def _experts(listed: list[Tensor]) -> Any:  # kernels.Experts, which to mypy is no Tensor
    return listed[0] if len(listed) == 1 and listed[0].dim() == 3 else listed


def add_weighted(x: Tensor, weights: Tensor, total: Tensor, backend: Backend = "auto") -> None:
    kernels.add_weighted(x, weights, total, backend=backend)


def option_logprobs(
    hidden: Tensor, weight: Tensor, token_offsets: Tensor, token_ids: Tensor, backend: Backend = "auto"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    lse, logits, argmax, entropy = kernels.option_logprobs(hidden, weight, token_offsets, token_ids, backend=backend)
    return lse, logits, argmax, entropy.clone()  # for what an operator gives shares no memory, and this may with lse


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    query_offsets: Tensor,
    range_offsets: Tensor,
    key_ranges: Tensor,
    softmax_scale: float,
    window: int | None,
    out: Tensor,
    backend: Backend = "auto",
) -> None:
    segments = Segments(positions, query_offsets, range_offsets, key_ranges)
    kernels.prefix_attention(q, k, v, segments, softmax_scale=softmax_scale, window=window, out=out, backend=backend)


def add_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    norm_first: bool,
    normed: Tensor,
    summed: Tensor | None,
    backend: Backend = "auto",
) -> None:
    kernels.add_rms_norm(x, residual, weight, eps, norm_first=norm_first, normed=normed, summed=summed, backend=backend)


def qk_norm_rope(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    eps: float,
    out: Tensor,
    backend: Backend = "auto",
) -> None:
    kernels.qk_norm_rope(x, weight, cos, sin, positions, eps, out=out, backend=backend)


def silu_mul(gate: Tensor, up: Tensor, out: Tensor, backend: Backend = "auto") -> None:
    kernels.silu_mul(gate, up, out=out, backend=backend)


def gather_rows(source: Tensor, rows: Tensor, out: Tensor, backend: Backend = "auto") -> None:
    kernels.gather_rows(source, rows, out=out, backend=backend)


# What each takes in torch's notation, where (a!) is written to, but for the last argument of all, the backend; and what
# the one gives that gives something.
_TAKES: dict[Callable[..., Any], str] = {
    linear: "Tensor x, Tensor[] weights, Tensor?[] biases, Tensor(a!)[] outs, bool add",
    swiglu: "Tensor x, Tensor gate, Tensor? gate_bias, Tensor up, Tensor? up_bias, Tensor(a!) out",
    expert_swiglu: "Tensor x, Tensor[] gates, Tensor[] ups, Tensor slots, Tensor offsets, int top_k, Tensor(a!) out",
    expert_linear: "Tensor x, Tensor[] weights, Tensor slots, Tensor offsets, int top_k, Tensor(a!) out",
    add_weighted: "Tensor x, Tensor weights, Tensor(a!) total",
    option_logprobs: "Tensor hidden, Tensor weight, Tensor token_offsets, Tensor token_ids",
    prefix_attention: "Tensor q, Tensor k, Tensor v, Tensor positions, Tensor query_offsets, Tensor range_offsets, "
    "Tensor key_ranges, float softmax_scale, int? window, Tensor(a!) out",
    add_rms_norm: "Tensor x, Tensor? residual, Tensor weight, float eps, bool norm_first, Tensor(a!) normed, "
    "Tensor(b!)? summed",
    qk_norm_rope: "Tensor x, Tensor? weight, Tensor cos, Tensor sin, Tensor positions, float eps, Tensor(a!) out",
    silu_mul: "Tensor gate, Tensor up, Tensor(a!) out",
    gather_rows: "Tensor source, Tensor rows, Tensor(a!) out",
}
_GIVES = {option_logprobs: "(Tensor lse, Tensor logits, Tensor argmax, Tensor entropy)"}


# The same in shapes alone, for what is traced.


def _written(*args: Any) -> None:
    pass


def _scores(
    hidden: Tensor, weight: Tensor, token_offsets: Tensor, token_ids: Tensor, backend: Backend = "auto"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    lse, entropy = (hidden.new_empty(hidden.shape[0], dtype=torch.float32) for _ in range(2))
    logits = hidden.new_empty(token_ids.shape[0], dtype=torch.float32)
    return lse, logits, hidden.new_empty(hidden.shape[0], dtype=torch.int64), entropy


def _refuse_gradients(operator: Callable[..., Any], names: list[str], *args: Any) -> Any:
    expect_no_gradients(names, args)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*args)


def _define() -> torch.library.Library:
    library = torch.library.Library("psykern", "DEF")
    for function, takes in _TAKES.items():
        name, gives = function.__name__, _GIVES.get(function, "()")
        library.define(f'{name}({takes}, str backend="auto") -> {gives}', tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, function, "CompositeExplicitAutograd")
        traced = _scores if function in _GIVES else _written
        torch.library.register_fake(f"psykern::{name}", traced, lib=library)
        operator = getattr(torch.ops.psykern, name).default
        names = [argument.name for argument in operator._schema.arguments]
        library.impl(name, partial(_refuse_gradients, operator, names), "Autograd")
    return library


def _register_types() -> None:
    """What a traced function is given is a tree of tensors to torch; these are branches of it."""
    for kind, names, unflatten in ((Segments, _ARRAYS, _segments), (Routes, ("slots", "offsets"), _routes)):
        pytree.register_pytree_node(
            kind,
            partial(_flatten, names),
            unflatten,
            serialized_type_name=f"psykern.kernels.{kind.__name__}",
            flatten_with_keys_fn=partial(_flatten_with_keys, names),
        )


def _flatten(names: Sequence[str], branch: Any) -> tuple[list[Any], int | None]:
    return [getattr(branch, name) for name in names], getattr(branch, "top_k", None)


def _flatten_with_keys(names: Sequence[str], branch: Any) -> tuple[list[tuple[Any, Any]], int | None]:
    leaves, top_k = _flatten(names, branch)
    return [(pytree.GetAttrKey(name), leaf) for name, leaf in zip(names, leaves, strict=True)], top_k


def _segments(leaves: Iterable[Any], context: None) -> Segments:
    arrays = list(leaves)
    if all(isinstance(array, Tensor) for array in arrays):
        return Segments(*arrays)
    segments = object.__new__(Segments)  # of what is said of each array, such as which of its sizes may change
    for name, value in zip(_ARRAYS, arrays, strict=True):
        object.__setattr__(segments, name, value)
    return segments


def _routes(leaves: Iterable[Any], top_k: int) -> Routes:
    slots, offsets = leaves
    return Routes(slots, offsets, top_k)


_library = _define()
_register_types()
