"""The operations of a mixture of experts against a loop over rows and their experts in fp64, and on the CPU their bits
against ``swiglu`` and ``linear`` of each expert alone."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.backends import Place, assert_same_bits, check, each_place, poisoned_memory, short
from torch import Tensor
from torch.nn import functional

from psykern import kernels
from psykern.kernels.routes import Routes

ROWS, TOP_K, EXPERTS, K, F = 13, 3, 7, 20, 9
# Of numbers of about 1: fp32 sums of 20 terms; a rounded result, and where a backend has them rounded factors.
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 2**-5, torch.float16: 2**-8}
each_dtype = pytest.mark.parametrize("dtype", TOLERANCES, ids=short)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weights_of(experts: int, columns: int, depth: int, dtype: torch.dtype, seed: int) -> Tensor:
    return (normal(experts, columns, depth, seed=seed) / depth**0.5).to(dtype)


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


def routed(place: Place, experts: Tensor, num_experts: int = EXPERTS) -> Routes:
    return Routes.of(place.put(experts)[0], num_experts)


# --- numbers


@each_place
@each_dtype
def test_expert_swiglu_equals_a_loop_over_slots(place: Place, dtype: torch.dtype, experts: Tensor) -> None:
    x = normal(ROWS, K, dtype=dtype)
    gates, ups = (weights_of(EXPERTS, F, K, dtype, seed) for seed in (1, 2))
    flat = experts.flatten().tolist()
    truth = torch.empty(len(flat), F, dtype=torch.float64)
    for i, slot in enumerate(sorted(range(len(flat)), key=lambda slot: (flat[slot], slot))):
        row, e = x[slot // TOP_K].double(), flat[slot]
        truth[i] = functional.silu(gates[e].double() @ row) * (ups[e].double() @ row)

    def run(place: Place) -> list[Tensor]:
        arguments = (*place.put(x, gates, ups), routed(place, experts))
        return [kernels.expert_swiglu(*arguments, backend=place.backend)]

    assert check(place, run, [truth], TOLERANCES[dtype])[0].dtype == dtype


@each_place
@each_dtype
def test_expert_linear_equals_a_loop_over_slots(place: Place, dtype: torch.dtype, experts: Tensor) -> None:
    x, weights = normal(ROWS * TOP_K, K, dtype=dtype), weights_of(EXPERTS, F, K, dtype, 1)
    flat = experts.flatten().tolist()
    truth = torch.empty(len(flat), F, dtype=torch.float64)
    for i, slot in enumerate(sorted(range(len(flat)), key=lambda slot: (flat[slot], slot))):
        truth[slot] = weights[flat[slot]].double() @ x[i].double()

    def run(place: Place) -> list[Tensor]:
        return [kernels.expert_linear(*place.put(x, weights), routed(place, experts), backend=place.backend)]

    assert check(place, run, [truth], TOLERANCES[dtype])[0].dtype == dtype


@each_place
@each_dtype
@pytest.mark.parametrize(("rows", "top_k", "size"), [(0, 2, 8), (1, 1, 1), (5, 3, 35), (9, 8, 300)])
def test_add_weighted_equals_fp64(place: Place, dtype: torch.dtype, rows: int, top_k: int, size: int) -> None:
    x, total = normal(rows * top_k, size, dtype=dtype), normal(rows, size, dtype=dtype, seed=1)
    weights = normal(rows, top_k, seed=2)
    truth = total.double() + torch.einsum("nj,njd->nd", weights.double(), x.double().view(rows, top_k, size))

    def run(place: Place) -> list[Tensor]:
        held, here, by = place.put(total, x, weights)
        got = kernels.add_weighted(here, by, held, backend=place.backend)
        assert got is held
        return [got]

    check(place, run, [truth], {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype])


@each_place
@each_dtype
def test_without_rows_nothing_happens(place: Place, dtype: torch.dtype) -> None:
    routes = routed(place, torch.zeros(0, 2, dtype=torch.int64), 3)
    x, weights = place.put(normal(0, 5, dtype=dtype), normal(3, 4, 5, dtype=dtype))
    assert kernels.expert_swiglu(x, weights, weights, routes, backend=place.backend).shape == (0, 4)
    assert kernels.expert_linear(x, weights, routes, backend=place.backend).shape == (0, 4)


@each_place
def test_weights_of_an_expert_without_rows_do_not_matter(place: Place, experts: Tensor) -> None:
    x = normal(ROWS, K)
    weights = weights_of(EXPERTS, F, K, torch.float32, 1)
    weights[[2, 6]] = torch.nan
    here, by = place.put(x, weights)
    routes = routed(place, experts)
    with poisoned_memory():
        inner = kernels.expert_swiglu(here, by, by, routes, backend=place.backend)
        back = kernels.expert_linear(inner, by.transpose(1, 2).contiguous(), routes, backend=place.backend)
    assert inner.isfinite().all() and back.isfinite().all()


# --- bits of the C++ backend

company = settings(
    deadline=None, max_examples=12, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
sizes = st.sampled_from([1, 16, 33, 70, 300, 600])


@st.composite
def routings(draw: st.DrawFn) -> tuple[Tensor, int]:
    """[N, k] experts, and their number: from no row to several blocks of one expert."""
    num_experts = draw(st.integers(1, 6), label="experts")
    top_k = draw(st.integers(1, num_experts), label="k")
    rows = draw(st.sampled_from([0, 1, 2, 13, 50, 410]), label="rows")
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9), label="seed"))
    liked = torch.rand(num_experts, generator=generator) ** draw(st.sampled_from([0, 8]), label="unevenness")
    return torch.multinomial((liked + 1e-6).expand(max(rows, 1), -1), top_k, generator=generator)[:rows], num_experts


@each_dtype
@company
@given(data=st.data())
def test_a_row_has_the_bits_of_its_expert_alone(
    dtype: torch.dtype, instruction_set: str, threads: Callable[[int], None], data: st.DataObject
) -> None:
    """Those of ``swiglu`` and ``linear``, on any number of threads."""
    experts, num_experts = data.draw(routings(), label="routing")
    depth, columns = data.draw(sizes, label="K"), data.draw(sizes, label="columns")
    stored = data.draw(st.sampled_from(list(TOLERANCES)), label="weights")
    routes, x = Routes.of(experts, num_experts), normal(len(experts), depth, dtype=dtype)
    gates, ups, downs = (weights_of(num_experts, columns, depth, stored, seed) for seed in (1, 2, 3))
    sorted_x = x[routes.slots.long() // routes.top_k]
    threads(data.draw(st.integers(1, 5), label="threads"))
    with poisoned_memory():
        inner = kernels.expert_swiglu(x, gates.unbind(), ups, routes, backend="cpu")
        back = kernels.expert_linear(sorted_x, downs.unbind(), routes, backend="cpu")
    in_order = back[routes.slots.long()]
    for e, (first, last) in enumerate(pairwise(routes.offsets.tolist())):
        rows, out = sorted_x[first:last], torch.empty(last - first, columns, dtype=dtype)
        assert_same_bits(inner[first:last], kernels.swiglu(rows, (gates[e], None), (ups[e], None), backend="cpu"))
        assert_same_bits(in_order[first:last], kernels.linear(rows, [(downs[e], None)], [out], backend="cpu")[0])


@each_dtype
def test_weights_are_read_where_a_file_has_them(dtype: torch.dtype, experts: Tensor, instruction_set: str) -> None:
    """In turn at each 8 bytes, as slices of gate and up in one, and transposed; all the same bits."""
    x, routes = normal(ROWS, K, dtype=dtype), Routes.of(experts, EXPERTS)
    both = weights_of(EXPERTS, 2 * F, K, dtype, 1)
    gates, ups = both[:, :F], both[:, F:]
    expected = kernels.expert_swiglu(x, list(gates.contiguous()), list(ups.contiguous()), routes, backend="cpu")
    assert_same_bits(kernels.expert_swiglu(x, gates, ups, routes, backend="cpu"), expected)
    columns_first = both.transpose(1, 2).contiguous().transpose(1, 2)
    assert_same_bits(
        kernels.expert_swiglu(x, columns_first[:, :F], columns_first[:, F:], routes, backend="cpu"), expected
    )
    memory = bytearray(64 + both[0].numel() * both.element_size() * EXPERTS)
    size = F * K * both.element_size() // 8 * 8 + 8
    mapped = [
        torch.frombuffer(memory, dtype=dtype, count=F * K, offset=e * size).view(F, K).copy_(gate)
        for e, gate in enumerate(gates)
    ]
    assert_same_bits(kernels.expert_swiglu(x, mapped, ups, routes, backend="cpu"), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_an_out_that_shares_memory_with_x_is_refused_on_the_cpu(dtype: torch.dtype) -> None:
    memory, weights = torch.ones(9, 4, dtype=dtype), torch.ones(2, 4, 4, dtype=dtype)
    routes = Routes.of(torch.tensor([[0], [1], [0]]), 2)
    with pytest.raises(ValueError, match="out: expected an array apart from x, got one that shares memory with it"):
        kernels.expert_swiglu(memory[:3], weights, weights, routes, out=memory[2:5], backend="cpu")
    with pytest.raises(ValueError, match="out: expected an array apart from x, got one that shares memory with it"):
        kernels.expert_linear(memory[2:5], weights, routes, out=memory[:3], backend="cpu")
    kernels.expert_linear(memory[:3], weights, routes, out=memory[3:6], backend="cpu")  # side by side is apart
    assert (memory == torch.tensor([1.0] * 3 + [4.0] * 3 + [1.0] * 3)[:, None]).all()
