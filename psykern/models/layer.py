"""One layer for one batch of a wave."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from psykern import kernels
from psykern.models.config import ModelConfig

if TYPE_CHECKING:
    from psykern.models.model import Model


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """One layer's weights in the compute dtype, by their names within the layer, and its window and rotary tables."""

    config: ModelConfig
    tensors: Mapping[str, Tensor]
    window: int | None
    cos: Tensor  # [P, Dh/2] fp32
    sin: Tensor  # [P, Dh/2] fp32
    is_fused: bool  # qkv_proj, kv_proj and gate_up_proj are there, and used

    def linear(self, name: str, x: Tensor, out: Tensor) -> Tensor:
        """x [N, in] to ``out`` [N, out]."""
        weight, bias = self.tensors[f"{name}.weight"].T, self.tensors.get(f"{name}.bias")
        return torch.mm(x, weight, out=out) if bias is None else torch.addmm(bias, x, weight, out=out)

    def add_linear(self, name: str, x: Tensor, total: Tensor) -> None:
        """Adds the image of x [N, in] to ``total`` [N, out]."""
        torch.addmm(total, x, self.tensors[f"{name}.weight"].T, out=total)
        if (bias := self.tensors.get(f"{name}.bias")) is not None:
            total.add_(bias)

    def norm(self, name: str) -> Tensor:
        return self.tensors[f"{name}.weight"]


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """The rows of one batch and what their queries see. Positions and rows are on the model's device; what describes
    the segments stays on the CPU, where a kernel's tiles are planned from it."""

    positions: Tensor  # [n] int32
    store_row: int  # first of the n rows of the key/value store that are this batch's own
    query_rows: Tensor | None  # [m] int64, rows of the batch that need an output; None: all
    query_positions: Tensor  # [m] int32
    segments: kernels.Segments  # of the m queries, on the CPU; its rows are those of the store


@dataclass(frozen=True, slots=True, eq=False)
class Workspace:
    """The arrays between a layer's operations, made once for all batches of a run: a batch takes what it needs."""

    normed: Tensor  # [n, D]
    projected: Tensor  # [n * columns] queries, and where products are fused keys and values too
    inner: Tensor  # [n * 2F] gate and up

    @classmethod
    def make(cls, rows: int, model: Model) -> Workspace:
        config = model.config
        heads = config.num_heads + (2 * config.num_kv_heads if model.is_fused else 0)
        shapes = ((rows, config.hidden_size), (rows * heads * config.head_dim,), (rows * 2 * config.intermediate_size,))
        return cls(*(torch.empty(shape, dtype=model.dtype, device=model.device) for shape in shapes))

    @classmethod
    def grown(cls, work: Workspace | None, rows: int, model: Model) -> Workspace:
        """``work`` itself where it has room for ``rows``, else a new one."""
        return work if work is not None and len(work.normed) >= rows else cls.make(rows, model)

    def project(self, rows: int, columns: int) -> Tensor:
        """[rows, columns] of ``projected``."""
        return self.projected[: rows * columns].view(rows, columns)


def decoder_layer(
    layer: Layer,
    hidden: Tensor,
    keys: Tensor,
    values: Tensor,
    batch: Batch,
    out: Tensor,
    work: Workspace,
    backend: kernels.Backend,
) -> None:
    """One layer for one batch: hidden [n, D] to ``out`` [m, D], its keys and values into the store's rows.

    keys, values: [M, Hkv, Dh], the store of this layer. ``out`` is ``hidden`` itself where all rows are queries. No
    array of a batch's size is allocated.
    """
    q = _project(layer, hidden, keys, values, batch, work, backend)
    if batch.query_rows is not None:
        torch.index_select(hidden, 0, batch.query_rows, out=out)
        x = _input_norm(layer, out, work, backend)
        q = layer.linear("self_attn.q_proj", x, work.project(len(out), layer.config.num_heads * layer.config.head_dim))
    _attention(layer, q.unflatten(1, (-1, layer.config.head_dim)), out, keys, values, batch, work, backend)
    _mlp(layer, out, work, backend)


