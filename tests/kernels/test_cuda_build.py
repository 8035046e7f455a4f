"""What can be told of the CUDA kernels without a GPU: they compile for all targets without spills, the binding refuses
what cannot be, a launch that fails says whose it was.

Their numbers are in the tests of the operations, which run them where there is a GPU.
"""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from psykern import kernels

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import cuda_resources  # noqa: E402

ARCHS = {"sm_80", "sm_90a"}
SOURCES = cuda_resources.sources()
has_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc: not on PATH")
each_source = pytest.mark.parametrize("source", SOURCES, ids=lambda s: s.stem)


@pytest.fixture
def binding() -> Any:
    """``psykern._cuda``. Where nvcc is, it must be there."""
    if shutil.which("nvcc") is None:
        return pytest.importorskip("psykern._cuda", reason="psykern._cuda: not built, nvcc is not on PATH")
    import psykern._cuda

    return psykern._cuda


def spills(found: list[cuda_resources.Resources]) -> list[cuda_resources.Resources]:
    return [r for r in found if r.spill_store_bytes or r.spill_load_bytes or r.stack_bytes]


@has_nvcc
@each_source
def test_every_kernel_compiles_for_every_architecture_without_spills(source: Path) -> None:
    found = cuda_resources.kernels_of(source)
    assert spills(found) == []
    declared = set(re.findall(r"__global__[^;{]*?\b(\w+_kernel)\(", source.read_text()))
    assert declared
    by_arch = {arch: {cuda_resources.readable(r.kernel) for r in found if r.arch == arch} for arch in ARCHS}
    assert {r.arch for r in found} == ARCHS
    assert by_arch["sm_80"] == by_arch["sm_90a"]
    assert {name.partition("<")[0] for name in by_arch["sm_80"]} == declared


@has_nvcc
def test_the_recorded_figures_are_those_of_the_build() -> None:
    rows = cuda_resources.rows_by_name()
    with cuda_resources.RESULT.open() as file:
        recorded = list(csv.DictReader(file))
    if recorded[0]["nvcc"] != rows[0]["nvcc"]:
        pytest.skip(f"recorded with nvcc {recorded[0]['nvcc']}, this is {rows[0]['nvcc']}")
    assert recorded == rows, "python benchmarks/cuda_resources.py records them anew"


