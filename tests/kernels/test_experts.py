"""The operations of a mixture of experts against a loop over rows and their experts in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from psykern import kernels
from psykern.kernels.routes import Routes

ROWS, TOP_K, EXPERTS, K, F = 13, 3, 7, 20, 9


@pytest.fixture
def experts() -> Tensor:
    """[N, k]: expert 2 has no row, expert 5 has all."""
    generator = torch.Generator().manual_seed(0)
    others = torch.stack([torch.randperm(4, generator=generator)[: TOP_K - 1] for _ in range(ROWS)])
    others = torch.tensor([0, 1, 3, 4])[others]
    return torch.cat([others, torch.full((ROWS, 1), 5)], dim=1)


def test_routes_sort_the_slots_by_expert(experts: Tensor) -> None:
    routes = Routes.of(experts, EXPERTS)
    flat = experts.flatten().tolist()
    assert routes.slots.tolist() == sorted(range(ROWS * TOP_K), key=lambda slot: (flat[slot], slot))
    assert routes.offsets.tolist() == [sum(e < expert for e in flat) for expert in range(EXPERTS + 1)]
    assert (routes.num_rows, routes.num_experts, routes.top_k) == (ROWS, EXPERTS, TOP_K)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_experts_equal_a_loop_over_rows(backend: str, experts: Tensor) -> None:
    generator = torch.Generator().manual_seed(1)
    x, total = torch.randn(ROWS, K, generator=generator), torch.randn(ROWS, K, generator=generator)
    gate, up = torch.randn(2, EXPERTS, F, K, generator=generator)
    down = torch.randn(EXPERTS, K, F, generator=generator)
    weights = torch.rand(ROWS, TOP_K, generator=generator)
    expected = total.double().clone()
    for n in range(ROWS):
        for j, e in enumerate(experts[n].tolist()):
            row = x[n].double()
            inner = functional.silu(gate[e].double() @ row) * (up[e].double() @ row)
            expected[n] += weights[n, j].double() * (down[e].double() @ inner)
    routes = Routes.of(experts, EXPERTS)
    inner = kernels.expert_swiglu(x, gate, up.unbind(), routes, backend=backend)  # type: ignore[arg-type]
    each = kernels.expert_linear(inner, down, routes, backend=backend)  # type: ignore[arg-type]
    got = kernels.add_weighted(each, weights, total, backend=backend)  # type: ignore[arg-type]
    assert got is total
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-4)
