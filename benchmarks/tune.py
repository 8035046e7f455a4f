"""Alternatives to the tables of tiles, for whoever has a GPU to tune them on: each is put in the table's place, must
give what the table's own choice gives, and is timed beside it. Nothing is changed; the tables are for people to edit.

    python benchmarks/tune.py --device cuda [--ops option_logprobs prefix_attention experts cuda] [--name tune_gpu]
    python benchmarks/tune.py --device cuda --ops prefix_attention --cases wave causal
    python benchmarks/tune.py --compile    # without a GPU: what each takes on sm_90, to results/tune_resources.csv

`times` is the table's time in times of the alternative's; one that does not compile or does not fit is named and left
out. The compiler's account tells beforehand which these are, and which spill registers: those that compile, fit and
spill at most 256 bytes a thread on sm_90 by Triton 3.6 are worth a place here.

Attention's cases ``wave`` are the batches that the engine makes of real transcripts (``wave_batches.py``): all of them,
which is a layer's attention, and those with the most and the least to do. On a GPU all that attention needs is compiled
beforehand, in processes side by side (``--processes``), by launches on few tokens: one takes seconds. One that fails or
does not end is left out.
"""

from __future__ import annotations

import argparse
import importlib
import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import NamedTuple
from unittest.mock import patch

import torch
import triton
from bench_prefix_attention import GPU_HEADS, HEADS, Heads, Place, draw
from harness import CPU, add_arguments, dtype_of, keep_working, print_row, time_side_by_side, write_csv
from side_by_side import run_in_processes
from torch import Tensor
from triton_resources import SHARED_BYTES, recording, resources
from wave_batches import WaveBatch, largest_batches

from psykern.engine.budgets import Budgets
from psykern.kernels import Routes

TRITON = "psykern.kernels.triton"
TOLERANCE = 2e-2  # of attention in bf16; of log-probabilities 1e-3
TABLE = "table"  # what the tables say now
OPS = ("option_logprobs", "prefix_attention", "experts", "cuda")  # "cuda": option_logprobs in CUDA C++
ATTENTION = {"wave": None, "causal": 8192, "window": 16_384, "branches": 4096}  # cases, with their tokens
WINDOW = 4096
MODELS = {Heads(32, 8, 128): "Qwen3-8B", Heads(16, 8, 128): "Qwen3-0.6B"}  # whose waves heads are given
TINY_BUDGETS = Budgets(wave_tokens=64, batch_tokens=32)
FEW_TOKENS = 60
MOST_BATCHES = 32  # of a wave case; the mix makes 14


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
    flops: float = 0.0  # of products; 0: not counted


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
    sizes = [(128, 64, 64, 8, 3), (128, 128, 64, 8, 3), (128, 128, 32, 8, 2)]
    if head_dim <= 64:
        sizes += [(64, 64, 32, 4, 3), (128, 128, 32, 8, 3), (128, 64, 32, 8, 4), (64, 128, 32, 4, 3)]
    else:
        sizes += [(128, 128, 32, 8, 3), (128, 64, 32, 8, 3), (64, 128, 32, 4, 2)]
    blocks = [("x".join(map(str, size)), module.Blocks(*size)) for size in sizes]
    found = [Alternative(name, {"blocks_of": lambda *_, b=b: b}) for name, b in blocks]
    return [*found, Alternative("loads", {"uses_tma": lambda *_: False})]


