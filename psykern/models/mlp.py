"""The gated feed-forward part, SwiGLU: ``(silu(x Wg) * (x Wu)) Wd``. Source: Shazeer 2020, arXiv 2002.05202."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from psykern import kernels
from psykern.core.settings import Backend
from psykern.models.batch import Scratch
from psykern.models.fields import Fields
from psykern.models.parts import Flops, Fused, Linear, Shapes, linear_shapes


@dataclass(frozen=True, slots=True)
class MlpSpec:
    hidden_size: int
    intermediate_size: int
    has_bias: bool

    @classmethod
    def of(cls, c: Fields, *, has_bias: bool = False) -> MlpSpec:
        sizes = c.positive("hidden_size"), c.positive("intermediate_size")
        check_activation(c)
        return cls(*sizes, has_bias)

    @property
    def spread(self) -> float:
        """All rows of a batch are rows of each product."""
        return 1.0

    @property
    def scratch(self) -> int:
        """Numbers per row: gate and up."""
        return 2 * self.intermediate_size

    @property
    def most_memory(self) -> int:
        """Numbers per row at most, with what kernels may take for themselves."""
        return 3 * self.intermediate_size

    def tensors(self) -> Shapes:
        return {
            **linear_shapes("mlp.gate_proj", self.intermediate_size, self.hidden_size, self.has_bias),
            **linear_shapes("mlp.up_proj", self.intermediate_size, self.hidden_size, self.has_bias),
            **linear_shapes("mlp.down_proj", self.hidden_size, self.intermediate_size, self.has_bias),
        }

    def fused(self) -> Fused:
        return {"mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj")}

    def flops(self) -> Flops:
        return Flops(per_query=2 * 3 * self.hidden_size * self.intermediate_size)

    def part(self, tensors: Mapping[str, Tensor], backend: Backend) -> Mlp:
        """With a layer's weights."""
        return Mlp(
            spec=self,
            gate=Linear.of(tensors, "mlp.gate_proj"),
            up=Linear.of(tensors, "mlp.up_proj"),
            down=Linear.of(tensors, "mlp.down_proj"),
            gate_up=Linear.find(tensors, "mlp.gate_up_proj"),
            backend=backend,
        )


@dataclass(frozen=True, slots=True, eq=False)
class Mlp:
    """One layer's feed-forward part; see the module. Both ways to call it write to ``scratch.ffn`` too."""

    spec: MlpSpec
    gate: Linear
    up: Linear
    down: Linear
    gate_up: Linear | None  # one product for both; None: ``kernels.swiglu`` of the two
    backend: Backend

    def __call__(self, x: Tensor, scratch: Scratch) -> Tensor:
        """Of x [m, D], which must not stand in ``scratch.normed``: there the result [m, D] is written."""
        normed = scratch.normed[: x.shape[0]]
        return kernels.linear(self._inner(x, scratch), (self.down,), (normed,), backend=self.backend)[0]

    def add(self, x: Tensor, total: Tensor, scratch: Scratch) -> None:
        """Of x [m, D], added to ``total`` [m, D] by the last product itself."""
        kernels.linear(self._inner(x, scratch), (self.down,), (total,), add=True, backend=self.backend)

    def _inner(self, x: Tensor, scratch: Scratch) -> Tensor:
        """[m, F] what the last product takes, in ``scratch.ffn``."""
        m, columns = x.shape[0], self.spec.intermediate_size
        if self.gate_up is None:
            inner = scratch.ffn[: m * columns].view(m, columns)
            return kernels.swiglu(x, self.gate, self.up, out=inner, backend=self.backend)
        both = scratch.ffn[: 2 * m * columns].view(m, 2 * columns)
        gate, up = kernels.linear(x, (self.gate_up,), (both,), backend=self.backend)[0].chunk(2, dim=1)
        return kernels.silu_mul(gate, up, out=gate, backend=self.backend)


def check_activation(c: Fields) -> None:
    """Raises ``CheckpointError`` for another function than SwiGLU's own."""
    if (act := c.get("hidden_act")) not in ("silu", "swish"):  # two names of one function
        raise c.error(f"hidden_act: expected 'silu', got {act!r}")
