"""What the Triton kernels take on a GPU by the compiler's account, found without one.

    python benchmarks/triton_resources.py        # writes results/triton_resources_3.9.csv, by Triton's version

Each operation is called at a shape of a real model for each tile of its tables, with the launch recorded in place of
run; what was recorded is compiled for sm_80 (A100) and sm_90 (H100) by the ptxas that ships with Triton. A stack means
spilled registers; ``mma`` is the tensor core instruction that the products became.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from psykern.kernels import Routes, Segments

BACKEND = "psykern.kernels.triton"
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}  # that one program may have
_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel with the arguments that an operation launched it with."""

    kernel: Any
    arguments: dict[str, Any]  # by parameter
    options: dict[str, int]  # num_warps, num_stages


@dataclass(frozen=True, slots=True)
class Resources:
    registers: int  # of a thread
    stack_bytes: int  # of a thread, spilled
    shared_bytes: int  # of a program
    mma: str  # "wgmma", "mma" or ""


@dataclass(frozen=True, slots=True)
class Case:
    op: str
    config: str
    call: Callable[[], object]


class _Recorder:
    """Stands for a kernel and keeps its launches."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: object) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            options = {n: kwargs.pop(n) for n in ("num_warps", "num_stages") if n in kwargs}
            names = self.kernel.arg_names
            self.launches.append(Launch(self.kernel, dict(zip(names, args, strict=False)) | kwargs, options))

        return launch


@contextmanager
def recording(hopper: bool) -> Iterator[list[Launch]]:
    """Launches of all kernels, as on a Hopper GPU or on an older one."""
    launches: list[Launch] = []
    with ExitStack() as stack:
        for name in ("option_logprobs", "prefix_attention", "elementwise", "experts"):
            module = importlib.import_module(f"{BACKEND}.{name}")
            for kernel in [n for n in vars(module) if n.endswith("_kernel")]:
                stack.enter_context(patch.object(module, kernel, _Recorder(getattr(module, kernel), launches)))
            if hasattr(module, "is_hopper"):
                stack.enter_context(patch.object(module, "is_hopper", lambda device: hopper))
        yield launches


def build(launch: Launch, arch: int) -> Any:
    """What Triton makes of ``launch`` for sm_``arch``."""
    source = ASTSource(launch.kernel, *_specialized(launch.kernel, launch.arguments))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
        return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(launch.options))


def resources(launch: Launch, arch: int) -> Resources:
    """Compiles ``launch`` for sm_``arch``."""
    compiled = build(launch, arch)
    ptx = compiled.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))  # type: ignore[index]
    mma = "wgmma" if "wgmma.mma_async" in ptx else "mma" if "mma.sync" in ptx else ""
    return Resources(registers, stack, compiled.metadata.shared, mma)


def _specialized(kernel: Any, arguments: dict[str, Any]) -> tuple[dict[str, str], dict[str, Any], dict[Any, Any]]:
    """Signature, constants and attributes, as Triton's launcher makes them: 1 and None are constants, and a pointer or
    a number that 16 divides is known to be so, where the kernel does not forbid it."""
    signature, constants, attributes = {}, {}, {}
    for i, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
        value, is_special = arguments[name], not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (is_special and type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, TensorDescriptor):
            signature[name] = f"tensordesc<{_TYPES[value.base.dtype]}{value.block_shape}>".replace(" ", "")
        else:
            is_tensor = isinstance(value, Tensor)
            signature[name] = f"*{_TYPES[value.dtype]}" if is_tensor else "fp32" if type(value) is float else "i32"
            is_aligned = is_special and not parameter.do_not_specialize_on_alignment
            if is_aligned and (is_tensor or (type(value) is int and value % 16 == 0)):
                attributes[(i,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def cases(dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16, torch.float32)) -> Iterator[Case]:
    """Each tile of the tables, in each of ``dtypes``."""
    for dtype in dtypes:
        for rows in (16, 64, 1024):
            for vocabulary, size in ((151_936, 2048), (151_936, 896), (50_281, 2045)):
                config = f"R{rows}-V{vocabulary}-D{size}-{_TYPES[dtype]}"
                yield Case("option_logprobs", config, _option_logprobs(rows, vocabulary, size, dtype))
        for rows in (512, 16_384):
            for size, inner in ((2048, 768), (2045, 770)):  # of Qwen3-30B-A3B, and odd
                config = f"N{rows}-D{size}-F{inner}-{_TYPES[dtype]}"
                yield Case("experts", config, _experts(rows, size, inner, dtype))
        for head in (64, 80, 96, 128, 256):
            for window in (None, 512):
                config = f"Dh{head}-{'full' if window is None else 'window'}-{_TYPES[dtype]}"
                yield Case("prefix_attention", config, _prefix_attention(head, window, dtype))
        for size in (896, 2048, 5120):
            for norm_first in (False, True):
                config = f"D{size}-{'norm' if norm_first else 'add'}-first-{_TYPES[dtype]}"
                yield Case("add_rms_norm", config, _add_rms_norm(size, norm_first, dtype))
        for norm in ("none", "head", "projection"):
            for heads, head in ((14, 64), (40, 128)):
                yield Case("qk_norm_rope", f"H{heads}-Dh{head}-{norm}-{_TYPES[dtype]}", _rope(heads, head, norm, dtype))
        yield Case("silu_mul", f"F4864-{_TYPES[dtype]}", _silu_mul(4864, dtype))


def _op(name: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(BACKEND), name)


def _option_logprobs(rows: int, vocabulary: int, size: int, dtype: torch.dtype) -> Callable[[], object]:
    def call() -> object:
        hidden, weight = torch.empty(rows, size, dtype=dtype), torch.empty(vocabulary, size, dtype=dtype)
        return _op("option_logprobs")(hidden, weight, torch.arange(rows + 1), torch.zeros(rows, dtype=torch.int32))

    return call


def _experts(rows: int, size: int, inner: int, dtype: torch.dtype) -> Callable[[], object]:
    """The three operations of 128 experts, 8 of a row."""

    def call() -> object:
        routes = Routes.of(torch.arange(8 * rows).view(rows, 8) % 128, 128)
        gates = torch.empty(1, inner, size, dtype=dtype).expand(128, -1, -1)
        x, products = torch.empty(rows, size, dtype=dtype), torch.empty(8 * rows, inner, dtype=dtype)
        _op("expert_swiglu")(x, gates, gates, routes, products)
        downs = torch.empty(1, size, inner, dtype=dtype).expand(128, -1, -1)
        each = torch.empty(1, size, dtype=dtype).expand(8 * rows, -1)
        _op("expert_linear")(products, downs, routes, each)
        return _op("add_weighted")(each, torch.empty(rows, 8), x)

    return call


def _prefix_attention(head: int, window: int | None, dtype: torch.dtype) -> Callable[[], object]:
    def call() -> object:
        q, k = torch.empty(256, 14, head, dtype=dtype), torch.empty(256, 2, head, dtype=dtype)
        ends = torch.tensor([0, 256], dtype=torch.int32)
        places, ranges = torch.arange(256, dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
        segments = Segments(places, ends, ranges, ends[None])
        return _op("prefix_attention")(q, k, k, segments, head**-0.5, window, q)

    return call


def _add_rms_norm(size: int, norm_first: bool, dtype: torch.dtype) -> Callable[[], object]:
    def call() -> object:
        x = torch.empty(32, size, dtype=dtype)
        return _op("add_rms_norm")(x, x, x[0], 1e-6, norm_first, x, x)

    return call


def _rope(heads: int, head: int, norm: str, dtype: torch.dtype) -> Callable[[], object]:
    def call() -> object:
        x, table = torch.empty(32, heads, head, dtype=dtype), torch.empty(64, head // 2)
        weight = {"none": None, "head": x[0, 0], "projection": x[0].flatten()}[norm]
        return _op("qk_norm_rope")(x, weight, table, table, torch.arange(32, dtype=torch.int32), 1e-6, x)

    return call


def _silu_mul(size: int, dtype: torch.dtype) -> Callable[[], object]:
    def call() -> object:
        x = torch.empty(32, size, dtype=dtype)
        return _op("silu_mul")(x, x, x)

    return call


def compiled(case: Case, arch: int) -> Iterator[tuple[Launch, Resources]]:
    with recording(hopper=arch >= 90) as launches:
        case.call()
    for launch in launches:
        yield launch, resources(launch, arch)


def main() -> None:
    from harness import write_csv

    version, rows = ".".join(triton.__version__.split(".")[:2]), []
    for case in cases():
        for arch in SHARED_BYTES:
            for launch, took in compiled(case, arch):
                row = {
                    "op": case.op,
                    "config": case.config,
                    "arch": f"sm_{arch}",
                    "kernel": launch.kernel.__name__,
                    "blocks": " ".join(f"{n}={v}" for n, v in launch.arguments.items() if n.startswith("BLOCK_")),
                    "warps": launch.options.get("num_warps", 4),
                    "stages": launch.options.get("num_stages", 3),
                    "registers": took.registers,
                    "stack_bytes": took.stack_bytes,
                    "shared_bytes": took.shared_bytes,
                    "mma": took.mma,
                    "triton": triton.__version__,
                }
                rows.append(row)
                print(*row.values(), flush=True)
    print(write_csv(f"triton_resources_{version}.csv", rows))


if __name__ == "__main__":
    main()
