"""Attention with rotary positions, of grouped heads, over the paths of a token tree.

q, k, v = x Wq, x Wk, x Wv           # k and v go to the store's rows, q and k are normed and rotated
out = softmax(q k^T / sqrt(Dh)) v Wo  # over the keys that each query sees
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from psykern import kernels
from psykern.core.settings import Backend
from psykern.models.batch import Batch, LayerState, Scratch
from psykern.models.fields import Fields
from psykern.models.parts import Flops, Fused, Linear, Shapes, linear_shapes
from psykern.models.rope import Rope, read_rope

QkNorm = Literal["none", "head", "projection"]  # one weight for each head's numbers (Qwen3), or for all (OLMo)


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    qk_norm: QkNorm
    qkv_bias: bool
    o_bias: bool
    eps: float  # of the norms of queries and keys
    window: int | None  # tokens, the query's own included; None: all earlier tokens are seen
    rope: Rope

    @classmethod
    def of(
        cls,
        c: Fields,
        layer_type: str,
        *,
        qk_norm: QkNorm = "none",
        qkv_bias: bool = False,
        o_bias: bool = False,
        rope_by_type: bool = False,
    ) -> AttentionSpec:
        """Of the layers of one ``layer_type``. ``rope_by_type``: each type has a rope of its own."""
        hidden_size, num_heads = c.positive("hidden_size"), c.positive("num_attention_heads")
        num_kv_heads = c.positive("num_key_value_heads", default=num_heads)
        head_dim = c.positive("head_dim", default=hidden_size // num_heads)
        if head_dim % 2:
            raise c.error(f"head_dim: expected an even number, as pairs are rotated, got {head_dim}")
        if num_heads % num_kv_heads:
            counts = f"num_attention_heads is {num_heads} and num_key_value_heads is {num_kv_heads}"
            raise c.error(f"{counts}: expected a multiple of the latter")
        return cls(
            hidden_size=hidden_size,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            qk_norm=qk_norm,
            qkv_bias=qkv_bias,
            o_bias=o_bias,
            eps=c.number("rms_norm_eps"),
            window=c.positive("sliding_window") if layer_type == "sliding_attention" else None,
            rope=read_rope(c, layer_type, head_dim, by_type=rope_by_type),
        )

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Numbers of a row's keys, and as many of its values."""
        return self.num_kv_heads * self.head_dim

    @property
    def kv_shape(self) -> tuple[int, int]:
        """Of a row of keys, and of a row of values: (Hkv, Dh)."""
        return self.num_kv_heads, self.head_dim

    @property
    def scratch(self) -> int:
        """Numbers per row: queries, and where products are fused keys and values too."""
        return self.q_size + 2 * self.kv_size

    @property
    def most_memory(self) -> int:
        """Numbers per row at most, with what kernels may take for themselves."""
        return 3 * self.q_size

    def tensors(self) -> Shapes:
        shapes = {
            **linear_shapes("self_attn.q_proj", self.q_size, self.hidden_size, self.qkv_bias),
            **linear_shapes("self_attn.k_proj", self.kv_size, self.hidden_size, self.qkv_bias),
            **linear_shapes("self_attn.v_proj", self.kv_size, self.hidden_size, self.qkv_bias),
            **linear_shapes("self_attn.o_proj", self.hidden_size, self.q_size, self.o_bias),
        }
        if self.qk_norm != "none":
            per_head = self.qk_norm == "head"
            shapes["self_attn.q_norm.weight"] = (self.head_dim if per_head else self.q_size,)
            shapes["self_attn.k_norm.weight"] = (self.head_dim if per_head else self.kv_size,)
        return shapes

    def fused(self) -> Fused:
        """The last layer's keys and values are of all rows, its queries of few: so keys and values are one too."""
        return {
            "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "self_attn.kv_proj": ("self_attn.k_proj", "self_attn.v_proj"),
        }

    def flops(self) -> Flops:
        return Flops(
            per_row=2 * self.hidden_size * 2 * self.kv_size,
            per_query=2 * 2 * self.hidden_size * self.q_size,
            per_visible_key=2 * 2 * self.q_size,
        )

    def part(self, tensors: Mapping[str, Tensor], rotary: tuple[Tensor, Tensor], backend: Backend) -> Attention:
        """With a layer's weights. ``rotary``: cos and sin of :attr:`rope`."""
        qkv, kv = (Linear.find(tensors, f"self_attn.{name}_proj") for name in ("qkv", "kv"))
        return Attention(
            spec=self,
            q=Linear.of(tensors, "self_attn.q_proj"),
            k=Linear.of(tensors, "self_attn.k_proj"),
            v=Linear.of(tensors, "self_attn.v_proj"),
            o=Linear.of(tensors, "self_attn.o_proj"),
            fused=FusedProjections(qkv, kv) if qkv is not None and kv is not None else None,
            q_norm=tensors.get("self_attn.q_norm.weight"),
            k_norm=tensors.get("self_attn.k_norm.weight"),
            rotary=rotary,
            backend=backend,
        )