def _project(
    layer: Layer, hidden: Tensor, keys: Tensor, values: Tensor, batch: Batch, work: Workspace, backend: kernels.Backend
) -> Tensor:
    """Keys and values of hidden [n, D] into the store, and queries [n, Hq * Dh] where all rows need them.

    One product for all three where the layer is fused; else keys and values are computed where they belong, and
    nothing is copied.
    """
    n, config = len(hidden), layer.config
    own = slice(batch.store_row, batch.store_row + n)
    needs_queries = batch.query_rows is None
    queries, heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    x = _input_norm(layer, hidden, work, backend)
    if layer.is_fused:
        name, first = ("self_attn.qkv_proj", queries) if needs_queries else ("self_attn.kv_proj", 0)
        q = projected = layer.linear(name, x, work.project(n, first + 2 * heads))
        values[own].copy_(projected[:, first + heads :].unflatten(1, values.shape[1:]))
        k = projected[:, first : first + heads].unflatten(1, keys.shape[1:])
    else:
        layer.linear("self_attn.v_proj", x, values[own].flatten(1))
        k = layer.linear("self_attn.k_proj", x, keys[own].flatten(1)).view(keys[own].shape)
        q = work.project(n, queries)
        if needs_queries:
            layer.linear("self_attn.q_proj", x, q)
    _norm_and_rotate(layer, "self_attn.k_norm", k, batch.positions, keys[own], backend)
    return q[:, :queries]


def _attention(
    layer: Layer,
    q: Tensor,
    hidden: Tensor,
    keys: Tensor,
    values: Tensor,
    batch: Batch,
    work: Workspace,
    backend: kernels.Backend,
) -> None:
    """hidden [m, D] plus attention of q [m, Hq, Dh], in ``hidden``; and their norm, where the MLP takes that."""
    _norm_and_rotate(layer, "self_attn.q_norm", q, batch.query_positions, q, backend)
    kernels.prefix_attention(
        q,
        keys,
        values,
        batch.segments,
        softmax_scale=layer.config.head_dim**-0.5,
        window=layer.window,
        out=q,
        backend=backend,
    )
    attended = layer.linear("self_attn.o_proj", q.flatten(1), work.normed[: len(hidden)])
    _add_norm(layer, "post_attention_layernorm", attended, hidden, backend)


def _mlp(layer: Layer, hidden: Tensor, work: Workspace, backend: kernels.Backend) -> None:
    """hidden [m, D] plus the MLP, in ``hidden``."""
    m, columns = len(hidden), layer.config.intermediate_size
    normed, inner = work.normed[:m], work.inner[: 2 * m * columns]
    x = hidden if layer.config.family.norm_after else normed
    if layer.is_fused:
        gate, up = layer.linear("mlp.gate_up_proj", x, inner.view(m, 2 * columns)).chunk(2, dim=1)
    else:
        gate, up = inner.view(2, m, columns)
        layer.linear("mlp.gate_proj", x, gate)
        layer.linear("mlp.up_proj", x, up)
    kernels.silu_mul(gate, up, out=gate, backend=backend)
    if layer.config.family.norm_after:
        _add_norm(layer, "post_feedforward_layernorm", layer.linear("mlp.down_proj", gate, normed), hidden, backend)
    else:
        layer.add_linear("mlp.down_proj", gate, hidden)


def _input_norm(layer: Layer, hidden: Tensor, work: Workspace, backend: kernels.Backend) -> Tensor:
    """What the projections of queries, keys and values take."""
    if layer.config.family.norm_after:
        return hidden
    weight, normed = layer.norm("input_layernorm"), work.normed[: len(hidden)]
    return kernels.add_rms_norm(hidden, None, weight, layer.config.rms_norm_eps, normed=normed, backend=backend)[0]


def _add_norm(layer: Layer, name: str, x: Tensor, hidden: Tensor, backend: kernels.Backend) -> None:
    """x [m, D] added to ``hidden``, and x becomes the norm of the sum; or x's norm is added (OLMo)."""
    norm_first = layer.config.family.norm_after
    kernels.add_rms_norm(
        x,
        hidden,
        layer.norm(name),
        layer.config.rms_norm_eps,
        norm_first=norm_first,
        normed=x,
        summed=hidden,
        backend=backend,
    )


def _norm_and_rotate(
    layer: Layer, name: str, x: Tensor, positions: Tensor, out: Tensor, backend: kernels.Backend
) -> None:
    """x [n, H, Dh] to ``out``, which may be x."""
    weight = layer.tensors.get(f"{name}.weight")
    kernels.qk_norm_rope(
        x, weight, layer.cos, layer.sin, positions, layer.config.rms_norm_eps, out=out, backend=backend
    )
