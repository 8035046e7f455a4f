"""The elementwise operations beside torch (on a GPU also compiled, and psykern's other backends), and beside the
machine's own bandwidth: a copy of an array as large, in the same run.

Bytes: every array read or written once, though a processor may also read the lines that it writes; a copy counts
likewise. Arrays are larger than the caches. `into` says where results go: a new array, or one of the inputs.

    python benchmarks/bench_elementwise.py [--rows 32768] [--repeats 9] [--name elementwise_cpu]
    python benchmarks/bench_elementwise.py --device cuda --name elementwise_gpu
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from harness import (
    CPU,
    add_arguments,
    available,
    compiled,
    dtype_of,
    keep_working,
    print_row,
    time_side_by_side,
    write_csv,
    write_results,
)
from torch import Tensor

from psykern import kernels

HIDDEN, INNER, HEADS, HEAD_SIZE = 1024, 3072, 16, 128  # Qwen3-0.6B
TOLERANCE = 1e-5


class Case(NamedTuple):
    arrays: int  # of the case's size, read or written
    size: int  # columns
    providers: dict[str, Callable[[], object]]


def providers(
    device: torch.device, others: Sequence[kernels.Backend], run: Callable[..., None], *arguments: object
) -> dict[str, Callable[[], object]]:
    """psykern's choice and torch; on a GPU also torch compiled, and ``others`` of psykern's backends. ``run`` takes the
    backend before ``arguments``."""
    found: dict[str, Callable[[], object]] = {
        "psykern": partial(run, "auto", *arguments),
        "torch": partial(run, "reference", *arguments),
    }
    if device.type == "cuda":
        found["torch_compiled"] = partial(compiled(run, device), "reference", *arguments)
        found |= {f"psykern:{backend}": partial(run, backend, *arguments) for backend in others}
    return found


def cases(rows: int, device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> dict[str, Case]:
    torch.manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    x, residual, normed, summed = draw(4, rows, HIDDEN)
    weight = draw(HIDDEN).abs()
    gate, inner = draw(2, rows, INNER)
    up = 1 + torch.exp(-gate)  # in place, gate stays what it is: silu(z) (1 + exp(-z)) = z
    heads, rotated = draw(2, rows, HEADS, HEAD_SIZE)
    head_weight, positions = draw(HEAD_SIZE).abs(), torch.arange(rows, dtype=torch.int32, device=device)
    angles = torch.arange(rows)[:, None] / 1e6 ** torch.linspace(0, 1, HEAD_SIZE // 2)
    cos, sin = angles.cos().float().to(device), angles.sin().float().to(device)

    def norm(backend: kernels.Backend, add: Tensor | None) -> None:
        kernels.add_rms_norm(x, add, weight, 1e-6, normed=normed, summed=summed, backend=backend)

    def rope(backend: kernels.Backend, norm_weight: Tensor | None, out: Tensor) -> None:
        kernels.qk_norm_rope(heads, norm_weight, cos, sin, positions, 1e-6, out=out, backend=backend)

    def silu(backend: kernels.Backend, out: Tensor) -> None:
        kernels.silu_mul(gate, up, out=out, backend=backend)

    others = available(("triton", "cuda"), device) if device.type == "cuda" else []
    pair = partial(providers, device, others)
    size = HEADS * HEAD_SIZE
    return {
        "rms_norm": Case(2, HIDDEN, pair(norm, None)),
        "add_rms_norm": Case(4, HIDDEN, pair(norm, residual)),
        "rope in place": Case(2, size, pair(rope, None, heads)),
        "norm and rope in place": Case(2, size, pair(rope, head_weight, heads)),
        "norm and rope": Case(2, size, pair(rope, head_weight, rotated)),
        "silu_mul in place": Case(3, INNER, pair(silu, gate)),
        "silu_mul": Case(3, INNER, pair(silu, inner)),
    }


def bench(
    name: str, case: Case, rows: int, repeats: int, device: torch.device, dtype: torch.dtype
) -> list[dict[str, object]]:
    source, target = torch.randn(2, rows, case.size, device=device).to(dtype)
    working = keep_working(case.providers, lambda name, result: None)
    timings = time_side_by_side({**working, "copy": lambda: target.copy_(source)}, repeats, 2, device)
    rates = {p: (2 if p == "copy" else case.arrays) * source.nbytes / timings[p].median / 1e9 for p in timings}
    table = []
    for provider, timing in timings.items():
        table.append(
            {
                "case": name,
                "rows": rows,
                "columns": case.size,
                "provider": provider,
                **timing.columns(),
                "gb_per_second": round(rates[provider], 1),
                "share_of_copy": round(rates[provider] / rates["copy"], 3),
            }
        )
        print_row(table[-1])
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32_768)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--name", help="CSV and PNG in results/; default: no file")
    add_arguments(parser)
    options = parser.parse_args(arguments)
    rows, device, dtype = 64 if options.quick else options.rows, options.device, dtype_of(options)
    table = []
    for name, case in cases(rows, device, dtype).items():
        table += bench(name, case, rows, options.repeats, device, dtype)
        if options.name:
            write_csv(options.name, table, options.folder, device)
    if options.name:
        drawing = {"x": "case", "y": "share_of_copy", "panel": "rows"}
        write_results(options.name, table, **drawing, folder=options.folder, device=device)


if __name__ == "__main__":
    main()
