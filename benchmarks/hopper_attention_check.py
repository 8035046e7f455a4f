"""Variants of prefix_attention for Hopper, on one: whether each is right, and how fast, beside what there is.

    python benchmarks/hopper_attention_check.py [--variants warps overlap] [--out hopper_attention_check.jsonl]

Each variant runs in a process of its own that is killed after ``--limit`` seconds, as a kernel whose barriers are wrong
never ends. All are compiled before, side by side. First a variant is compared with a dense mask in fp64, on stores
whose other rows are not numbers, and with itself run again, bit by bit. Then it is timed: back to back for half a
second, as a CUDA graph, so that launches do not count. At the end, Hopper's are launched thousands of times. FLOPs:
4 Hq Dh for each pair of a query and a key that it sees.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from bench_prefix_attention import Heads, Problem
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

TRITON = "psykern.kernels.triton"
HEADS = (Heads(32, 8, 128), Heads(16, 8, 128), Heads(32, 8, 64))  # of Qwen3-8B, of Qwen3-0.6B
LENGTHS = (2048, 4096, 8192, 16_384)
WINDOW = 200
ENDURANCE = 3000  # launches
TOLERANCE = 2e-2  # in bf16; relative above 1

Attend = Callable[[Problem, int | None], Callable[[], Tensor]]


class Variant(NamedTuple):
    module: str
    options: dict[str, Any]


VARIANTS = {
    "table": Variant(f"{TRITON}.prefix_attention", {}),
    "warps": Variant(f"{TRITON}.hopper_attention", {}),
    "warps-one-tile": Variant(f"{TRITON}.hopper_attention", {"persistent": False}),
    "overlap": Variant(f"{TRITON}.hopper_attention", {"overlap": True}),
    "turns": Variant(f"{TRITON}.hopper_attention", {"overlap": True, "turns": True}),
    "beside": Variant(f"{TRITON}.overlap_attention", {}),
    "beside-one-tile": Variant(f"{TRITON}.overlap_attention", {"persistent": False}),
}
PEERS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def problem(heads: Heads, lengths: Sequence[int], paths: list[list[tuple[int, int]]], device: torch.device) -> Problem:
    """Normal numbers; rows that no path names, and five behind the last, are not numbers."""
    generator = torch.Generator(device).manual_seed(0)
    rows = 5 + max(end for path in paths for _, end in path)
    named = torch.zeros(rows, dtype=torch.bool)
    for path in paths:
        for begin, end in path:
            named[begin:end] = True
    shape = (rows, heads.keys, heads.size)
    k, v = (torch.randn(shape, generator=generator, device=device).bfloat16() for _ in range(2))
    for x in (k, v):
        x[~named.to(device)] = math.nan
    q = torch.randn((sum(lengths), heads.queries, heads.size), generator=generator, device=device).bfloat16()
    return Problem(q, k, v, list(lengths), paths)


def causal(heads: Heads, tokens: int, device: torch.device) -> Problem:
    return problem(heads, [tokens], [[(0, tokens)]], device)


def ragged(heads: Heads, lengths: Sequence[int], device: torch.device) -> Problem:
    """Sequences end to end, but for a row between each two."""
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length + 1)
    return problem(heads, lengths, [[(a, a + n)] for a, n in zip(starts, lengths, strict=False)], device)


def branches(heads: Heads, tokens: int, device: torch.device) -> Problem:
    """A transcript, and behind it four branches of 3 tokens at every 20th of its tokens."""
    points = [point for point in range(20, tokens, 20) for _ in range(4)]
    options = [[(0, p), (tokens + 3 * i, tokens + 3 * i + 3)] for i, p in enumerate(points)]
    return problem(heads, [tokens, *[3] * len(points)], [[(0, tokens)], *options], device)


def pieces(heads: Heads, device: torch.device) -> Problem:
    """Paths of several ranges, short and long, away from each other."""
    short = [(40 * i, 40 * i + 1 + 7 * (i % 5)) for i in range(40)]
    paths = [
        [(0, 300), (310, 571)],
        [(0, 300), (600, 1111)],
        [*short, (1700, 1850)],
        [*short[:20], (1900, 1901)],
        [(3, 140), (200, 210), (2000, 2128)],
    ]
    return problem(heads, [261, 130, 150, 1, 128], paths, device)


def wave(heads: Heads, device: torch.device) -> Problem:
    """16k rows of transcripts of many lengths, some behind a common beginning."""
    generator = torch.Generator().manual_seed(1)
    lengths, paths, end = [2000], [[(0, 2000)]], 2000
    while end < 16_384:
        length = int(2 ** (6 + 5 * float(torch.rand((), generator=generator))))
        shared = [(0, 600)] if len(paths) % 3 == 0 else []
        paths.append([*shared, (end, end + length)])
        lengths.append(length)
        end += length
    return problem(heads, lengths, paths, device)


def checks(device: torch.device) -> Iterator[tuple[str, Problem, int | None]]:
    for heads in HEADS:
        where = f"{heads.queries}/{heads.keys}x{heads.size}"
        yield f"causal 1000 {where}", causal(heads, 1000, device), None
        yield f"ragged {where}", ragged(heads, (1, 2, 31, 32, 33, 127, 128, 129, 200, 500), device), None
        yield f"branches {where}", branches(heads, 700, device), None
        yield f"pieces {where}", pieces(heads, device), None
    for name, one in (
        ("causal 1000", causal(HEADS[0], 1000, device)),
        ("branches", branches(HEADS[0], 700, device)),
        ("pieces", pieces(HEADS[0], device)),
    ):
        yield f"{name} window {WINDOW}", one, WINDOW
        yield f"{name} window 2", one, 2


def truth_of(problem: Problem, window: int | None) -> Tensor:
    """By a dense mask in fp64, segment by segment."""
    outputs, first = [], 0
    for n, path in zip(problem.lengths, problem.paths, strict=True):
        group = problem.q.shape[1] // problem.k.shape[1]
        k, v = (
            torch.cat([x[a:b] for a, b in path]).double().repeat_interleave(group, 1) for x in (problem.k, problem.v)
        )
        places = torch.arange(len(k), device=k.device)
        own = places[len(k) - n :, None]
        sees = places <= own
        if window is not None:
            sees &= places > own - window
        q = problem.q[first : first + n].double()
        scores = torch.einsum("nhd,mhd->hnm", q, k) * q.shape[2] ** -0.5
        outputs.append(torch.einsum("hnm,mhd->nhd", scores.masked_fill(~sees, -math.inf).softmax(-1), v))
        first += n
    return torch.cat(outputs)


def attend_by(name: str) -> Attend:
    if name in PEERS:
        return partial(peer, PEERS[name])
    variant = VARIANTS[name]
    module = importlib.import_module(variant.module)

    def prepare(problem: Problem, window: int | None) -> Callable[[], Tensor]:
        q, out = problem.q, torch.full_like(problem.q, math.nan)
        arguments = (q, problem.k, problem.v, problem.segments, q.shape[2] ** -0.5, window, out)  # type: ignore[attr-defined]
        return partial(module.prefix_attention, *arguments, **variant.options)

    return prepare


def peer(backend: SDPBackend, problem: Problem, window: int | None) -> Callable[[], Tensor]:
    """torch's, on one sequence; with keys repeated beforehand where it does not take them grouped."""
    n, group = len(problem.q), problem.q.shape[1] // problem.k.shape[1]
    q, k, v = (x[:n].transpose(0, 1)[None] for x in (problem.q, problem.k, problem.v))

    def attend(k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.shape[1] < q.shape[1])

    try:
        attend(k, v)
    except RuntimeError as error:
        print(f"{backend}: keys are repeated: {error!s:.100}", flush=True)
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    return partial(attend, k, v)