class FusedProjections(NamedTuple):
    qkv: Linear
    kv: Linear


@dataclass(frozen=True, slots=True, eq=False)
class Attention:
    """One layer's attention; see the module."""

    spec: AttentionSpec
    q: Linear
    k: Linear
    v: Linear
    o: Linear
    fused: FusedProjections | None  # None: the products of one input are one call
    q_norm: Tensor | None
    k_norm: Tensor | None
    rotary: tuple[Tensor, Tensor]  # cos and sin, [P, Dh/2] fp32
    backend: Backend

    def __call__(self, x: Tensor, asking: Tensor, state: LayerState, batch: Batch, scratch: Scratch) -> Tensor:
        """Attention of ``asking`` [m, D], the rows of x [n, D] that need an output (x itself where all do).

        Writes the keys and values of x to the batch's rows of ``state``, and the result [m, D], which it gives, to
        ``scratch.normed``, where x may stand.
        """
        q = self._store(x, state, batch, scratch)
        if q is None:
            room = _room(scratch, asking.shape[0], self.spec.q_size)
            q = kernels.linear(asking, (self.q,), (room,), backend=self.backend)[0]
        q = q.unflatten(1, (-1, self.spec.head_dim))
        self._norm_and_rotate(self.q_norm, q, batch.query_positions, out=q)
        kernels.prefix_attention(
            q,
            state.keys,
            state.values,
            batch.segments,
            softmax_scale=self.spec.head_dim**-0.5,
            window=self.spec.window,
            out=q,
            backend=self.backend,
        )
        normed = scratch.normed[: asking.shape[0]]
        return kernels.linear(q.flatten(1), (self.o,), (normed,), backend=self.backend)[0]

    def _store(self, x: Tensor, state: LayerState, batch: Batch, scratch: Scratch) -> Tensor | None:
        """Writes the keys and values of x [n, D] to the batch's rows of ``state``. Gives the queries [n, Hq * Dh], in
        ``scratch.mixer``, where they come of the same product."""
        n, kv_size = x.shape[0], self.spec.kv_size
        keys, values = (store[batch.store_row : batch.store_row + n] for store in state)
        q = None if batch.query_rows is not None else _room(scratch, n, self.spec.q_size)
        if self.fused is None:  # computed where they belong: nothing is copied
            k, v = keys.flatten(1), values.flatten(1)
            of_all, outs = ((self.k, self.v), (k, v)) if q is None else ((self.q, self.k, self.v), (q, k, v))
            kernels.linear(x, of_all, outs, backend=self.backend)
        elif q is not None:
            sizes = (self.spec.q_size, kv_size, kv_size)
            room = _room(scratch, n, sum(sizes))
            q, k, v = kernels.linear(x, (self.fused.qkv,), (room,), backend=self.backend)[0].split(sizes, dim=1)
            values.copy_(v.unflatten(1, self.spec.kv_shape))
        else:
            room = _room(scratch, n, 2 * kv_size)
            k, v = kernels.linear(x, (self.fused.kv,), (room,), backend=self.backend)[0].split(kv_size, dim=1)
            values.copy_(v.unflatten(1, self.spec.kv_shape))
        self._norm_and_rotate(self.k_norm, k.unflatten(1, self.spec.kv_shape), batch.positions, out=keys)
        return q

    def _norm_and_rotate(self, weight: Tensor | None, x: Tensor, positions: Tensor, out: Tensor) -> None:
        """x [n, H, Dh] to ``out``, which may be x."""
        kernels.qk_norm_rope(x, weight, *self.rotary, positions, self.spec.eps, out=out, backend=self.backend)


def _room(scratch: Scratch, rows: int, columns: int) -> Tensor:
    """[rows, columns] of the mixer's scratch."""
    return scratch.mixer[: rows * columns].view(rows, columns)
