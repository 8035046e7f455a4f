"""A mixture of experts: each row goes through the few of many SwiGLUs that a router picks for it.

p = softmax(x Wr)                                # fp32, over all experts
y = sum over the k largest of p_e * swiglu_e(x)  # p_e divided by their sum where the model says so

No expert has a capacity: every row is computed by all of its k experts, as rows of one matrix product each.
Source: Shazeer et al. 2017, arXiv 1701.06538; Qwen3, arXiv 2505.09388.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from psykern import kernels
from psykern.core.settings import Backend
from psykern.kernels.routes import Routes
from psykern.models.batch import Scratch
from psykern.models.fields import Fields
from psykern.models.mlp import check_activation
from psykern.models.parts import Flops, Fused, Shapes

_PRODUCTS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class ExpertsSpec:
    hidden_size: int
    intermediate_size: int  # of one expert
    num_experts: int
    top_k: int  # experts of a row
    is_normalised: bool  # the weights of a row's experts are divided by their sum

    @classmethod
    def of(cls, c: Fields, *, is_normalised: bool) -> ExpertsSpec:
        check_activation(c)
        num_experts, top_k = _num_experts(c), c.positive("num_experts_per_tok")
        if top_k > num_experts:
            raise c.error(f"num_experts_per_tok: expected at most num_experts, {num_experts}, got {top_k}")
        return cls(c.positive("hidden_size"), c.positive("moe_intermediate_size"), num_experts, top_k, is_normalised)

    @property
    def spread(self) -> float:
        """Over so many products the rows of a batch are spread: each has one in so many of them."""
        return self.num_experts / self.top_k

    @property
    def scratch(self) -> int:
        """Numbers per row: what the last products of its experts take, and what they give."""
        return self.top_k * (self.intermediate_size + self.hidden_size)

    @property
    def most_memory(self) -> int:
        """Numbers per row at most, with what routing and kernels may take for themselves."""
        return 2 * self.scratch + 4 * self.num_experts

    def tensors(self) -> Shapes:
        shapes: Shapes = {"mlp.gate.weight": (self.num_experts, self.hidden_size)}
        inner = (self.intermediate_size, self.hidden_size)
        for product in _PRODUCTS:
            for name in self._of_experts(product):
                shapes[f"{name}.weight"] = inner[::-1] if product == "down_proj" else inner
        return shapes

    def fused(self) -> Fused:
        """The weights of all experts as one matrix, one expert's rows behind the other's."""
        return {f"mlp.experts.{product}": tuple(self._of_experts(product)) for product in _PRODUCTS}

    def flops(self) -> Flops:
        of_expert = 3 * self.hidden_size * self.intermediate_size
        return Flops(per_query=2 * (self.top_k * of_expert + self.num_experts * self.hidden_size))

    def part(self, tensors: Mapping[str, Tensor], backend: Backend) -> Experts:
        """With a layer's weights."""
        gates, ups, downs = (self._weights(tensors, product) for product in _PRODUCTS)
        return Experts(self, tensors["mlp.gate.weight"].float(), gates, ups, downs, backend)

    def _weights(self, tensors: Mapping[str, Tensor], product: str) -> Sequence[Tensor]:
        """Of all experts: one tensor [E, out, in] where they lie together."""
        together = tensors.get(f"mlp.experts.{product}.weight")
        if together is not None:
            return together.unflatten(0, (self.num_experts, -1))
        return [tensors[f"{name}.weight"] for name in self._of_experts(product)]

    def _of_experts(self, product: str) -> list[str]:
        return [f"mlp.experts.{expert}.{product}" for expert in range(self.num_experts)]


@dataclass(frozen=True, slots=True, eq=False)
class Experts:
    """One layer's mixture of experts; see the module. Both ways to call it write to ``scratch.ffn`` too."""

    spec: ExpertsSpec
    router: Tensor  # [E, D] fp32
    gates: Sequence[Tensor]  # [E] of [F, D]
    ups: Sequence[Tensor]  # [E] of [F, D]
    downs: Sequence[Tensor]  # [E] of [D, F]
    backend: Backend

    def __call__(self, x: Tensor, scratch: Scratch) -> Tensor:
        """Of x [m, D], which must not stand in ``scratch.normed``: there the result [m, D] is written."""
        total = scratch.normed[: x.shape[0]].zero_()
        self.add(x, total, scratch)
        return total

    def add(self, x: Tensor, total: Tensor, scratch: Scratch) -> None:
        """Of x [m, D], added to ``total`` [m, D]."""
        experts, weights = self._route(x)
        routes = Routes.of(experts, self.spec.num_experts)
        slots, columns = x.shape[0] * self.spec.top_k, self.spec.intermediate_size
        inner = scratch.ffn[: slots * columns].view(slots, columns)
        each = scratch.ffn[slots * columns :][: slots * x.shape[1]].view(slots, x.shape[1])
        kernels.expert_swiglu(x, self.gates, self.ups, routes, out=inner, backend=self.backend)
        kernels.expert_linear(inner, self.downs, routes, out=each, backend=self.backend)
        kernels.add_weighted(each, weights, total, backend=self.backend)

    def _route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The experts [m, k] of each row of x [m, D], and their weights [m, k] fp32."""
        logits = x.new_empty((x.shape[0], self.spec.num_experts), dtype=torch.float32)
        kernels.linear(x.float(), ((self.router, None),), (logits,), backend=self.backend)
        weights, experts = logits.softmax(dim=1).topk(self.spec.top_k, dim=1)
        if self.spec.is_normalised:
            weights = weights / weights.sum(dim=1, keepdim=True)
        return experts, weights


def _num_experts(c: Fields) -> int:
    """``num_experts``, or ``num_local_experts`` as some versions of transformers write it."""
    said = {key: c.get(key) for key in ("num_experts", "num_local_experts") if key in c.values}
    number = c.agreed(said, c.get("num_experts"))
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise c.error(f"num_experts: expected a positive integer, got {number!r:.80}")
    return number