def seconds_of(call: Callable[[], object], duration: float) -> float:
    """Of one call, back to back in a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    graph, calls = torch.cuda.CUDAGraph(), 10
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(calls):
            call()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    replays, took = 1, 0.0
    while took < duration * 1000:  # at least half of it in the last turn, which counts
        begin.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        end.synchronize()
        took = begin.elapsed_time(end)
        counted, replays = replays, max(2 * replays, math.ceil(replays * duration * 1000 / max(took, 1e-3)))
    return took / 1000 / calls / counted


class Recorder:
    """One line of output and one of JSON for each result."""

    def __init__(self, variant: str, out: Path) -> None:
        self.variant, self.out = variant, out

    def add(self, case: str, **found: object) -> None:
        print(f"{self.variant:16} {case:32}", *(f"{k} {v}" for k, v in found.items()), flush=True)
        with self.out.open("a") as file:
            file.write(json.dumps({"variant": self.variant, "case": case, **found}) + "\n")


def check(name: str, recorder: Recorder, device: torch.device) -> bool:
    """Whether the device can still be used."""
    attend = attend_by(name)
    for case, one, window in checks(device):
        try:
            call = attend(one, window)
            got = call().clone()
            again = all(torch.equal(got, call()) for _ in range(5))
            truth = truth_of(one, window)
            error = float(((got.double() - truth) / truth.abs().clamp(min=1)).abs().nan_to_num(math.inf).max())
            verdict = "ok" if error < TOLERANCE and again else "WRONG"
            recorder.add(case, verdict=verdict, max_error=round(error, 5), same_again=again)
        except Exception as error:
            recorder.add(case, verdict="FAILED", error=f"{error!s:.200}")
            if "CUDA" in str(error):
                return False
    return True


def endure(name: str, recorder: Recorder, device: torch.device) -> None:
    """Thousands of launches: a hang at one program's end in a hundred thousand is not met by a few."""
    attend = attend_by(name)
    heads = HEADS[0]
    for case, one in (("pieces", pieces(heads, device)), ("branches", branches(heads, 700, device))):
        for window in (None, WINDOW):
            call = attend(one, window)
            got, begin = call().clone(), time.monotonic()
            for _ in range(ENDURANCE):
                call()
            same = torch.equal(got, call())
            seconds = round(time.monotonic() - begin, 2)
            recorder.add(f"{case} window {window}", launches=ENDURANCE, same_again=same, seconds=seconds)


