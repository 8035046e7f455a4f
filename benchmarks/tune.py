"""Alternatives to the tables of tiles, for whoever has a GPU to tune them on: each is put in the table's place, must
give what the table's own choice gives, and is timed beside it. Nothing is changed; the tables are for people to edit.

    python benchmarks/tune.py --device cuda [--ops option_logprobs prefix_attention cuda] [--name tune_gpu]
    python benchmarks/tune.py --compile    # without a GPU: what each takes on sm_90, to results/tune_resources.csv

`times` is the table's time in times of the alternative's; one that does not compile or does not fit is named and left
out. The compiler's account tells beforehand which these are, and which spill registers: those that compile, fit and
spill at most 256 bytes a thread on sm_90 by Triton 3.6 are worth a place here.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import torch
import triton
from bench_prefix_attention import GPU_HEADS, HEADS, Heads, Place, draw
from harness import CPU, add_arguments, dtype_of, keep_working, print_row, time_side_by_side, write_csv
from torch import Tensor
from triton_resources import SHARED_BYTES, recording, resources

TRITON = "psykern.kernels.triton"
TOLERANCE = 2e-2  # of attention in bf16; of log-probabilities 1e-3
TABLE = "table"  # what the tables say now
OPS = ("option_logprobs", "prefix_attention", "cuda")  # "cuda": option_logprobs in CUDA C++


@dataclass(frozen=True, slots=True)
class Alternative:
    name: str
    values: dict[str, object]  # by name in the op's module, what stands there instead


@dataclass(frozen=True, slots=True)
class Case:
    op: str
    name: str
    module: str
    call: Callable[[], Sequence[Tensor]]
    alternatives: Sequence[Alternative]
    tolerance: float


@contextmanager
def instead(case: Case, alternative: Alternative) -> Iterator[None]:
    module = importlib.import_module(case.module)
    with ExitStack() as stack:
        for name, value in alternative.values.items():
            stack.enter_context(patch.object(module, name, value))
        yield


def product_tiles(rows: int) -> list[Alternative]:
    """Of ``option_logprobs``: rows, tokens, step of the product, warps, stages; "loads" without TMA."""
    module = importlib.import_module(f"{TRITON}.option_logprobs")
    if rows <= 16:
        sizes = [
            (16, 256, 64, 8, 4),
            (16, 128, 128, 4, 3),
            (16, 64, 128, 4, 4),
            (16, 128, 64, 4, 6),
            (16, 128, 64, 8, 4),
        ]
    elif rows <= 64:
        sizes = [
            (64, 128, 64, 4, 4),
            (64, 256, 64, 4, 3),
            (64, 256, 64, 8, 4),
            (64, 128, 128, 4, 3),
            (64, 128, 64, 8, 6),
        ]
    else:
        sizes = [
            (128, 256, 64, 8, 4),
            (128, 256, 32, 8, 6),
            (128, 256, 128, 8, 2),
            (128, 128, 64, 4, 4),
            (128, 128, 64, 8, 4),
            (128, 128, 64, 4, 3),
            (256, 128, 64, 8, 3),
            (256, 128, 64, 8, 4),
            (64, 256, 64, 4, 4),
        ]
    tiles = [("x".join(map(str, size)), module.Tiles(*size)) for size in sizes]
    found = [Alternative(name, {"tiles_of": lambda *_, t=t: t}) for name, t in tiles]
    return [*found, Alternative("loads", {"uses_tma": lambda *_: False})]


def attention_blocks(head_dim: int) -> list[Alternative]:
    """Of ``prefix_attention``: rows, keys, keys of masked blocks, warps, stages; "loads" without TMA."""
    module = importlib.import_module(f"{TRITON}.prefix_attention")
    sizes = [(128, 64, 64, 8, 3), (128, 128, 64, 8, 3), (128, 128, 32, 8, 2), (64, 64, 32, 4, 3)]
    if head_dim <= 64:
        sizes += [(128, 128, 32, 8, 3), (128, 64, 32, 8, 4), (64, 128, 32, 4, 3)]
    else:
        sizes += [(128, 64, 32, 8, 3), (64, 128, 32, 4, 2)]
    blocks = [("x".join(map(str, size)), module.Blocks(*size)) for size in sizes]
    found = [Alternative(name, {"blocks_of": lambda *_, b=b: b}) for name, b in blocks]
    return [*found, Alternative("loads", {"uses_tma": lambda *_: False})]


def cuda_tiles() -> list[Alternative]:
    """Of ``option_logprobs`` in CUDA C++: rows at most and MiB of a tile of logits."""
    sizes = [(rows, mib) for rows in (256, 512, 1024, 2048) for mib in (8, 16, 32)]
    return [Alternative(f"{r}x{mib}MiB", {"_MAX_ROWS": r, "_TILE_BYTES": mib * 2**20}) for r, mib in sizes]


def cases(
    ops: Sequence[str],
    device: torch.device,
    dtype: torch.dtype,
    shapes: Sequence[tuple[int, int]] = ((151_936, 1024), (151_936, 4096)),
    quick: bool = False,
) -> Iterator[Case]:
    """``shapes``: vocabulary and hidden size of ``option_logprobs``."""
    products = [op for op in ops if op != "prefix_attention"]
    for vocabulary, size in shapes if products else []:
        weight = (torch.randn(vocabulary, size, device=device) * 0.02).to(dtype)
        for rows in (16, 130) if quick else (16, 64, 4096):
            for op in products:
                module = "psykern.kernels.cuda" if op == "cuda" else f"{TRITON}.option_logprobs"
                alternatives = cuda_tiles() if op == "cuda" else product_tiles(rows)
                where = f"R {rows}, V {vocabulary}, D {size}"
                yield Case(op, where, module, scores(rows, weight, module), alternatives, 1e-3)
    if "prefix_attention" not in ops:
        return
    for heads in (Heads(4, 2, 16),) if quick else (*GPU_HEADS, HEADS[0]):
        for name, tokens, window in (("causal", 8192, None), ("window", 16_384, 4096), ("branches", 4096, None)):
            call = attention(name, heads, 60 if quick else tokens, 20 if quick and window else window, device, dtype)
            where = f"{name}, {heads.queries} ({heads.keys}) of {heads.size}"
            module = f"{TRITON}.prefix_attention"
            yield Case("prefix_attention", where, module, call, attention_blocks(heads.size), TOLERANCE)


def scores(rows: int, weight: Tensor, module: str) -> Callable[[], Sequence[Tensor]]:
    hidden = torch.randn(rows, weight.shape[1], device=weight.device).to(weight.dtype)
    offsets = torch.arange(rows + 1, device=weight.device)
    ids = torch.randint(len(weight), (rows,), dtype=torch.int32, device=weight.device)

    def call() -> Sequence[Tensor]:
        lse, logits, _, entropy = importlib.import_module(module).option_logprobs(hidden, weight, offsets, ids)
        return logits - lse, entropy

    return call


def attention(
    name: str, heads: Heads, tokens: int, window: int | None, device: torch.device, dtype: torch.dtype
) -> Callable[[], Sequence[Tensor]]:
    if name == "branches":
        points = [point for point in range(50, tokens, 50) for _ in range(4)]
        paths = [[(0, point), (tokens + 3 * i, tokens + 3 * i + 3)] for i, point in enumerate(points)]
        problem = draw(heads, [3] * len(points), paths, Place(device, dtype))
    else:
        problem = draw(heads, [tokens], [[(0, tokens)]], Place(device, dtype))
    out, scale = torch.empty_like(problem.q), heads.size**-0.5
    op = importlib.import_module(TRITON).prefix_attention
    return lambda: [op(problem.q, problem.k, problem.v, problem.segments, scale, window, out).clone()]


def tune(case: Case, repeats: int, device: torch.device) -> list[dict[str, object]]:
    """Each alternative that compiles, beside the table's choice; fastest first."""
    expected = case.call()

    def run(alternative: Alternative) -> Sequence[Tensor]:
        with instead(case, alternative):
            return case.call()

    def check(name: str, result: Sequence[Tensor]) -> None:
        for got, one in zip(result, expected, strict=True):
            torch.testing.assert_close(got, one, atol=case.tolerance, rtol=case.tolerance)

    choices = [Alternative(TABLE, {}), *case.alternatives]
    working = keep_working({a.name: lambda a=a: run(a) for a in choices}, check, own=TABLE)
    timings = time_side_by_side(working, repeats, min(2, repeats - 1), device)
    rows = [
        {
            "op": case.op,
            "case": case.name,
            "alternative": name,
            **timing.columns(),
            "times": round(timings[TABLE].median / timing.median, 3),
        }
        for name, timing in sorted(timings.items(), key=lambda item: item[1].median)
    ]
    for row in rows:
        print_row(row)
    return rows


