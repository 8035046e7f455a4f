"""add_rms_norm, qk_norm_rope and silu_mul against their formulas in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from support.backends import Place, check, each_place, poisoned_memory, short
from torch import Tensor

from psykern import kernels

# the reference needs about two thirds; half precision rounds the sum, the norm and the output once each
TOLERANCES = {torch.float32: 7e-7, torch.bfloat16: 1.7e-2, torch.float16: 2.3e-3}
each_dtype = pytest.mark.parametrize("dtype", TOLERANCES, ids=short)
EPS = 1e-5

SHAPES = {  # N rows, D
    "no-rows": (0, 8),
    "smallest": (1, 1),
    "odd": (3, 7),  # less than a vector register
    "D-896-of-Qwen-0.5B": (65, 896),
    "D-5120-of-OLMo-32B": (2, 5120),  # more than a block of 1024 or 4096
}
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rms_norm_fp64(x: Tensor, weight: Tensor, eps: float = EPS) -> Tensor:
    return weight.double() * x / torch.sqrt((x**2).mean(-1, keepdim=True) + eps)


# --- add_rms_norm


def add_rms_norm_fp64(x: Tensor, residual: Tensor | None, weight: Tensor, norm_first: bool) -> tuple[Tensor, Tensor]:
    added = torch.zeros_like(x).double() if residual is None else residual.double()
    if norm_first:
        normed = rms_norm_fp64(x.double(), weight)
        return normed, added + normed
    return rms_norm_fp64(x.double() + added, weight), x.double() + added


def run_norm(
    place: Place, x: Tensor, residual: Tensor | None, weight: Tensor, norm_first: bool
) -> tuple[Tensor, Tensor]:
    x, weight = place.put(x, weight)
    residual = None if residual is None else place.put(residual)[0]
    with poisoned_memory():
        normed, summed = kernels.add_rms_norm(x, residual, weight, EPS, norm_first=norm_first, backend=place.backend)
    return normed.cpu(), summed.cpu()


@each_place
@each_dtype
@each_shape
@pytest.mark.parametrize("norm_first", [False, True], ids=["add-first", "norm-first"])
@pytest.mark.parametrize("has_residual", [True, False], ids=["residual", "no-residual"])
def test_add_rms_norm_equals_fp64(
    place: Place, dtype: torch.dtype, shape: tuple[int, int], norm_first: bool, has_residual: bool
) -> None:
    x, weight = normal(*shape, dtype=dtype), normal(shape[1], dtype=dtype, seed=1)
    residual = normal(*shape, dtype=dtype, seed=2) if has_residual else None
    truth = add_rms_norm_fp64(x, residual, weight, norm_first)
    got = check(place, lambda p: run_norm(p, x, residual, weight, norm_first), truth, TOLERANCES[dtype])
    assert [t.dtype for t in got] == [dtype, dtype]


@each_place
@pytest.mark.parametrize("norm_first", [False, True], ids=["add-first", "norm-first"])
def test_eps_counts_where_rows_are_small_and_zero_rows_stay_zero(place: Place, norm_first: bool) -> None:
    x, weight = normal(3, 40) * 1e-3, normal(40, seed=1)
    x[1] = 0
    truth = add_rms_norm_fp64(x, None, weight, norm_first)
    normed, _ = check(place, lambda p: run_norm(p, x, None, weight, norm_first), truth, TOLERANCES[torch.float32])
    assert (normed[1] == 0).all()


@each_place
@pytest.mark.parametrize(
    ("dtype", "magnitude"), [(torch.float16, 400.0), (torch.bfloat16, 1e18), (torch.float32, 1e18)]
)
def test_squares_are_taken_in_fp32(place: Place, dtype: torch.dtype, magnitude: float) -> None:
    """400 squared is beyond fp16; 1e36 is within fp32."""
    x, weight = (normal(3, 40) * magnitude).to(dtype), normal(40, dtype=dtype, seed=1)
    truth = rms_norm_fp64(x.double(), weight)
    check(place, lambda p: run_norm(p, x, None, weight, False)[:1], [truth], TOLERANCES[dtype])


@each_place
@pytest.mark.parametrize("norm_first", [False, True], ids=["add-first", "norm-first"])
def test_add_rms_norm_without_residual_gives_its_input_or_norm_as_sum(place: Place, norm_first: bool) -> None:
    x, weight = place.put(normal(9, 35), normal(35, seed=1))
    normed = torch.full_like(x, math.nan)
    got = kernels.add_rms_norm(x, None, weight, EPS, norm_first=norm_first, normed=normed, backend=place.backend)
    assert got[0] is normed and got[1] is (normed if norm_first else x) and normed.isfinite().all()
    with pytest.raises(ValueError, match=r"normed: expected \[9, 35\]"):
        kernels.add_rms_norm(x, None, weight, EPS, normed=normed[:8], backend=place.backend)


# --- qk_norm_rope

ROPE_SHAPES = {  # N rows, H heads, Dh
    "no-rows": (0, 2, 8),
    "smallest": (1, 1, 2),
    "Dh-24": (5, 3, 24),  # halves of 12, which no vector register divides
    "Dh-80": (3, 2, 80),
    "14-heads-of-64": (33, 14, 64),  # Qwen2.5-0.5B
    "5-heads-of-128": (7, 5, 128),  # an odd number of heads
}
each_rope_shape = pytest.mark.parametrize("shape", ROPE_SHAPES.values(), ids=ROPE_SHAPES)
each_norm = pytest.mark.parametrize("norm", ["none", "head", "projection"])
NUM_POSITIONS = 1000


def rotary(size: int) -> tuple[Tensor, Tensor]:
    """[P, Dh/2] tables, scaled by 1.2 as yarn does, so that one that is computed anew shows."""
    angles = torch.arange(NUM_POSITIONS)[:, None] * 10_000.0 ** (-torch.arange(0, size, 2) / size)
    return angles.cos() * 1.2, angles.sin() * 1.2


RopeInputs = tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]  # x, weight, cos, sin, positions


def rope_problem(shape: tuple[int, int, int], norm: str, dtype: torch.dtype = torch.float32) -> RopeInputs:
    """Positions in no order, with repeats, and the first and last of the tables among them."""
    count, heads, size = shape
    weight = None if norm == "none" else normal(size if norm == "head" else heads * size, dtype=dtype, seed=1)
    positions = torch.randint(NUM_POSITIONS, (count,), generator=torch.Generator().manual_seed(3)).int()
    positions[:3] = torch.tensor([NUM_POSITIONS - 1, 0, NUM_POSITIONS - 1], dtype=torch.int32)[:count]
    return normal(*shape, dtype=dtype), weight, *rotary(size), positions


def qk_norm_rope_fp64(x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    """Written for one head of one row at a time."""
    half = x.shape[2] // 2
    out = torch.empty(x.shape, dtype=torch.float64)
    for n in range(x.shape[0]):
        row = x[n].double()  # [H, Dh]
        if weight is not None:
            whole = weight.shape[0] == row.numel()
            row = rms_norm_fp64(row.flatten() if whole else row, weight).view(x.shape[1:])
        c, s = cos[int(positions[n])].double(), sin[int(positions[n])].double()
        for h in range(x.shape[1]):
            low, high = row[h, :half], row[h, half:]
            out[n, h, :half] = low * c - high * s
            out[n, h, half:] = high * c + low * s
    return out


def run_rope(place: Place, inputs: RopeInputs) -> Tensor:
    weight = None if inputs[1] is None else place.put(inputs[1])[0]
    x, cos, sin, positions = place.put(inputs[0], *inputs[2:])
    with poisoned_memory():
        return kernels.qk_norm_rope(x, weight, cos, sin, positions, EPS, backend=place.backend).cpu()


@each_place
@each_dtype
@each_norm
@each_rope_shape
def test_qk_norm_rope_equals_fp64(place: Place, dtype: torch.dtype, norm: str, shape: tuple[int, int, int]) -> None:
    inputs = rope_problem(shape, norm, dtype)
    truth = qk_norm_rope_fp64(*inputs)
    (got,) = check(place, lambda p: [run_rope(p, inputs)], [truth], TOLERANCES[dtype])
    assert got.dtype == dtype


@each_place
def test_rotation_at_position_0_changes_nothing_but_the_scale(place: Place) -> None:
    x, _, cos, sin, _ = rope_problem((4, 2, 16), "none")
    got = run_rope(place, (x, None, cos / 1.2, sin / 1.2, torch.zeros(4, dtype=torch.int32)))
    torch.testing.assert_close(got, x, rtol=0, atol=1e-6)


# --- silu_mul


def silu_mul_fp64(gate: Tensor, up: Tensor) -> Tensor:
    return gate.double() / (1 + torch.exp(-gate.double())) * up.double()


def run_silu(place: Place, gate: Tensor, up: Tensor) -> Tensor:
    gate, up = place.put(gate, up)
    with poisoned_memory():
        return kernels.silu_mul(gate, up, backend=place.backend).cpu()


@each_place
@each_dtype
@each_shape
def test_silu_mul_equals_fp64(place: Place, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    gate, up = normal(*shape, dtype=dtype) * 3, normal(*shape, dtype=dtype, seed=1)
    truth = silu_mul_fp64(gate, up)
    (got,) = check(place, lambda p: [run_silu(p, gate, up)], [truth], TOLERANCES[dtype])
    assert got.dtype == dtype


@each_place
@each_dtype
def test_silu_mul_at_the_extremes(place: Place, dtype: torch.dtype) -> None:
    """exp overflows on the left; the result is 0 there and the gate itself on the right."""
    gate = torch.tensor([[-1e4, -100.0, -88.8, -30.0, -0.0, 0.0, 30.0, 88.8, 100.0, 1e4]], dtype=dtype)
    up = torch.ones_like(gate)
    got = run_silu(place, gate, up)
    assert got.isfinite().all()
    torch.testing.assert_close(got.double(), silu_mul_fp64(gate, up), rtol=1e-6, atol=TOLERANCES[dtype])


@each_place
def test_silu_mul_keeps_what_is_not_finite_in_its_place(place: Place) -> None:
    gate, up = normal(9, 33) * 3, normal(9, 33, seed=1)
    gate[4, 7], up[5, 8] = math.nan, math.inf
    assert (~run_silu(place, gate, up).isfinite()).nonzero().tolist() == [[4, 7], [5, 8]]


@each_place
@each_norm
def test_qk_norm_rope_norms_a_head_or_a_whole_projection(place: Place, norm: str) -> None:
    """NaN in one head of three reaches the others only by a norm over all of them."""
    inputs = rope_problem((2, 3, 24), norm)
    inputs[0][1, 1, 7] = math.nan
    shows = run_rope(place, inputs).isnan().any(-1).tolist()
    assert shows == [[False] * 3, [True] * 3 if norm == "projection" else [False, True, False]]
