"""What is special to the C++ backend: every instruction set that this machine has, any number of threads, and bindings
that refuse what would read or write outside an array. The numbers themselves are in the tests of each operation."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from support.backends import assert_same_bits, short
from torch import Tensor

from psykern import _cpu, kernels
from psykern.kernels.routes import Routes

TOLERANCE = 2e-5  # between fp32 sums in different orders


def run_all(backend: kernels.Backend) -> list[Tensor]:
    """All that is in C++ on odd sizes, with branches, a window and targets at the ends of the vocabulary."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(37, 83), torch.randn(4999, 83)
    offsets = torch.arange(0, 38 * 2, 2)
    ids = torch.tensor([0, 4998] * 37, dtype=torch.int32)
    q, k, v = torch.randn(50, 6, 24), torch.randn(70, 2, 24), torch.randn(70, 2, 24)
    # One sequence of 44 tokens behind 20 carried ones, then two branches of 3 tokens at its places 30 and 40.
    positions = torch.tensor([*range(20, 64), 30, 31, 32, 40, 41, 42], dtype=torch.int32)
    offsets_of_queries = torch.tensor([0, 44, 47, 50], dtype=torch.int32)
    range_offsets = torch.tensor([0, 1, 3, 5], dtype=torch.int32)
    ranges = torch.tensor([[0, 64], [0, 30], [64, 67], [0, 40], [67, 70]], dtype=torch.int32)
    angles = torch.arange(64)[:, None] * torch.rand(12)
    segments = kernels.Segments(positions, offsets_of_queries, range_offsets, ranges)
    attend = partial(kernels.prefix_attention, q, k, v, segments, softmax_scale=0.2, backend=backend)
    layers = [(weight[:300], torch.randn(300)), (weight[300:345], None)]
    outs = [torch.empty(37, len(part)) for part, _ in layers]
    routes, experts = Routes.of(torch.rand(37, 5).argsort()[:, :3], 5), weight[:1000].view(5, 200, 83)
    inner = kernels.expert_swiglu(hidden / 9, experts[:, :83], experts[:, 100:183], routes, backend=backend)
    back = kernels.expert_linear(hidden.repeat(3, 1), list(experts), routes, backend=backend)
    return [
        inner,
        back,
        kernels.add_weighted(back, torch.rand(37, 3), torch.randn(37, 200), backend=backend),
        *kernels.linear(hidden, layers, outs, backend=backend),
        kernels.swiglu(hidden / 9, layers[0], (weight[345:645], None), backend=backend),
        *kernels.option_logprobs(hidden, weight, offsets, ids, backend=backend),
        kernels.option_logprobs(hidden, weight.bfloat16(), offsets, ids, backend=backend).lse,
        attend(),
        attend(window=7),
        *kernels.add_rms_norm(hidden, torch.randn(37, 83), torch.randn(83), 1e-6, backend=backend),
        kernels.qk_norm_rope(q, torch.randn(24), angles.cos(), angles.sin(), positions, 1e-6, backend=backend),
        kernels.silu_mul(10 * hidden, torch.randn(37, 83), backend=backend),
    ]


def test_every_instruction_set_equals_the_reference(instruction_set: str) -> None:
    for got, expected in zip(run_all("cpu"), run_all("reference"), strict=True):
        assert torch.allclose(got.double(), expected.double(), rtol=TOLERANCE, atol=TOLERANCE), instruction_set


def test_threads_do_not_change_a_bit(instruction_set: str, threads: Callable[[int], None]) -> None:
    threads(1)
    one = run_all("cpu")
    for count in (2, 5):
        threads(count)
        for got, expected in zip(run_all("cpu"), one, strict=True):
            assert got.numpy().tobytes() == expected.numpy().tobytes(), (instruction_set, count)


FP32, BF16 = torch.float32, torch.bfloat16
each_pair = pytest.mark.parametrize(
    ("hidden_dtype", "weight_dtype"),
    [(FP32, FP32), (FP32, BF16), (BF16, BF16), (BF16, FP32)],
    ids=["fp32", "bf16-weight", "bf16", "bf16-hidden"],
)


@each_pair
@pytest.mark.parametrize("size", [200, 257, 4096])
def test_logits_round_no_more_in_a_wide_model(
    size: int, hidden_dtype: torch.dtype, weight_dtype: torch.dtype, instruction_set: str
) -> None:
    """One sum of 4,096 products in order was 1.3e-6 of the logits' spread from fp64, torch's product is 4e-7. Products
    of bf16 are exact in fp32, so there too only sums round."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(24, size).to(hidden_dtype), torch.randn(700, size).to(weight_dtype)
    ids, offsets = torch.arange(700, dtype=torch.int32).repeat(24), torch.arange(25) * 700
    logits = kernels.option_logprobs(hidden, weight, offsets, ids, backend="cpu").logits.view(24, 700)
    expected = hidden.double() @ weight.double().T
    assert (logits - expected).square().mean().sqrt() < 6e-7 * expected.std()


@each_pair
@pytest.mark.parametrize("size", [7, 530, 1040])  # one, two and three blocks of depth
def test_a_row_of_the_head_has_the_same_bits_in_any_company(
    size: int,
    hidden_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    instruction_set: str,
    threads: Callable[[int], None],
) -> None:
    """Alone, in panels that are full and that are not, in one and in two tiles of rows."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(45, size).to(hidden_dtype), (torch.randn(2115, size) / size**0.5).to(weight_dtype)
    ids = torch.tensor([2114, 0, 2047, 31] * 45, dtype=torch.int32)

    def run(first: int, last: int) -> list[Tensor]:
        offsets, wanted = 4 * torch.arange(last - first + 1), ids[: 4 * (last - first)]
        scores = kernels.option_logprobs(hidden[first:last], weight, offsets, wanted, backend="cpu")
        return [scores.lse, scores.logits.view(-1, 4), scores.argmax, scores.entropy]

    threads(2)
    together = run(0, 45)
    threads(1)
    for part in ((3, 4), (10, 27), (12, 45), (44, 45)):
        for alone, company in zip(run(*part), together, strict=True):
            assert_same_bits(alone, company[slice(*part)])