def account(case: Case) -> Iterator[dict[str, object]]:
    """What each alternative takes on sm_90, or why it does not compile."""
    for alternative in [Alternative(TABLE, {}), *case.alternatives]:
        row: dict[str, object] = {"op": case.op, "case": case.name, "alternative": alternative.name}
        try:
            with recording(hopper=True) as launches, instead(case, alternative):
                case.call()
            took = resources(launches[0], 90)
            row |= {"registers": took.registers, "stack_bytes": took.stack_bytes, "shared_bytes": took.shared_bytes}
            row |= {"mma": took.mma, "fits": took.shared_bytes <= SHARED_BYTES[90], "error": ""}
        except Exception as error:
            why = f"{type(error).__name__}: {error!s:.100}".replace("\n", " ")
            row |= dict.fromkeys(("registers", "stack_bytes", "shared_bytes", "mma")) | {"fits": False, "error": why}
        row["triton"] = triton.__version__
        print_row(row)
        yield row


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--ops", nargs="+", choices=OPS, default=OPS)
    parser.add_argument("--compile", action="store_true", help="for sm_90, on any machine; time nothing")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--name", help="CSV in results/; default: no file, with --compile tune_resources")
    options = parser.parse_args(arguments)
    rows: list[dict[str, object]] = []
    if options.compile:
        triton_ops = [op for op in options.ops if op != "cuda"]
        for case in cases(triton_ops, CPU, torch.bfloat16, shapes=((1024, 1024),), quick=options.quick):
            rows += account(case)
        write_csv(options.name or "tune_resources", rows, options.folder)
        return
    shapes = {"shapes": ((300, 64),)} if options.quick else {}
    for case in cases(options.ops, options.device, dtype_of(options), quick=options.quick, **shapes):
        rows += tune(case, options.repeats, options.device)
        if options.name:
            write_csv(options.name, rows, options.folder, options.device)


if __name__ == "__main__":
    main()
