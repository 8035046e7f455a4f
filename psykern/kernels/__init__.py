"""The operations that no library has as psykern needs them, each as one function with a choice of backend: products
with weights, attention, the head, what is computed by element, and a gather of rows.

``reference`` is plain torch, on any device, written to be read: it is what the others are tested against. ``auto``
takes the backend that is measured fastest on the device of the inputs. A backend that is asked for by name and is not
there is an error that says how to get it. No operation changes its inputs; ``out`` arrays are written and returned.

To ``torch.compile(fullgraph=True)`` and ``torch.export`` each is one operator, ``torch.ops.psykern.NAME``, which
computes nothing while it is traced, nor of fake and meta tensors; :class:`Segments` and :class:`Routes` may be given to
what is compiled or exported, or be made in it. No operation has a derivative: where gradients are recorded an input
that requires them is a ``ValueError`` that names it; ``torch.no_grad()`` or ``x.detach()`` is what to do.

Shapes and dtypes are always checked; values (token ids, rows, positions, offsets) where they are on the CPU, for
reading them from a device would make it wait, and of an operator when it is run. :class:`Segments` are checked when
they are made, not at each call; an operator makes them again, and plans their tiles, in each call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from psykern.core.errors import BackendError as BackendError
from psykern.core.settings import Backend
from psykern.kernels import torch_ops as torch_ops  # which makes the operators
from psykern.kernels.checks import expect, expect_dtype, expect_offsets, expect_out, expect_span, out_like, span
from psykern.kernels.dispatch import operation as _op
from psykern.kernels.dispatch import resolve as resolve
from psykern.kernels.routes import Routes
from psykern.kernels.segments import Segments

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class OptionLogprobs(NamedTuple):
    """What :func:`option_logprobs` gives, all fp32 but ``argmax``."""

    lse: Tensor  # [R] log of the sum of exp over the vocabulary, nats
    logits: Tensor  # [nnz] of the gathered tokens; their log-probability is logits - lse of their row
    argmax: Tensor  # [R] int64, the token of the largest logit, the lowest id on ties
    entropy: Tensor  # [R] of the row's distribution over the vocabulary, nats


Layer = tuple[Tensor, Tensor | None]  # of a linear layer: weight [M, K] and bias [M]


def linear(
    x: Tensor, layers: Sequence[Layer], outs: Sequence[Tensor], *, add: bool = False, backend: Backend = "auto"
) -> Sequence[Tensor]:
    """The image of ``x`` [N, K] under each of ``layers``, x weightᵀ + bias, in ``outs`` [N, M], which it gives; with
    ``add`` it is added to what they hold. They have x's dtype, and none may share memory with x.

    Sums are fp32. ``cpu`` takes weights and biases of any dtype, as a file has them, and rounds weights to bf16 where x
    is bf16 and the processor multiplies bf16; its sums over K have one order, whatever N is. All others take the
    vendor's product.
    Raises ``ValueError`` for shapes or dtypes that do not fit.
    """
    expect("x", x.dim() == 2 and x.shape[1] > 0, "[N, K] with K at least 1", x)
    expect_dtype("x", x, _FLOATS)
    if not len(layers) == len(outs) > 0:
        raise ValueError(f"outs: expected one for each of {len(layers)} layers, at least one, got {len(outs)}")
    for layer, out in zip(layers, outs, strict=True):
        _expect_layer("weight", layer, x)
        expect_out("out", out, (x.shape[0], layer[0].shape[0]), x)
    _op("linear", backend, x)(x, layers, outs, add)
    return outs


def swiglu(x: Tensor, gate: Layer, up: Layer, *, out: Tensor | None = None, backend: Backend = "auto") -> Tensor:
    """silu(image of x under ``gate``) * image under ``up``: x [N, K] to [N, F], with weights [F, K] and biases [F].

    ``out`` must not share memory with x. Sums and dtypes as in :func:`linear`; between the products and the result
    nothing is rounded by ``cpu``. Source: Shazeer 2020, arXiv 2002.05202.
    """
    expect("x", x.dim() == 2 and x.shape[1] > 0, "[N, K] with K at least 1", x)
    expect_dtype("x", x, _FLOATS)
    _expect_layer("gate", gate, x)
    _expect_layer("up", up, x)
    expect("up", up[0].shape == gate[0].shape, lambda: f"{list(gate[0].shape)} like gate", up[0])
    shape = (x.shape[0], gate[0].shape[0])
    target = x.new_empty(shape) if out is None else out
    expect_out("out", target, shape, x)
    _op("swiglu", backend, x)(x, gate, up, target)
    return target


def _expect_layer(name: str, layer: Layer, x: Tensor) -> None:
    weight, bias = layer
    expect(name, weight.dim() == 2 and weight.shape[1] == x.shape[1], lambda: f"[M, {x.shape[1]}]", weight)
    expect_dtype(name, weight, _FLOATS)
    if bias is not None:
        expect(f"bias of {name}", bias.shape == weight.shape[:1], lambda: f"[{weight.shape[0]}]", bias)
        expect_dtype(f"bias of {name}", bias, _FLOATS)


Experts = Sequence[Tensor]  # the weight [M, K] of each expert, or all in one tensor [E, M, K]


def expert_swiglu(
    x: Tensor, gates: Experts, ups: Experts, routes: Routes, *, out: Tensor | None = None, backend: Backend = "auto"
) -> Tensor:
    """SwiGLU of a mixture of experts: x [N, K] to [N * k, F] by ``routes``, whose row i is of slot ``routes.slots[i]``.

    ``gates`` and ``ups``: weights [F, K] of each expert. Rows are gathered by the product itself. A row's numbers are
    those of :func:`swiglu` with its expert alone. ``triton`` and ``cuda`` take weights that are one tensor each.
    ``out`` must not share memory with x. Raises ``ValueError`` for shapes or dtypes that do not fit.
    """
    expect("x", x.dim() == 2 and x.shape[1] > 0, "[N, K] with K at least 1", x)
    expect_dtype("x", x, _FLOATS)
    expect("x", x.shape[0] == routes.num_rows, lambda: f"[{routes.num_rows}, K], as routes say", x)
    _expect_experts("gates", gates, routes, x)
    _expect_experts("ups", ups, routes, x)
    expect("ups", ups[0].shape == gates[0].shape, lambda: f"{list(gates[0].shape)} like gates", ups[0])
    shape = (routes.slots.shape[0], gates[0].shape[0])
    target = x.new_empty(shape) if out is None else out
    expect_out("out", target, shape, x)
    _op("expert_swiglu", backend, x)(x, gates, ups, routes, target)
    return target


def expert_linear(
    x: Tensor, weights: Experts, routes: Routes, *, out: Tensor | None = None, backend: Backend = "auto"
) -> Tensor:
    """Products of a mixture of experts: x [N * k, K], in the order of ``routes.slots``, to [N * k, M] in the order of
    slots, so that the k rows of one row stand side by side.

    ``weights``: [M, K] of each expert. A row's numbers are those of :func:`linear` with its expert alone; else as
    :func:`expert_swiglu`.
    """
    expect("x", x.dim() == 2 and x.shape[1] > 0, "[N * k, K] with K at least 1", x)
    expect_dtype("x", x, _FLOATS)
    expect("x", x.shape[0] == routes.slots.shape[0], lambda: f"[{routes.slots.shape[0]}, K], as routes say", x)
    _expect_experts("weights", weights, routes, x)
    shape = (x.shape[0], weights[0].shape[0])
    target = x.new_empty(shape) if out is None else out
    expect_out("out", target, shape, x)
    _op("expert_linear", backend, x)(x, weights, routes, target)
    return target


def add_weighted(x: Tensor, weights: Tensor, total: Tensor, *, backend: Backend = "auto") -> Tensor:
    """Adds to ``total`` [N, D], which it gives, the k rows of x [N * k, D] that belong to each of its rows, times
    ``weights`` [N, k] fp32: total[n] + sum over j of weights[n, j] * x[n * k + j], in fp32 and in this order, rounded
    once."""
    expect("total", total.dim() == 2, "[N, D]", total)
    expect_dtype("total", total, _FLOATS)
    expect("weights", weights.dim() == 2 and len(weights) == len(total), lambda: f"[{len(total)}, k]", weights)
    expect_dtype("weights", weights, (torch.float32,))
    expect_out("x", x, (weights.numel(), total.shape[1]), total)
    _op("add_weighted", backend, total)(x, weights, total)
    return total


def _expect_experts(name: str, experts: Experts, routes: Routes, x: Tensor) -> None:
    """One weight for each expert, all alike."""
    if len(experts) != routes.num_experts or not len(experts):
        raise ValueError(f"{name}: expected one for each of {routes.num_experts} experts, got {len(experts)}")
    first = experts[0]
    expect(name, first.dim() == 2 and first.shape[1] == x.shape[1], lambda: f"[M, {x.shape[1]}] each", first)
    expect_dtype(name, first, _FLOATS)
    if isinstance(experts, Tensor):
        return
    for weight in experts:
        expect(name, weight.shape == first.shape, lambda: f"{list(first.shape)} like the first", weight)
        expect_dtype(name, weight, (first.dtype,))


def option_logprobs(
    hidden: Tensor, weight: Tensor, token_offsets: Tensor, token_ids: Tensor, *, backend: Backend = "auto"
) -> OptionLogprobs:
    """Log-softmax over the vocabulary of ``hidden @ weight.T``, gathered, without ever holding all logits.

    hidden: [R, D]; weight: [V, D], fp32, bf16 or fp16; token_offsets: [R+1] int64 and token_ids: [nnz] int32 name the
    tokens wanted of each row (CSR, any order, duplicates allowed). Products are of the numbers as given; sums and
    logits are fp32.
    Raises ``ValueError`` for shapes or dtypes that do not fit and for ids outside the vocabulary.
    """
    expect("hidden", hidden.dim() == 2, "[R, D]", hidden)
    expect(
        "weight", weight.dim() == 2 and weight.shape[1] == hidden.shape[1], lambda: f"[V, {hidden.shape[-1]}]", weight
    )
    expect(
        "token_offsets",
        token_offsets.shape == (hidden.shape[0] + 1,),
        lambda: f"[{hidden.shape[0] + 1}]",
        token_offsets,
    )
    expect("token_ids", token_ids.dim() == 1, "[nnz]", token_ids)
    for name, tensor, dtypes in (
        ("hidden", hidden, _FLOATS),
        ("weight", weight, _FLOATS),
        ("token_offsets", token_offsets, (torch.int64,)),
        ("token_ids", token_ids, (torch.int32,)),
    ):
        expect_dtype(name, tensor, dtypes)
    expect_offsets("token_offsets", token_offsets, token_ids.shape[0])
    expect_span("token_ids", span(token_ids), weight.shape[0] - 1, "ids of the vocabulary")
    op = _op("option_logprobs", backend, hidden)
    return OptionLogprobs(*op(hidden, weight, token_offsets, token_ids))


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    *,
    softmax_scale: float,
    window: int | None = None,
    out: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Attention of queries in segments to the keys on each segment's path. Gives [N, Hq, Dh] like q.

    q: [N, Hq, Dh]; k, v: [M, Hkv, Dh] with Hq a multiple of Hkv. Key j of a segment's list is token j of its path; a
    query at position p sees keys 0..p, with ``window`` the last ``window`` of these (p - window < j <= p). The keys
    from a segment's first query on must stand in one range. q, k, v and ``out``, which may be q itself, have one dtype.
    Softmax and sums are fp32; in bf16 and fp16 its weights may be rounded for the product with v.
    Raises ``ValueError`` for shapes or dtypes that do not fit and for rows outside the store.
    """
    expect("q", q.dim() == 3, "[N, Hq, Dh]", q)
    expect("k", k.dim() == 3 and k.shape[2] == q.shape[2] and q.shape[1] % k.shape[1] == 0, "[M, Hkv, Dh] to fit q", k)
    expect("v", v.shape == k.shape, lambda: f"{list(k.shape)} like k", v)
    expect_dtype("k", k, (q.dtype,))
    expect_dtype("v", v, (q.dtype,))
    expect("positions", segments.positions.shape == q.shape[:1], lambda: f"[{q.shape[0]}]", segments.positions)
    expect_span("key_ranges", segments.key_span, k.shape[0], "rows of k")
    if not softmax_scale > 0:
        raise ValueError(f"softmax_scale: expected a number above 0, got {softmax_scale}")
    if window is not None and window < 1:
        raise ValueError(f"window: expected at least 1, got {window}")
    op = _op("prefix_attention", backend, q)
    return op(q, k, v, segments, softmax_scale, window, out_like("out", out, q))