def measure(name: str, recorder: Recorder, device: torch.device, duration: float) -> None:
    attend = attend_by(name)
    cases = [(f"causal {n}", causal, (HEADS[0], n, device)) for n in LENGTHS]
    cases += [] if name in PEERS else [("wave", wave, (HEADS[0], device))]
    cases += [(f"causal {n}", causal, (heads, n, device)) for heads in HEADS[1:] for n in (2048, 8192)]
    for case, make, arguments in cases:
        heads, one = arguments[0], make(*arguments)
        where = f"{case} {heads.queries}/{heads.keys}x{heads.size}"
        try:
            took = seconds_of(attend(one, None), duration)
            flop = 4 * heads.queries * heads.size * one.pairs
            recorder.add(where, tflops=round(flop / took / 1e12, 1), microseconds=round(took * 1e6, 1))
        except Exception as error:
            recorder.add(where, verdict="FAILED", error=f"{error!s:.200}")


def compile_only(name: str, device: torch.device) -> None:
    """Fills Triton's cache; launches nothing."""
    module = importlib.import_module(VARIANTS[name].module)
    kernel = module.attention_kernel

    class Compiling:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]:
            return lambda *arguments, **options: kernel.warmup(*arguments, grid=grid, **options)

    with patch.object(module, "attention_kernel", Compiling()):
        for heads in HEADS:
            attend_by(name)(causal(heads, 300, device), None)()
        attend_by(name)(causal(HEADS[0], 300, device), WINDOW)()


def run_all(options: argparse.Namespace) -> None:
    begin = time.monotonic()
    command = [sys.executable, __file__, "--out", str(options.out), "--seconds", str(options.seconds), "--one"]
    compiling = [subprocess.Popen([*command, n, "--compile"]) for n in options.variants if n in VARIANTS]
    for process in compiling:
        try:
            process.wait(timeout=90)
        except subprocess.TimeoutExpired:
            process.kill()
    print(f"compiled after {time.monotonic() - begin:.0f} s", flush=True)
    for name in options.variants:
        left = options.deadline - (time.monotonic() - begin)
        if left < 10:
            print(f"{name}: no time left", flush=True)
            continue
        process = subprocess.Popen([*command, name])
        try:
            code = process.wait(timeout=min(options.limit, left))
            print(f"{name}: ended with {code} after {time.monotonic() - begin:.0f} s in all", flush=True)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(timeout=20)
            print(f"{name}: KILLED, it had not ended after {options.limit:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*VARIANTS, *PEERS]
    first = ["table", "beside", "beside-one-tile", "turns", "overlap", *PEERS]  # the rest as the deadline allows
    parser.add_argument("--variants", nargs="+", choices=names, default=sorted(names, key=[*first, *names].index))
    parser.add_argument("--out", type=Path, default=Path("hopper_attention_check.jsonl"))
    parser.add_argument("--seconds", type=float, default=0.3, help="of timing a case")
    parser.add_argument("--limit", type=float, default=40, help="seconds of a variant")
    parser.add_argument("--deadline", type=float, default=150, help="seconds of all")
    parser.add_argument("--one", choices=names, help="only this one, in this process")
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    if options.one is None:
        return run_all(options)
    device = torch.device("cuda")
    if options.compile:
        return compile_only(options.one, device)
    recorder = Recorder(options.one, options.out)
    if options.one in PEERS or check(options.one, recorder, device):
        measure(options.one, recorder, device, options.seconds)
        if options.one not in (*PEERS, "table"):
            endure(options.one, recorder, device)
    return None


if __name__ == "__main__":
    main()