@has_nvcc
def test_a_kernel_that_spills_is_found(tmp_path: Path) -> None:
    """ptxas is given fewer registers than a sum of many needs; what it says then must be read as a spill."""
    loads = "\n".join(f"  float a{i} = x[{i} * n + threadIdx.x];" for i in range(64))
    total = " + ".join(f"a{i} * sinf(a{63 - i})" for i in range(64))
    source = tmp_path / "spill.cu"
    source.write_text(
        f"__global__ void spill_kernel(float* x, int n) {{\n{loads}\n  __syncthreads();\n  x[0] = {total};\n}}"
    )
    command = [
        "nvcc",
        "-arch=sm_80",
        "-maxrregcount=24",
        "-Xptxas=-v",
        "-cubin",
        "-o",
        str(tmp_path / "o"),
        str(source),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (found,) = cuda_resources.read_report(done.stderr, source.name)
    assert found.arch == "sm_80" and cuda_resources.readable(found.kernel) == "spill_kernel"
    assert spills([found]) == [found] and found.spill_store_bytes > 0


@has_nvcc
def test_the_extension_holds_ptx_for_later_gpus(binding: Any) -> None:
    code = Path(binding.__file__).read_bytes()
    assert b".target sm_90" in code or b"compute_90" in code


# --- the binding's checks. Addresses are made up: none is read, as nothing is launched, or no device is there.

ROWS = {"x": 1 << 20, "weight": 2 << 20, "stream": 0}
CALLS: dict[str, dict[str, Any]] = {
    "add_rms_norm": {
        **ROWS,
        "x_stride": 8,
        "residual": 3 << 20,
        "residual_stride": 8,
        "normed": 4 << 20,
        "normed_stride": 8,
        "summed": 5 << 20,
        "summed_stride": 8,
        "rows": 3,
        "columns": 8,
        "eps": 1e-5,
        "norm_first": False,
        "dtype": 0,
    },
    "qk_norm_rope": {
        **ROWS,
        "x_stride": 16,
        "cos": 3 << 20,
        "sin": 4 << 20,
        "positions": 5 << 20,
        "out": 6 << 20,
        "out_stride": 16,
        "rows": 3,
        "heads": 2,
        "pairs": 4,
        "eps": 1e-5,
        "norm_projection": False,
        "dtype": 1,
    },
    "silu_mul": {
        "gate": 1 << 20,
        "gate_stride": 8,
        "up": 2 << 20,
        "up_stride": 8,
        "out": 3 << 20,
        "out_stride": 8,
        "rows": 3,
        "columns": 8,
        "dtype": 2,
        "stream": 0,
    },
    "online_softmax_chunk": {
        "z": 1 << 20,
        "rows": 3,
        "width": 8,
        "first": 0,
        "token_offsets": 2 << 20,
        "token_ids": 3 << 20,
        "wanted": 4 << 20,
        "maximum": 5 << 20,
        "total": 6 << 20,
        "moment": 7 << 20,
        "best": 8 << 20,
        "stream": 0,
    },
    "finish_softmax": {
        "maximum": 1 << 20,
        "total": 2 << 20,
        "moment": 3 << 20,
        "lse": 4 << 20,
        "entropy": 5 << 20,
        "rows": 3,
        "stream": 0,
    },
    "gather_rows": {
        "source": 1 << 20,
        "rows": 2 << 20,
        "out": 3 << 20,
        "batches": 2,
        "count": 3,
        "row_bytes": 32,
        "source_batch_bytes": 320,
        "out_batch_bytes": 96,
        "stream": 0,
    },
}

WRONG: list[tuple[str, str, Any, str]] = [
    ("add_rms_norm", "dtype", 3, "dtype: expected 0 (float32), 1 (bfloat16) or 2 (float16), got 3"),
    ("add_rms_norm", "dtype", -1, "dtype: expected 0 (float32), 1 (bfloat16) or 2 (float16), got -1"),
    ("add_rms_norm", "rows", -1, "rows: expected 0 to 1073741824, got -1"),
    ("add_rms_norm", "columns", 1 << 31, "columns: expected 0 to 1073741824, got 2147483648"),
    ("add_rms_norm", "x", 0, "x: expected an address on the device, got null"),
    ("add_rms_norm", "x", (1 << 20) + 2, "x: expected an address divisible by 4, got 1048578"),
    ("add_rms_norm", "x_stride", 7, "x: expected a stride of at least 8, got 7"),
    ("add_rms_norm", "weight", 0, "weight: expected an address on the device, got null"),
    ("add_rms_norm", "normed", 0, "normed: expected an address on the device, got null"),
    ("add_rms_norm", "summed", 0, "summed: expected an address on the device, got null"),
    ("add_rms_norm", "residual", 0, "summed: expected null, as residual is, got an address"),
    ("qk_norm_rope", "dtype", 9, "dtype: expected 0 (float32), 1 (bfloat16) or 2 (float16), got 9"),
    ("qk_norm_rope", "heads", -2, "heads: expected 0 to 1073741824, got -2"),
    ("qk_norm_rope", "pairs", 1 << 30, "heads: expected heads * 2 * pairs up to 1073741824, got 4294967296"),
    ("qk_norm_rope", "x", 1, "x: expected an address divisible by 2, got 1"),
    ("qk_norm_rope", "cos", 0, "cos: expected an address on the device, got null"),
    ("qk_norm_rope", "sin", 6, "sin: expected an address divisible by 4, got 6"),
    ("qk_norm_rope", "positions", 0, "positions: expected an address on the device, got null"),
    ("qk_norm_rope", "out_stride", 15, "out: expected a stride of at least 16, got 15"),
    ("silu_mul", "columns", 65535 * 256 + 1, "columns: expected 0 to 16776960, got 16776961"),
    ("silu_mul", "gate", 0, "gate: expected an address on the device, got null"),
    ("silu_mul", "up", 0, "up: expected an address on the device, got null"),
    ("silu_mul", "out_stride", -8, "out: expected a stride of at least 8, got -8"),
    ("online_softmax_chunk", "z", 0, "z: expected an address on the device, got null"),
    ("online_softmax_chunk", "width", -1, "width: expected 0 to 1073741824, got -1"),
    ("online_softmax_chunk", "first", -1, "first: expected 0 to 1073741824, got -1"),
    ("online_softmax_chunk", "token_offsets", 0, "token_offsets: expected an address on the device, got null"),
    ("online_softmax_chunk", "best", 4, "best: expected an address divisible by 8, got 4"),
    ("finish_softmax", "moment", 0, "moment: expected an address on the device, got null"),
    ("finish_softmax", "lse", 0, "lse: expected an address on the device, got null"),
    ("gather_rows", "batches", 65536, "batches: expected 0 to 65535, got 65536"),
    ("gather_rows", "row_bytes", -1, "row_bytes: expected 0 to 1073741824, got -1"),
    ("gather_rows", "out_batch_bytes", 95, "out_batch_bytes: expected at least 96, got 95"),
    ("gather_rows", "rows", 0, "rows: expected an address on the device, got null"),
]


@pytest.mark.parametrize(("op", "name", "bad", "message"), WRONG, ids=[f"{o}-{n}-{b}" for o, n, b, _ in WRONG])
def test_the_binding_names_what_is_wrong(binding: Any, op: str, name: str, bad: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        getattr(binding, op)(**(CALLS[op] | {name: bad}))


LAUNCHES = {
    "add_rms_norm": r"add_rms_norm \[3, 8\]",
    "qk_norm_rope": r"qk_norm_rope \[3, 2, 8\]",
    "silu_mul": r"silu_mul \[3, 8\]",
    "online_softmax_chunk": r"option_logprobs: online_softmax_chunk \[3, 8\]",
    "finish_softmax": r"option_logprobs: finish_softmax \[3\]",
    "gather_rows": r"gather_rows \[2, 3, 32\]",
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="made-up addresses: only where there is no device to read them")
@pytest.mark.parametrize("op", LAUNCHES)
def test_a_launch_that_fails_says_whose_it_was(binding: Any, op: str) -> None:
    with pytest.raises(RuntimeError, match=f"^{LAUNCHES[op]}: launch failed: .+"):
        getattr(binding, op)(**CALLS[op])


@pytest.mark.parametrize("op", CALLS)
def test_nothing_is_launched_where_there_is_nothing_to_do(binding: Any, op: str) -> None:
    """Also without a device, and null is no error."""
    empty = {n: 0 if isinstance(v, int) and v >= 1 << 20 else v for n, v in CALLS[op].items()}
    getattr(binding, op)(**(empty | {"count" if op == "gather_rows" else "rows": 0}))


def test_asked_for_by_name_on_a_cpu_it_says_what_it_needs(binding: Any) -> None:
    with pytest.raises(kernels.BackendError, match="backend 'cuda' is not available on cpu: it needs a CUDA device"):
        kernels.silu_mul(torch.ones(1, 1), torch.ones(1, 1), backend="cuda")