def expert_tiles(is_gated: bool) -> list[Alternative]:
    """Of ``experts``: rows, columns of each product, step, warps, stages; tiles in a group; gathered rows by registers
    instead of cp.async."""
    module = importlib.import_module(f"{TRITON}.experts")
    columns = 128 if is_gated else 256
    sizes = [(128, columns, 64, 8, 3), (128, columns // 2, 64, 4, 4), (128, columns // 2, 64, 8, 4)]
    sizes += [(64, columns, 64, 4, 4), (64, columns // 2, 64, 4, 4), (64, columns // 2, 128, 4, 3)]
    sizes += [(128, columns // 2, 64, 4, 3), (256, columns // 2, 64, 8, 4)]
    tiles = [("x".join(map(str, size)), module.Tiles(*size)) for size in sizes]
    found = [Alternative(name, {"tiles_of": lambda *_, t=t: t}) for name, t in tiles]
    found += [Alternative(f"groups of {size}", {"_GROUP": size}) for size in (4, 16, 32)]
    found += [Alternative("registers", {"_HAS_FENCE": False})] if is_gated else []
    return [*found, Alternative("loads", {"uses_tma": lambda *_: False})]


def cuda_tiles() -> list[Alternative]:
    """Of ``option_logprobs`` in CUDA C++: rows at most and MiB of a tile of logits."""
    sizes = [(rows, mib) for rows in (256, 512, 1024, 2048) for mib in (8, 16, 32)]
    return [Alternative(f"{r}x{mib}MiB", {"_MAX_ROWS": r, "_TILE_BYTES": mib * 2**20}) for r, mib in sizes]


def product_cases(
    ops: Sequence[str],
    device: torch.device,
    dtype: torch.dtype,
    shapes: Sequence[tuple[int, int]] = ((151_936, 1024), (151_936, 4096)),
    quick: bool = False,
) -> Iterator[Case]:
    """Of ``option_logprobs``; ``shapes``: vocabulary and hidden size."""
    for vocabulary, size in shapes if ops else []:
        weight = (torch.randn(vocabulary, size, device=device) * 0.02).to(dtype)
        for rows in (16, 130) if quick else (16, 64, 4096):
            for op in ops:
                module = "psykern.kernels.cuda" if op == "cuda" else f"{TRITON}.option_logprobs"
                alternatives = cuda_tiles() if op == "cuda" else product_tiles(rows)
                where = f"R {rows}, V {vocabulary}, D {size}"
                yield Case(op, where, module, scores(rows, weight, module), alternatives, 1e-3)


def scores(rows: int, weight: Tensor, module: str) -> Callable[[], Sequence[Tensor]]:
    hidden = torch.randn(rows, weight.shape[1], device=weight.device).to(weight.dtype)
    offsets = torch.arange(rows + 1, device=weight.device)
    ids = torch.randint(len(weight), (rows,), dtype=torch.int32, device=weight.device)

    def call() -> Sequence[Tensor]:
        lse, logits, _, entropy = importlib.import_module(module).option_logprobs(hidden, weight, offsets, ids)
        return logits - lse, entropy

    return call


class Setting(NamedTuple):
    """Of the cases of attention and of experts."""

    device: torch.device
    dtype: torch.dtype
    quick: bool = False

    @property
    def heads(self) -> Sequence[Heads]:
        return (Heads(4, 2, 16),) if self.quick else (*GPU_HEADS, HEADS[0])


def expert_cases(at: Setting, num_experts: int = 128) -> Iterator[Case]:
    """At the shape of Qwen3-30B-A3B, with as many rows of an expert as in a batch and as in one of a last layer; of
    fewer experts, to compile for them."""
    size, inner, num_experts, top_k = (48, 40, 4, 2) if at.quick else (2048, 768, num_experts, 8)
    shapes = ((inner, size), (inner, size), (size, inner))
    gates, ups, downs = (torch.randn(num_experts, m, k, device=at.device).mul_(k**-0.5).to(at.dtype) for m, k in shapes)
    for rows_of_expert in (10,) if at.quick else (1024, 32):
        rows = rows_of_expert * num_experts // top_k
        routes = Routes.of(torch.rand(rows, num_experts, device=at.device).topk(top_k).indices, num_experts)
        x = torch.randn(rows, size, device=at.device).to(at.dtype)
        inputs = torch.randn(rows * top_k, inner, device=at.device).to(at.dtype)
        gated, linear = torch.empty_like(inputs), x.new_empty(rows * top_k, size)
        calls = {
            "expert_swiglu": lambda x=x, r=routes, out=gated: (x, gates, ups, r, out),
            "expert_linear": lambda x=inputs, r=routes, out=linear: (x, downs, r, out),
        }
        for op, arguments in calls.items():
            flops = 2.0 * rows * top_k * size * inner * (2 if op == "expert_swiglu" else 1)
            where = f"{rows} rows, {top_k} of {num_experts}, {size} x {inner}"
            call = partial(multiply_experts, op, arguments)
            yield Case(op, where, f"{TRITON}.experts", call, expert_tiles(op == "expert_swiglu"), TOLERANCE, flops)


def multiply_experts(op: str, arguments: Callable[[], tuple[object, ...]]) -> Sequence[Tensor]:
    """As the module has it now."""
    return [getattr(importlib.import_module(f"{TRITON}.experts"), op)(*arguments())]


def attention_cases(names: Sequence[str], at: Setting, few: bool = False) -> Iterator[Case]:
    """``few``: of each kernel that the cases need one, with few tokens, to compile it."""
    for heads in at.heads:
        own = [name for name in names if name != "wave" or at.quick or heads in MODELS]
        for name in dict.fromkeys(map(kernel_of, own)) if few else own:
            if name == "wave":
                yield from wave_cases(heads, at)
                continue
            tokens = FEW_TOKENS if few or at.quick else ATTENTION[name]
            window = None if name != "window" else FEW_TOKENS // 3 if few or at.quick else WINDOW
            yield attention_case(name, heads, at, *attention(name, heads, tokens or 0, window, at))


def kernel_of(case: str) -> str:
    """The case that needs the same kernel, for heads of one size."""
    return "window" if case == "window" else "causal"


def attention_case(name: str, heads: Heads, at: Setting, call: Callable[[], Sequence[Tensor]], pairs: int) -> Case:
    where = f"{name}, {heads.queries} ({heads.keys}) of {heads.size}"
    flops = 4.0 * heads.queries * heads.size * pairs
    alternatives = attention_blocks(heads.size)
    return Case("prefix_attention", where, f"{TRITON}.prefix_attention", call, alternatives, TOLERANCE, flops)


def attend(*arguments: object) -> Tensor:
    """As the module has it now: an alternative may stand there instead."""
    return importlib.import_module(f"{TRITON}.prefix_attention").prefix_attention(*arguments)  # type: ignore[no-any-return]


def wave_cases(heads: Heads, at: Setting) -> Iterator[Case]:
    """All batches of a model's run, and those with the most and the least to do."""
    if at.quick:
        batches = largest_batches("Qwen3-0.6B", None, at.device, at.dtype, TINY_BUDGETS)[-2:]
    else:
        batches = largest_batches(MODELS[heads], MOST_BATCHES, at.device, at.dtype)
    parts = {f"wave, {len(batches)} batches": batches, "wave, largest": batches[:1], "wave, least": batches[-1:]}
    for name, some in parts.items():
        yield attention_case(name, heads, at, wave_attention(some, heads, at), sum(batch.pairs for batch in some))


def wave_attention(batches: Sequence[WaveBatch], heads: Heads, at: Setting) -> Callable[[], Sequence[Tensor]]:
    torch.manual_seed(0)
    store = torch.randn(2, max(b.store_rows for b in batches), heads.keys, heads.size, device=at.device, dtype=at.dtype)
    widest = max(b.num_queries for b in batches)
    q = torch.randn(widest, heads.queries, heads.size, device=at.device, dtype=at.dtype)
    outs = [torch.empty_like(q[: b.num_queries]) for b in batches]
    scale = heads.size**-0.5

    def call() -> Sequence[Tensor]:
        for batch, out in zip(batches, outs, strict=True):
            k, v = store[:, : batch.store_rows]
            attend(q[: batch.num_queries], k, v, batch.segments, scale, None, out)
        return outs

    return call


def attention(
    name: str, heads: Heads, tokens: int, window: int | None, at: Setting
) -> tuple[Callable[[], Sequence[Tensor]], int]:
    """A call, and its pairs of a query and a key that it sees."""
    if name == "branches":
        points = [point for point in range(50, tokens, 50) for _ in range(4)]
        paths = [[(0, point), (tokens + 3 * i, tokens + 3 * i + 3)] for i, point in enumerate(points)]
        problem = draw(heads, [3] * len(points), paths, Place(at.device, at.dtype))
    else:
        problem = draw(heads, [tokens], [[(0, tokens)]], Place(at.device, at.dtype))
    out, scale = torch.empty_like(problem.q), heads.size**-0.5
    seen = problem.segments.positions.long() + 1
    pairs = int((seen if window is None else seen.clamp(max=window)).sum())
    return lambda: [attend(problem.q, problem.k, problem.v, problem.segments, scale, window, out)], pairs


def compile_beforehand(names: Sequence[str], only: Sequence[str], at: Setting, processes: int) -> set[tuple[str, str]]:
    """Launches attention's alternatives on few tokens, each in a process of its own; those that follow find the kernels
    in Triton's cache. Gives the kernel and the alternative of those to leave out. To be called before this process uses
    the GPU, which a fork could not go on using."""
    start, num_threads = time.perf_counter(), torch.get_num_threads()
    torch.set_num_threads(1)  # threads of OpenMP would not be there after a fork
    on_host = [chosen(case, only) for case in attention_cases(names, at._replace(device=CPU), few=True)]

    def launch(c: int, alternative: Alternative) -> None:
        case = list(attention_cases(names, at, few=True))[c]
        with instead(case, alternative):
            case.call()
        if at.device.type == "cuda":
            torch.cuda.synchronize(at.device)

    tasks = {
        (case.name, a.name): lambda c=c, a=a: launch(c, a)
        for c, case in enumerate(on_host)
        for a in [Alternative(TABLE, {}), *case.alternatives]
    }
    failures = run_in_processes(tasks, processes)
    torch.set_num_threads(num_threads)
    for (case, name), why in failures.items():
        print(f"not compiled: {case}: {name}: {why}", flush=True)
    print(f"{len(tasks)} kernels compiled in {time.perf_counter() - start:.1f} s, {len(failures)} failed", flush=True)
    of_table = any(name == TABLE for _, name in failures)  # then failures say nothing of an alternative
    return set() if of_table else set(failures)


def chosen(case: Case, only: Sequence[str], failed: Collection[tuple[str, str]] = ()) -> Case:
    """With the alternatives that are asked for (all, if none is named) and did not fail."""
    name, _, heads = case.name.rpartition(", ")
    kernel = f"{kernel_of(name)}, {heads}"
    kept = [a for a in case.alternatives if (not only or a.name in only) and (kernel, a.name) not in failed]
    return replace(case, alternatives=kept)


def tune(case: Case, repeats: int, device: torch.device) -> list[dict[str, object]]:
    """Each alternative that compiles, beside the table's choice; fastest first."""
    expected = [result.clone() for result in case.call()]

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
            "tflops": round(case.flops / timing.median / 1e12, 1) if case.flops else "",
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
            took = max((resources(launch, 90) for launch in launches), key=lambda r: r.shared_bytes)  # the product
            row |= {"registers": took.registers, "stack_bytes": took.stack_bytes, "shared_bytes": took.shared_bytes}
            row |= {"mma": took.mma, "fits": took.shared_bytes <= SHARED_BYTES[90], "error": ""}
        except Exception as error:
            why = f"{type(error).__name__}: {error!s:.100}".replace("\n", " ")
            row |= dict.fromkeys(("registers", "stack_bytes", "shared_bytes", "mma")) | {"fits": False, "error": why}
        row["triton"] = triton.__version__
        print_row(row)
        yield row


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--ops", nargs="+", choices=OPS, default=OPS)
    parser.add_argument("--cases", nargs="+", choices=ATTENTION, default=list(ATTENTION), help="of attention")
    parser.add_argument("--alternatives", nargs="+", default=[], help="only these, by name, beside the table")
    parser.add_argument("--processes", type=int, help="that compile; default: on a GPU up to 16, else 0")
    parser.add_argument("--compile", action="store_true", help="for sm_90, on any machine; time nothing")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--name", help="CSV in results/; default: no file, with --compile tune_resources")
    return parser.parse_args(arguments)


def account_of_all(options: argparse.Namespace) -> None:
    products = [op for op in options.ops if op == "option_logprobs"]
    names = [n for n in options.cases if n != "wave"] if "prefix_attention" in options.ops else []
    on_host = Setting(CPU, torch.bfloat16, options.quick)
    of_products = product_cases(products, CPU, torch.bfloat16, ((1024, 1024),), options.quick)
    of_experts = expert_cases(on_host, num_experts=8) if "experts" in options.ops else ()
    rows = [row for case in chain(of_products, attention_cases(names, on_host), of_experts) for row in account(case)]
    write_csv(options.name or "tune_resources", rows, options.folder)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parsed(arguments)
    if options.compile:
        account_of_all(options)
        return
    on_gpu = options.device.type == "cuda"
    at = Setting(options.device, dtype_of(options), options.quick)
    names = options.cases if "prefix_attention" in options.ops else []
    default = min(16, len(os.sched_getaffinity(0))) if on_gpu else 0
    processes = default if options.processes is None else options.processes
    failed = compile_beforehand(names, options.alternatives, at, processes) if names and processes else ()
    shapes = {"shapes": ((300, 64),)} if options.quick else {}
    products = [op for op in options.ops if op in ("option_logprobs", "cuda")]
    of_experts = expert_cases(at) if "experts" in options.ops else ()
    of_products = product_cases(products, at.device, at.dtype, quick=at.quick, **shapes)
    rows: list[dict[str, object]] = []
    for case in chain(attention_cases(names, at), of_experts, of_products):
        rows += tune(chosen(case, options.alternatives, failed), options.repeats, options.device)
        if options.name:
            write_csv(options.name, rows, options.folder, options.device)


if __name__ == "__main__":
    main()
