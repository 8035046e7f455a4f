"""The operations where torch traces, as a backend of their own: each function takes what a backend's takes, and calls
the operator of :mod:`psykern.kernels.torch_ops` with the arrays of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from psykern.core.settings import Backend
from psykern.kernels.routes import Routes
from psykern.kernels.segments import Segments

_Layer = tuple[Tensor, Tensor | None]


def linear(x: Tensor, layers: Sequence[_Layer], outs: Sequence[Tensor], add: bool, *, backend: Backend) -> None:
    weights, biases = [weight for weight, _ in layers], [bias for _, bias in layers]
    torch.ops.psykern.linear(x, weights, biases, list(outs), add, backend)


def swiglu(x: Tensor, gate: _Layer, up: _Layer, out: Tensor, *, backend: Backend) -> None:
    torch.ops.psykern.swiglu(x, *gate, *up, out, backend)


def expert_swiglu(
    x: Tensor, gates: Sequence[Tensor], ups: Sequence[Tensor], routes: Routes, out: Tensor, *, backend: Backend
) -> None:
    arrays = (routes.slots, routes.offsets, routes.top_k)
    torch.ops.psykern.expert_swiglu(x, _listed(gates), _listed(ups), *arrays, out, backend)


def expert_linear(x: Tensor, weights: Sequence[Tensor], routes: Routes, out: Tensor, *, backend: Backend) -> None:
    torch.ops.psykern.expert_linear(x, _listed(weights), routes.slots, routes.offsets, routes.top_k, out, backend)


def add_weighted(x: Tensor, weights: Tensor, total: Tensor, *, backend: Backend) -> None:
    torch.ops.psykern.add_weighted(x, weights, total, backend)


def option_logprobs(
    hidden: Tensor, weight: Tensor, token_offsets: Tensor, token_ids: Tensor, *, backend: Backend
) -> Sequence[Tensor]:
    scores: Sequence[Tensor] = torch.ops.psykern.option_logprobs(hidden, weight, token_offsets, token_ids, backend)
    return scores


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    softmax_scale: float,
    window: int | None,
    out: Tensor,
    *,
    backend: Backend,
) -> Tensor:
    arrays = (segments.positions, segments.query_offsets, segments.range_offsets, segments.key_ranges)
    torch.ops.psykern.prefix_attention(q, k, v, *arrays, softmax_scale, window, out, backend)
    return out


def add_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    norm_first: bool,
    normed: Tensor,
    summed: Tensor | None,
    *,
    backend: Backend,
) -> None:
    torch.ops.psykern.add_rms_norm(x, residual, weight, eps, norm_first, normed, summed, backend)


def qk_norm_rope(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    eps: float,
    out: Tensor,
    *,
    backend: Backend,
) -> Tensor:
    torch.ops.psykern.qk_norm_rope(x, weight, cos, sin, positions, eps, out, backend)
    return out


def silu_mul(gate: Tensor, up: Tensor, out: Tensor, *, backend: Backend) -> Tensor:
    torch.ops.psykern.silu_mul(gate, up, out, backend)
    return out


def gather_rows(source: Tensor, rows: Tensor, out: Tensor, *, backend: Backend) -> Tensor:
    torch.ops.psykern.gather_rows(source, rows, out, backend)
    return out


def _listed(experts: Sequence[Tensor]) -> list[Tensor]:
    return [experts] if isinstance(experts, Tensor) else list(experts)
