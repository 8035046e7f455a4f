"""What the CUDA kernels compute, without a GPU: their own sources on emulated threads, through ``kernels/cuda.py``,
against the reference in fp64. On a GPU the tests of the operations run them as they are.

The matrix product behind option_logprobs is torch's on the CPU here. Neither speed nor what the GPU's compiler and
memory make of the sources is shown.
"""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from support.backends import assert_same_bits, short
from torch import Tensor

from psykern import kernels
from psykern.kernels import dispatch

TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 1.7e-2, torch.float16: 2.3e-3}
each_dtype = pytest.mark.parametrize("dtype", TOLERANCES, ids=short)
EPS = 1e-5


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    if shutil.which("nvcc") is None or shutil.which("g++") is None:
        pytest.skip("nvcc, whose headers this needs, or g++: not on PATH")
    cuda_on_cpu = import_module("support.cuda_on_cpu")
    return cuda_on_cpu.build(tmp_path_factory.mktemp("cuda_on_cpu"), cuda_include())


def cuda_include() -> Path:
    """The folder of CUDA's headers, from what nvcc says it would do."""
    told = subprocess.run(["nvcc", "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True, check=True)
    top = re.search(r"^#\$ TOP=(.*)$", told.stderr, re.MULTILINE)
    assert top is not None, told.stderr
    return Path(top[1]) / "include"


@pytest.fixture
def cuda(emulated: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Any:
    """psykern.kernels.cuda, whose launches run on the CPU."""
    module = import_module("psykern.kernels.cuda")
    monkeypatch.setattr(module, "_cuda", emulated)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(dispatch, "resolve", lambda backend, device: backend)
    product = torch.mm

    def widening(a: Tensor, b: Tensor, *, out: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        """On the CPU torch has no fp32 product of 16-bit matrices."""
        assert (out_dtype is None) == (a.dtype == torch.float32) and a.dtype == b.dtype and out.dtype == torch.float32
        return product(a.float(), b.float(), out=out)

    monkeypatch.setattr(torch, "mm", widening)
    return module


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def in_rows(x: Tensor, gap: int) -> Tensor:
    """``x`` with NaN between its rows; a gap of an odd size keeps rows from being read in packs."""
    wide = torch.full((x.shape[0], x[0].numel() + gap), math.nan, dtype=x.dtype)
    view = wide[:, : x[0].numel()].view(x.shape)
    return view.copy_(x)


def near(got: Tensor, truth: Tensor, tolerance: float) -> None:
    assert got.isfinite().all()
    error = (got.double() - truth.double()).abs() / truth.double().abs().clamp(min=1)
    assert error.max() <= tolerance


each_gap = pytest.mark.parametrize("gap", [8, 1], ids=["packs", "one-by-one"])


@each_dtype
@each_gap
@pytest.mark.parametrize("columns", [72, 4104, 35])
@pytest.mark.parametrize("norm_first", [False, True], ids=["add-first", "norm-first"])
def test_add_rms_norm(cuda: Any, dtype: torch.dtype, gap: int, columns: int, norm_first: bool) -> None:
    x, residual, weight = (normal(*s, dtype=dtype, seed=i) for i, s in enumerate(((3, columns),) * 2 + ((columns,),)))
    truth = kernels.add_rms_norm(
        x.double(), residual.double(), weight.double(), EPS, norm_first=norm_first, backend="reference"
    )
    x, residual, out = in_rows(x, gap), in_rows(residual, gap), in_rows(torch.full_like(x, math.nan), gap)
    got = kernels.add_rms_norm(x, residual, weight, EPS, norm_first=norm_first, summed=out, backend="cuda")
    for actual, expected in zip(got, truth, strict=True):
        near(actual, expected, TOLERANCES[dtype])
    assert got[1] is out
    swapped = kernels.add_rms_norm(
        x, residual, weight, EPS, norm_first=norm_first, normed=residual, summed=x, backend="cuda"
    )
    for actual, expected in zip(swapped, got, strict=True):
        assert_same_bits(actual, expected)


@each_dtype
@each_gap
@pytest.mark.parametrize("norm", ["none", "head", "projection"])
@pytest.mark.parametrize(("heads", "size"), [(5, 128), (40, 16), (3, 24)], ids=["5x128", "40x16", "3x24"])
def test_qk_norm_rope(cuda: Any, dtype: torch.dtype, gap: int, norm: str, heads: int, size: int) -> None:
    x, cos, sin = normal(3, heads, size, dtype=dtype), normal(9, size // 2, seed=1), normal(9, size // 2, seed=2)
    sizes = {"none": 0, "head": size, "projection": heads * size}
    weight = normal(sizes[norm], dtype=dtype, seed=3) if sizes[norm] else None
    positions = torch.tensor([8, 0, 5], dtype=torch.int32)
    wide = (x.double(), None if weight is None else weight.double(), cos, sin, positions)
    truth = kernels.qk_norm_rope(*wide, EPS, backend="reference")
    x = in_rows(x, gap)
    got = kernels.qk_norm_rope(x, weight, cos, sin, positions, EPS, backend="cuda")
    near(got, truth, 3 * TOLERANCES[dtype])
    assert_same_bits(kernels.qk_norm_rope(x, weight, cos, sin, positions, EPS, out=x, backend="cuda"), got)


@each_dtype
@each_gap
@pytest.mark.parametrize("columns", [72, 4104, 35])
def test_silu_mul(cuda: Any, dtype: torch.dtype, gap: int, columns: int) -> None:
    gate, up = normal(3, columns, dtype=dtype) * 3, normal(3, columns, dtype=dtype, seed=1)
    truth = gate.double() / (1 + torch.exp(-gate.double())) * up.double()
    gate, up = in_rows(gate, gap), in_rows(up, gap)
    near(kernels.silu_mul(gate, up, backend="cuda"), truth, TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=["fp32", "bf16", "bytes"])
@pytest.mark.parametrize("size", [1, 8, 4111])
def test_gather_rows(cuda: Any, dtype: torch.dtype, size: int) -> None:
    source = (normal(2, 7, 3, size) * 10).to(dtype)
    rows = torch.tensor([6, 0, 0, 3])
    out = torch.empty(2, 4, 3, size, dtype=dtype)
    assert kernels.gather_rows(source, rows, out=out, backend="cuda") is out
    assert_same_bits(out, source[:, rows])


PROBLEMS = {  # rows, vocabulary, hidden size; dtypes of hidden and weight; whether torch multiplies into fp32
    "fp32": (3, 1031, 16, torch.float32, torch.float32, True),
    "V-of-packs": (3, 1024, 16, torch.float32, torch.float32, True),
    "bf16": (3, 1031, 16, torch.bfloat16, torch.bfloat16, True),
    "fp16-widened": (3, 1031, 16, torch.float16, torch.float16, False),
    "mixed": (3, 1031, 16, torch.float32, torch.bfloat16, True),
    "more-than-a-tile-of-rows": (67, 70, 8, torch.float32, torch.float32, True),
    "one-token": (2, 1, 3, torch.float32, torch.float32, True),
    "no-rows": (0, 9, 3, torch.float32, torch.float32, True),
}


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
@pytest.mark.parametrize("num_chunks", ["one-chunk", "chunks"])
def test_option_logprobs(cuda: Any, problem: Any, num_chunks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, vocabulary, size, hidden_dtype, weight_dtype, multiplies = problem
    monkeypatch.setattr(cuda, "_multiplies_into_fp32", lambda: multiplies)
    monkeypatch.setattr(cuda, "_MAX_ROWS", 64)
    if num_chunks == "chunks":
        monkeypatch.setattr(cuda, "_TILE_BYTES", 4 * 64 * 300)  # the last is shorter
        monkeypatch.setattr(cuda, "_WIDENED_BYTES", 4 * size * 256)
    hidden, weight = normal(rows, size, dtype=hidden_dtype), normal(vocabulary, size, dtype=weight_dtype, seed=1)
    counts = torch.arange(rows) % 3
    offsets = torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0)))
    ids = torch.randint(vocabulary, (int(offsets[-1]),), generator=torch.Generator().manual_seed(2)).int()
    ids[-1:] = vocabulary - 1
    got = kernels.option_logprobs(hidden, weight, offsets, ids, backend="cuda")
    z = hidden.double() @ weight.double().T
    logprobs = z.log_softmax(-1)
    truth = (z.logsumexp(-1), z[torch.repeat_interleave(counts), ids.long()], -(logprobs.exp() * logprobs).sum(-1))
    if rows:
        for actual, expected in zip((got.lse, got.logits, got.entropy), truth, strict=True):
            near(actual, expected, 5e-6)
        assert torch.equal(got.argmax, z.argmax(-1))


@pytest.mark.parametrize("largest", [[5, 6], [40, 700], [299, 300], [3, 1030], [512, 513, 514]], ids=str)
def test_a_tie_goes_to_the_lowest_id(cuda: Any, largest: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a pack, between threads, warps and chunks."""
    weight = torch.randint(-3, 3, (1031, 4), generator=torch.Generator().manual_seed(0)).float()
    weight[largest] = 3.0
    inputs = (torch.tensor([[1.0, 2.0, 1.0, 3.0]]), weight, torch.tensor([0, 0]), torch.zeros(0, dtype=torch.int32))
    for tile_bytes in (2**24, 4 * 64 * 300):
        monkeypatch.setattr(cuda, "_TILE_BYTES", tile_bytes)
        assert int(kernels.option_logprobs(*inputs, backend="cuda").argmax) == largest[0]


@pytest.mark.parametrize("token", [0, 299, 1030])
def test_a_weight_that_is_nan_shows(cuda: Any, token: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_TILE_BYTES", 4 * 64 * 300)
    weight = normal(1031, 16, seed=1)
    weight[token, 3] = math.nan
    got = kernels.option_logprobs(
        normal(2, 16), weight, torch.tensor([0, 0, 0]), torch.zeros(0, dtype=torch.int32), backend="cuda"
    )
    assert got.lse.isnan().all() and got.entropy.isnan().all()


@pytest.mark.parametrize("rows", [1, 64, 65, 300, 10_000])
@pytest.mark.parametrize("size", [0, 896, 8192])
def test_a_tile_of_logits_stays_in_the_cache_and_the_memory_small(rows: int, size: int) -> None:
    cuda = pytest.importorskip("psykern.kernels.cuda", reason="psykern._cuda: not built")
    height, width = cuda._tile_shape(rows, 151_936, size)
    assert height >= min(rows, 512) and height % 64 == 0 and width >= 1024
    tile, widened = 4 * height * width, 4 * width * size
    assert tile <= 24e6 and tile + widened + 4 * height * size <= 100e6
