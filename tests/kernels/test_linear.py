"""linear and swiglu against fp64, and their bits: on the CPU a row's own do not depend on its company.

``allowed`` has the tolerance by element: 2 eps of the sum of the magnitudes of its terms. A sum of K products in fp32
is at most K / 2 eps of it off, so none is beyond that up to K = 4. Further on errors are as likely up as down: a sum in
order is off by eps K / 2 / sqrt(6) products, RMS, and what is allowed, 2 eps 0.64 K products, is six times as much.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.backends import Place, assert_same_bits, each_place, poisoned_memory, short
from torch import Tensor

from psykern import _cpu, kernels

CPU = Place("cpu", torch.device("cpu"))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
UNIT = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}  # half an ulp of 1
FASTEST = _cpu.instruction_sets()[-1]
ROUNDING_SETS = ("avx512_bf16", "amx")  # which multiply bf16, and round weights to it
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=short)
# fp16 is widened to fp32 before the call: it is among the mixes
each_arithmetic = pytest.mark.parametrize("dtype", DTYPES[:2], ids=short)
each_mix = pytest.mark.parametrize(
    ("dtype", "stored"),
    list(product(DTYPES, DTYPES)),
    ids=[f"{short(a)}-by-{short(b)}" for a, b in product(DTYPES, DTYPES)],
)

SHAPES = {  # N rows, K, columns M of each layer
    "smallest": (1, 1, (1,)),
    "few": (3, 7, (5,)),
    "a-panel-of-12-rows": (12, 32, (32,)),
    "a-row-more": (13, 33, (33,)),
    "a-panel-of-16-rows": (16, 31, (16,)),
    "17-rows": (17, 65, (17,)),
    "31-rows": (31, 64, (31,)),
    "33-rows": (33, 63, (15,)),
    "K-255": (5, 255, (48,)),
    "K-256": (5, 256, (47,)),
    "K-257": (5, 257, (49,)),
    "K-511": (5, 511, (32,)),
    "K-512": (5, 512, (32,)),
    "K-513": (5, 513, (32,)),
    "K-1100": (35, 1100, (40,)),  # several blocks in depth
    "a-block-of-rows": (192, 40, (32,)),
    "a-row-less": (191, 40, (32,)),
    "blocks-of-rows": (389, 40, (70,)),
    "chunks-of-columns": (14, 40, (256, 257, 600)),
    "layers": (37, 83, (1, 64, 15, 33)),
}
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
Shape = tuple[int, int, tuple[int, ...]]


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def problem(shape: Shape, dtype: torch.dtype, stored: torch.dtype) -> tuple[Tensor, list[kernels.Layer], list[Tensor]]:
    """x, layers whose biases are of ``stored``, none and fp32 in turn, and what may be added to."""
    rows, depth, widths = shape
    layers: list[kernels.Layer] = []
    for i, columns in enumerate(widths):
        weight = (normal(columns, depth, seed=10 + i) / depth**0.5).to(stored)
        bias = normal(columns, dtype=stored if i % 3 == 0 else torch.float32, seed=20 + i)
        layers.append((weight, None if i % 3 == 1 else bias))
    return normal(rows, depth, dtype=dtype), layers, [normal(rows, m, dtype=dtype, seed=30 + m) for m in widths]


def image(x: Tensor, layer: kernels.Layer, rounded: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """In fp64: x weight' + bias, and the sum of the terms' magnitudes. ``rounded``: what weights are rounded to."""
    weight, bias = layer[0].to(rounded or layer[0].dtype).double(), layer[1]
    added = torch.zeros(len(weight)).double() if bias is None else bias.double()
    return x.double() @ weight.T + added, x.double().abs() @ weight.abs().T + added.abs()


def allowed(truth: Tensor, magnitude: Tensor, dtype: torch.dtype, roundings: int = 1) -> Tensor:
    """As above, and half an ulp of ``dtype`` for each rounding to it; where there are several, of numbers as large as
    all terms together. Half the least fp16 is 2^-25."""
    size = truth.abs() if roundings == 1 else roundings * magnitude
    return 2 * 2**-23 * magnitude + UNIT[dtype] * size + 2**-25


def check_close(got: Tensor, truth: Tensor, tolerance: Tensor) -> None:
    assert got.shape == truth.shape
    excess = (got.cpu().double() - truth).abs() / tolerance
    assert not got.isnan().any()
    assert not truth.numel() or excess.max() <= 1, f"error {excess.max():.3g} times what is allowed"


def run_linear(place: Place, x: Tensor, layers: Sequence[kernels.Layer], outs: list[Tensor], add: bool) -> list[Tensor]:
    here = [(place.put(w)[0], None if b is None else place.put(b)[0]) for w, b in layers]
    held = place.put(*outs) if add else [torch.full_like(out, torch.nan, device=place.device) for out in outs]
    with poisoned_memory():
        got = kernels.linear(place.put(x)[0], here, held, add=add, backend=place.backend)
    assert all(one is other for one, other in zip(got, held, strict=True))
    return held


def check_linear(
    place: Place, shape: Shape, dtype: torch.dtype, stored: torch.dtype, add: bool, isa: str = FASTEST
) -> None:
    x, layers, residuals = problem(shape, dtype, stored)
    rounded = dtype if place.backend != "cpu" or (dtype == torch.bfloat16 and isa in ROUNDING_SETS) else None
    roundings = 1 if place.backend == "cpu" else 4  # the vendor's: bias, product, sum, and parts of sums on a GPU
    got = run_linear(place, x, layers, residuals, add)
    for out, layer, residual in zip(got, layers, residuals, strict=True):
        truth, magnitude = image(x, layer, rounded)
        if add:
            truth, magnitude = truth + residual.double(), magnitude + residual.double().abs()
        check_close(out, truth, allowed(truth, magnitude, dtype, roundings))


@pytest.mark.parametrize("add", [False, True], ids=["store", "add"])
@each_arithmetic
@each_shape
def test_every_instruction_set_equals_fp64(shape: Shape, dtype: torch.dtype, add: bool, instruction_set: str) -> None:
    check_linear(CPU, shape, dtype, dtype, add, instruction_set)


@each_mix
@pytest.mark.parametrize("add", [False, True], ids=["store", "add"])
def test_every_mix_of_dtypes_equals_fp64(
    dtype: torch.dtype, stored: torch.dtype, add: bool, instruction_set: str
) -> None:
    check_linear(CPU, (21, 165, (50, 33, 7)), dtype, stored, add, instruction_set)


@each_place
@each_mix
@pytest.mark.parametrize("add", [False, True], ids=["store", "add"])
def test_every_backend_is_as_near_as_its_roundings_let_it(
    place: Place, dtype: torch.dtype, stored: torch.dtype, add: bool
) -> None:
    check_linear(place, SHAPES["layers"], dtype, stored, add)


# --- swiglu


def swiglu_fp64(
    x: Tensor, gate: kernels.Layer, up: kernels.Layer, rounded: torch.dtype | None, roundings: int
) -> tuple[Tensor, Tensor]:
    """The truth, and what is allowed: silu's slope is at most 1.1; 4 ulps of fp32 for exp and the quotient; and where
    gate, up and silu are rounded too, that."""
    (g, g_size), (u, u_size) = image(x, gate, rounded), image(x, up, rounded)
    silu = g * g.sigmoid()
    truth = silu * u
    early = roundings if roundings > 1 else 0
    g_error, u_error = (2 * 2**-23 * size + early * UNIT[x.dtype] * size for size in (g_size, u_size))
    tolerance = (
        1.1 * g_error * (u.abs() + u_error)
        + silu.abs() * u_error
        + (4 * 2**-23 + (1 + early) * UNIT[x.dtype]) * (truth.abs())
    )
    return truth, tolerance + 2**-25


def check_swiglu(place: Place, shape: Shape, dtype: torch.dtype, stored: torch.dtype, isa: str = FASTEST) -> None:
    rows, depth, (columns, *_) = shape
    x, (gate, _, up), _ = problem((rows, depth, (columns,) * 3), dtype, stored)  # the two that have a bias
    rounded = dtype if place.backend != "cpu" or (dtype == torch.bfloat16 and isa in ROUNDING_SETS) else None
    truth, tolerance = swiglu_fp64(x, gate, up, rounded, roundings=1 if place.backend == "cpu" else 4)
    here = [(place.put(w)[0], None if b is None else place.put(b)[0]) for w, b in (gate, up)]
    with poisoned_memory():
        got = kernels.swiglu(place.put(x)[0], *here, backend=place.backend)
    assert got.dtype == dtype
    check_close(got, truth, tolerance)


@each_arithmetic
@each_shape
def test_swiglu_of_every_instruction_set_equals_fp64(shape: Shape, dtype: torch.dtype, instruction_set: str) -> None:
    check_swiglu(CPU, shape, dtype, dtype, instruction_set)


@each_mix
def test_swiglu_of_every_mix_of_dtypes_equals_fp64(
    dtype: torch.dtype, stored: torch.dtype, instruction_set: str
) -> None:
    check_swiglu(CPU, (21, 165, (50,)), dtype, stored, instruction_set)


@each_place
@each_mix
def test_swiglu_of_every_backend(place: Place, dtype: torch.dtype, stored: torch.dtype) -> None:
    check_swiglu(place, SHAPES["layers"], dtype, stored)


def test_swiglu_of_large_gates_is_the_line_or_zero(instruction_set: str) -> None:
    x, one = torch.tensor([[200.0], [-200.0], [3e38], [-3e38], [0.0]]), (torch.ones(1, 1), None)
    got = kernels.swiglu(x, one, (torch.zeros(1, 1), torch.ones(1)), backend="cpu")
    assert got.flatten().tolist() == [200.0, 0.0, x[2].item(), 0.0, 0.0]


# --- where arrays lie


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=short)
@each_dtype
def test_a_weight_may_begin_at_any_8_bytes_of_a_file(
    dtype: torch.dtype, stored: torch.dtype, instruction_set: str
) -> None:
    """As safetensors lays them out."""
    x, [(weight, _)], [out] = problem((20, 83, (37,)), dtype, stored)
    with poisoned_memory():
        expected = kernels.linear(x, [(weight, None)], [torch.empty_like(out)], backend="cpu")[0]
    memory = bytearray(weight.numel() * weight.element_size() + 64)
    for offset in range(0, 64, 8):
        mapped = torch.frombuffer(memory, dtype=stored, count=weight.numel(), offset=offset).view_as(weight)
        mapped.copy_(weight)
        assert_same_bits(kernels.linear(x, [(mapped, None)], [torch.empty_like(out)], backend="cpu")[0], expected)


@each_dtype
@pytest.mark.parametrize("add", [False, True], ids=["store", "add"])
def test_outs_may_be_slices_of_one_wider_array(dtype: torch.dtype, add: bool, instruction_set: str) -> None:
    """Queries, keys and values side by side; what is beside them stays as it was."""
    x, layers, residuals = problem((37, 83, (33, 16, 5)), dtype, dtype)
    expected = run_linear(CPU, x, layers, residuals, add)
    wide = torch.full((37, 60), 7.0, dtype=dtype)
    outs = [wide[:, 1:34], wide[:, 34:50], wide[:, 53:58]]
    for out, residual in zip(outs, residuals, strict=True):
        out.copy_(residual)
    kernels.linear(x, layers, outs, add=add, backend="cpu")
    for out, other in zip(outs, expected, strict=True):
        assert_same_bits(out, other)
    assert (wide[:, [0, 50, 51, 52, 58, 59]] == 7).all()


@each_place
@each_dtype
@pytest.mark.parametrize("shape", [(0, 8, (5, 3)), (3, 8, (0,)), (3, 8, (0, 5, 0)), (0, 1, (0,))], ids=str)
def test_without_rows_or_columns_nothing_happens(place: Place, dtype: torch.dtype, shape: Shape) -> None:
    check_linear(place, shape, dtype, dtype, add=False)
    check_linear(place, shape, dtype, dtype, add=True)
    check_swiglu(place, shape, dtype, dtype)


@each_arithmetic
@pytest.mark.parametrize("depth", [1, 33, 83, 513])
def test_what_a_call_leaves_in_memory_does_not_reach_the_next(
    dtype: torch.dtype, depth: int, instruction_set: str, threads: Callable[[int], None]
) -> None:
    """A thread keeps its memory; what pads a depth to whole vectors or tiles is written anew each time."""
    threads(1)
    spoilt = torch.full((64, 1100), torch.nan, dtype=dtype)
    kernels.linear(spoilt, [(spoilt, None)], [torch.empty(64, 64, dtype=dtype)], backend="cpu")
    check_linear(CPU, (21, depth, (37,)), dtype, dtype, False, instruction_set)


# --- bits

WHOLE = 410  # rows: three blocks
company = settings(
    deadline=None, max_examples=15, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
depths = st.sampled_from([1, 31, 83, 300, 600])
columns = st.sampled_from([1, 16, 33, 70, 300])
some_rows = st.one_of(
    st.integers(0, WHOLE - 1).map(lambda row: [row]),
    st.lists(st.integers(0, WHOLE - 1), min_size=1, max_size=40),  # any order, some twice
    st.builds(
        lambda first, count: list(range(first, min(first + count, WHOLE))), st.integers(0, 409), st.integers(1, WHOLE)
    ),
)


@each_arithmetic
def test_a_row_has_the_same_bits_among_the_first_1_to_50(
    dtype: torch.dtype, instruction_set: str, threads: Callable[[int], None]
) -> None:
    """Panels of every number of rows."""
    threads(1)
    x, layers, held = problem((WHOLE, 300, (33,)), dtype, dtype)
    together = run_linear(CPU, x, layers, held, add=False)[0]
    for count in range(1, 51):
        assert_same_bits(run_linear(CPU, x[:count], layers, [held[0][:count]], add=False)[0], together[:count])


@each_dtype
@company
@given(data=st.data())
def test_a_row_has_the_same_bits_in_any_company(
    dtype: torch.dtype, instruction_set: str, threads: Callable[[int], None], data: st.DataObject
) -> None:
    """Of any rows, on any number of threads, beside other layers or alone."""
    widths = tuple(data.draw(st.lists(columns, min_size=1, max_size=3), label="columns"))
    stored, add = data.draw(st.sampled_from(DTYPES), label="weights"), data.draw(st.booleans(), label="add")
    x, layers, held = problem((WHOLE, data.draw(depths, label="K"), widths), dtype, stored)
    chosen = data.draw(some_rows, label="rows")
    threads(1)
    together = run_linear(CPU, x, layers, held, add)
    threads(data.draw(st.integers(1, 5), label="threads"))
    apart = run_linear(CPU, x[chosen], layers, [out[chosen] for out in held], add)
    for i, layer in enumerate(layers):
        assert_same_bits(apart[i], together[i][chosen])
        assert_same_bits(run_linear(CPU, x[chosen], [layer], [held[i][chosen]], add)[0], apart[i])


@each_dtype
@company
@given(data=st.data())
def test_swiglu_has_the_same_bits_in_any_company(
    dtype: torch.dtype, instruction_set: str, threads: Callable[[int], None], data: st.DataObject
) -> None:
    width = data.draw(columns, label="columns")
    stored = data.draw(st.sampled_from(DTYPES), label="weights")
    x, (gate, _, up), _ = problem((WHOLE, data.draw(depths, label="K"), (width,) * 3), dtype, stored)
    chosen = data.draw(some_rows, label="rows")
    threads(1)
    together = kernels.swiglu(x, gate, up, backend="cpu")
    threads(data.draw(st.integers(1, 5), label="threads"))
    assert_same_bits(kernels.swiglu(x[chosen], gate, up, backend="cpu"), together[chosen])


@each_shape
def test_sets_that_multiply_and_add_at_once_agree_to_the_bit_in_fp32(shape: Shape) -> None:
    """All but the portable one: the order over K is the same, whatever the width of a vector."""
    sets = [name for name in _cpu.instruction_sets() if name != "portable"]
    x, layers, _ = problem(shape, torch.float32, torch.float32)
    results = []
    for name in sets:
        outs = [torch.full((len(x), len(weight)), torch.nan) for weight, _ in layers]
        parts = [
            (weight.numpy(), None if bias is None else bias.numpy(), None, None, out.numpy())
            for (weight, bias), out in zip(layers, outs, strict=True)
        ]
        _cpu.linear(x.numpy(), parts, epilogue="store", num_threads=2, isa=name)
        results.append(outs)
    for outs in results[1:]:
        for out, expected in zip(outs, results[0], strict=True):
            assert_same_bits(out, expected)