@pytest.mark.parametrize("length", [200, 300, 8192])
def test_attention_rounds_no_more_in_a_long_text(length: int, instruction_set: str) -> None:
    """One sum over 8,192 keys was 6.5e-7 from fp64, torch's attention is 6e-8; both in a mean value of 0.5."""
    torch.manual_seed(0)
    q, k, v = torch.randn(8, 2, 64), torch.randn(length, 2, 64), torch.randn(length, 2, 64) + 0.5
    positions = torch.arange(length - 8, length, dtype=torch.int32)
    bounds = torch.tensor([0, 8], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
    segments = kernels.Segments(positions, *bounds, torch.tensor([[0, length]], dtype=torch.int32))
    out = kernels.prefix_attention(q, k, v, segments, softmax_scale=0.125, backend="cpu")
    scores = torch.einsum("qhd,khd->hqk", q.double(), k.double()) * 0.125
    later = torch.arange(length)[None] > positions[:, None]
    expected = torch.einsum("hqk,khd->qhd", scores.masked_fill(later, -torch.inf).softmax(-1), v.double())
    assert (out - expected).square().mean().sqrt() < 2e-7


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_without_openmp_a_pool_of_its_own_does_the_same() -> None:
    """In a process that has not loaded torch, and so no OpenMP runtime."""
    program = f"""
import importlib.util, os
import numpy as np
spec = importlib.util.spec_from_file_location("psykern._cpu", {_cpu.__file__!r})
cpu = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cpu)
gate, up = np.random.default_rng(0).standard_normal((2, 3000, 1000), np.float32)
outputs = [np.empty_like(gate) for _ in range(3)]
for out, num_threads in zip(outputs, (1, 2, 4)):
    cpu.silu_mul(gate, up, out, num_threads=num_threads)
    assert np.array_equal(out, outputs[0]), num_threads
assert np.allclose(outputs[0], gate / (1 + np.exp(-gate)) * up, atol=1e-5)
assert "libgomp" not in open("/proc/self/maps").read()
print(len(os.listdir("/proc/self/task")))
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) == 4  # threads alive: the three of the pool, and the caller


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize("size", [1024, 1020], ids=["whole vectors", "a rest"])
def test_what_is_written_past_the_caches_has_the_same_bits(instruction_set: str, size: int, dtype: torch.dtype) -> None:
    """Of a large new array all rows at once, and in runs that are small enough to stay in the caches."""
    torch.manual_seed(0)
    rows = 6 * 2**20 // size + 7
    x, y = torch.randn(2, rows, 1024).to(dtype)[:, :, :size]
    weight, positions = torch.randn(size), torch.arange(rows, dtype=torch.int32) % 50
    angles = torch.rand(50, size // 4)
    heads = x.unflatten(1, (2, size // 2))

    def run(part: slice) -> list[Tensor]:
        outputs = list(torch.full((4, len(positions[part]), 1024), torch.nan, dtype=dtype)[:, :, :size])
        kernels.silu_mul(x[part], y[part], out=outputs[0], backend="cpu")
        kernels.add_rms_norm(x[part], None, weight, 1e-6, normed=outputs[1], backend="cpu")
        kernels.add_rms_norm(x[part], y[part], weight, 1e-6, normed=outputs[2], backend="cpu")
        out = outputs[3].unflatten(1, heads.shape[1:])
        kernels.qk_norm_rope(
            heads[part], weight, angles.cos(), angles.sin(), positions[part], 1e-6, out=out, backend="cpu"
        )
        return outputs

    parts = [run(slice(first, first + 1000)) for first in range(0, rows, 1000)]
    for whole, cut in zip(run(slice(None)), zip(*parts, strict=True), strict=True):
        assert_same_bits(whole, torch.cat(cut))


def test_an_instruction_set_that_is_not_there_is_named() -> None:
    x = np.zeros((2, 4), np.float32)
    with pytest.raises(ValueError, match="does not have 'sse9'"):
        _cpu.silu_mul(x, x, x, num_threads=1, isa="sse9")


def test_the_binding_refuses_what_is_outside_its_arrays() -> None:
    hidden, weight = np.zeros((1, 4), np.float32), np.zeros((5, 4), np.float32)
    out = [np.zeros(1, np.float32), np.zeros(1, np.float32), np.zeros(1, np.int64), np.zeros(1, np.float32)]
    offsets, ids = np.array([0, 1]), np.array([5], np.int32)
    with pytest.raises(ValueError, match="token_ids: expected 0 to 4, got 5 to 5"):
        _cpu.option_logprobs(hidden, weight, offsets, ids, *out, num_threads=1)
    with pytest.raises(ValueError, match="token_offsets"):
        _cpu.option_logprobs(hidden, weight, np.array([0, 2]), ids - 1, *out, num_threads=1)
    with pytest.raises(ValueError, match=r"weight: expected \[V, 4\] like hidden"):
        _cpu.option_logprobs(hidden, weight[:, :3].copy(), offsets, ids - 1, *out, num_threads=1)
    read_only = np.zeros((1, 4), np.float32)
    read_only.flags.writeable = False
    with pytest.raises(ValueError, match="out: expected an array to write to"):
        _cpu.silu_mul(hidden, hidden, read_only, num_threads=1)