def add_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    *,
    norm_first: bool = False,
    normed: Tensor | None = None,
    summed: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Residual add and RMSNorm: gives (normed, summed), both [N, D] like x, in the arrays of these names where given.

    As in Llama and Qwen: summed = x + residual, normed = norm(summed). With ``norm_first``, as in OLMo: normed =
    norm(x), summed = residual + normed. norm(s) = weight * s / sqrt(mean(s^2) + eps), in fp32. x, residual: [N, D]
    (None: nothing is added, and what is given for summed is x or, with ``norm_first``, normed itself); weight: [D].
    ``normed`` and ``summed`` may each be an input. Source: Zhang and Sennrich 2019, arXiv 1910.07467.
    """
    expect("x", x.dim() == 2, "[N, D]", x)
    expect("weight", weight.shape == x.shape[1:], lambda: f"[{x.shape[-1]}]", weight)
    if residual is not None:
        expect("residual", residual.shape == x.shape, lambda: f"{list(x.shape)} like x", residual)
    op = _op("add_rms_norm", backend, x)
    normed = out_like("normed", normed, x)
    if residual is None:
        op(x, None, weight, eps, norm_first, normed, None)
        return normed, normed if norm_first else x
    summed = out_like("summed", summed, x)
    op(x, residual, weight, eps, norm_first, normed, summed)
    return normed, summed


def qk_norm_rope(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    eps: float,
    *,
    out: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """RMSNorm and rotary embedding of queries or of keys, in one pass. Gives [N, H, Dh] like x.

    x: [N, H, Dh]; weight: [Dh] to normalise each head (Qwen3), [H * Dh] to normalise the whole projection (OLMo), None
    for no norm; cos, sin: [P, Dh/2] fp32 by position; positions: [N] int32. The pair (x[i], x[i + Dh/2]) is rotated by
    the angle of its position. ``out`` may be x itself. Source: Su et al. 2021, arXiv 2104.09864.
    """
    expect("x", x.dim() == 3 and x.shape[2] % 2 == 0, "[N, H, Dh] with even Dh", x)
    if weight is not None:
        sizes = (x.shape[2], x.shape[1] * x.shape[2])
        expect(
            "weight", weight.dim() == 1 and weight.shape[0] in sizes, lambda: f"[{sizes[0]}] or [{sizes[1]}]", weight
        )
    expect("cos", cos.dim() == 2 and cos.shape[1] * 2 == x.shape[2], lambda: f"[P, {x.shape[2] // 2}]", cos)
    expect("sin", sin.shape == cos.shape, lambda: f"{list(cos.shape)} like cos", sin)
    expect("positions", positions.shape == x.shape[:1], lambda: f"[{x.shape[0]}]", positions)
    expect_dtype("positions", positions, (torch.int32,))
    expect_span("positions", span(positions), cos.shape[0] - 1, "rows of cos")
    op = _op("qk_norm_rope", backend, x)
    return op(x, weight, cos, sin, positions, eps, out_like("out", out, x))


def silu_mul(gate: Tensor, up: Tensor, *, out: Tensor | None = None, backend: Backend = "auto") -> Tensor:
    """silu(gate) * up, the elementwise half of SwiGLU. gate, up: [N, F]; gives [N, F]. ``out`` may be an input.

    silu(z) = z / (1 + exp(-z)). Source: Shazeer 2020, arXiv 2002.05202.
    """
    expect("gate", gate.dim() == 2, "[N, F]", gate)
    expect("up", up.shape == gate.shape, lambda: f"{list(gate.shape)} like gate", up)
    return _op("silu_mul", backend, gate)(gate, up, out_like("out", out, gate))


def gather_rows(source: Tensor, rows: Tensor, *, out: Tensor | None = None, backend: Backend = "auto") -> Tensor:
    """Rows of each batch, ``source[:, rows]``: what a wave hands to the next.

    source: [B, M, ...] of any dtype; rows: [n] int64; gives [B, n, ...], in ``out`` where given, which is no part of
    source. Only ``cuda`` has a kernel of its own; all others take torch's ``index_select``.
    """
    expect("source", source.dim() >= 2, "[B, M, ..]", source)
    expect("rows", rows.dim() == 1, "[n]", rows)
    expect_dtype("rows", rows, (torch.int64,))
    expect_span("rows", span(rows), source.shape[1] - 1, "rows of source")
    shape = (source.shape[0], rows.shape[0], *source.shape[2:])
    target = source.new_empty(shape) if out is None else out
    expect_out("out", target, shape, source)
    return _op("gather_rows", backend, source)(source, rows, target)
