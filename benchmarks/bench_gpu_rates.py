"""What a GPU reaches when it works without a pause: the denominators of a run, and psykern's operations beside others.

    python benchmarks/bench_gpu_rates.py --device cuda --name gpu_rates [--seconds 1] [--only products attention]

Each piece of work is repeated back to back for ``--seconds`` after a fifth of that to warm up: a burst after a pause
runs at clocks that a run of hours never sees. ``tflops`` and ``gb_per_second`` are over the whole time; clock, power
and temperature are means of what nvidia-smi said meanwhile. FLOPs: 2 N M K of a product, of
experts with each row's own; of attention 4 Hq Dh for each pair of a query and a key that it sees; bytes: each array
read or written once. Inputs are random numbers in bf16.
"""

from __future__ import annotations

import argparse
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

import torch
from bench_prefix_attention import Heads, Place, draw
from harness import add_arguments, dtype_of, print_row, write_csv
from shapes import SHAPES
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from psykern import kernels

KINDS = ("products", "attention", "head", "elementwise", "experts")
BACKENDS: tuple[kernels.Backend, ...] = ("triton", "cuda")


class Work(NamedTuple):
    kind: str
    name: str
    shape: str
    run: Callable[[], object]
    flops: float = 0.0
    num_bytes: float = 0.0


class Watcher:
    """Clock, power and temperature of the GPU while a piece of work runs; nothing where nvidia-smi is not there."""

    COLUMNS = ("clocks.sm", "power.draw", "temperature.gpu")

    def __init__(self) -> None:
        self.lines: list[list[float]] = []
        command = [
            "nvidia-smi",
            f"--query-gpu={','.join(self.COLUMNS)}",
            "--format=csv,noheader,nounits",
            "-lms",
            "100",
        ]
        self._process = None
        with suppress(FileNotFoundError):
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        for line in self._process.stdout:
            with suppress(ValueError):
                self.lines.append([float(value) for value in line.split(",")])

    def since(self, first: int) -> dict[str, object]:
        seen = self.lines[first:] or self.lines[-1:]
        means = [round(sum(column) / len(seen)) for column in zip(*seen, strict=True)] if seen else ["", "", ""]
        return dict(zip(("mhz", "watt", "celsius"), means, strict=True))

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def repeated(work: Work, seconds: float, device: torch.device) -> tuple[float, int]:
    """Seconds of one run, and how many there were."""

    def run_for(least: float, each: int) -> tuple[float, int]:
        start, count = time.perf_counter(), 0
        while True:
            for _ in range(each):
                work.run()
            synchronize(device)
            count += each
            if (took := time.perf_counter() - start) >= least:
                return took, count

    run_for(0, 1)  # compiles
    took, count = run_for(seconds / 5, 1)
    each = max(1, int(0.2 * count / took))  # the device never waits for the host within 0.2 s
    took, count = run_for(seconds, each)
    return took / count, count


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def products(place: Place, quick: bool) -> Iterator[Work]:
    """Of a layer, as psykern has them: apart, and with what reads one input merged."""

    def of(name: str, rows: int, width: int, inner: int) -> Work:
        x, weight, out = normal(place, rows, inner), normal(place, width, inner), normal(place, rows, width)
        flops = 2 * rows * width * inner
        return Work("products", name, f"{rows} x {width} x {inner}", lambda: torch.mm(x, weight.T, out=out), flops)

    yield of("square", *(64,) * 3 if quick else (8192,) * 3)
    for shape, rows in (("Qwen3-8B", 16_384), ("Qwen3-8B", 4096), ("Qwen3-0.6B", 16_384)):
        config = SHAPES[shape]
        size, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
        queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
        sides = {"q": (queries, size), "k": (keys, size), "qkv": (queries + 2 * keys, size), "o": (size, queries)}
        sides |= {"gate": (inner, size), "gate_up": (2 * inner, size), "down": (size, inner)}
        for name, (width, depth) in sides.items():
            yield of(f"{shape} {name}", *((17, 32, 48) if quick else (rows, width, depth)))
    x, y = normal(place, 64 if quick else 2**28), normal(place, 64 if quick else 2**28)
    yield Work("products", "copy", f"{x.numel()}", lambda: y.copy_(x), num_bytes=2 * x.nbytes)


def layer_of(shape: str, rows: int, place: Place, quick: bool = False) -> Work:
    """The products of one layer in turn, as a layer has them: what a run would reach if it did nothing else."""
    config = SHAPES[shape]
    size, inner, head = (24, 40, 8) if quick else [config[k] for k in ("hidden_size", "intermediate_size", "head_dim")]
    queries, keys = (head * config[f"num_{k}_heads"] for k in ("attention", "key_value"))
    sides = ((queries + 2 * keys, size), (size, queries), (2 * inner, size), (size, inner))
    arrays = [(normal(place, rows, k), normal(place, m, k), normal(place, rows, m)) for m, k in sides]

    def run() -> None:
        for x, weight, out in arrays:
            torch.mm(x, weight.T, out=out)

    return Work("products", "layer", shape, run, sum(2.0 * rows * m * k for m, k in sides))


def attention(place: Place, quick: bool) -> Iterator[Work]:
    """One sequence from its start on."""
    large, small = Heads(32, 8, 128), Heads(16, 8, 128)  # of Qwen3-8B and of Qwen3-0.6B
    cases = [(large, 1024), (large, 2048), (large, 4096), (large, 8192), (large, 16_384), (small, 2048), (small, 8192)]
    for heads, tokens in [(Heads(4, 2, 16), 33)] if quick else cases:
        problem = draw(heads, [tokens], [[(0, tokens)]], place)
        flops = 4 * heads.queries * heads.size * tokens * (tokens + 1) / 2
        shape = f"{heads.queries} ({heads.keys}) of {heads.size}, {tokens} tokens"
        out = torch.empty_like(problem.q)
        yield Work("attention", "psykern", shape, own_attention(problem, out), flops)
        inputs = [x.transpose(0, 1)[None] for x in (problem.q, problem.k, problem.v)]
        wide = [inputs[0], *(x.repeat_interleave(heads.queries // heads.keys, 1) for x in inputs[1:])]
        yield Work("attention", "sdpa", shape, library(inputs, None), flops)
        yield Work("attention", "cudnn", shape, library(inputs, SDPBackend.CUDNN_ATTENTION), flops)
        yield Work("attention", "cudnn_wide", shape, library(wide, SDPBackend.CUDNN_ATTENTION), flops)


def own_attention(problem: object, out: Tensor) -> Callable[[], object]:
    q, k, v, segments = (getattr(problem, name) for name in ("q", "k", "v", "segments"))
    scale = q.shape[2] ** -0.5
    return lambda: kernels.prefix_attention(q, k, v, segments, softmax_scale=scale, out=out)


def library(inputs: Sequence[Tensor], backend: SDPBackend | None) -> Callable[[], object]:
    q, k, v = inputs

    def call() -> Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.shape[1] != q.shape[1])

    def only() -> Tensor:
        with sdpa_kernel(backend):
            return call()

    return call if backend is None else only


def head(place: Place, quick: bool) -> Iterator[Work]:
    """The head with log-softmax and entropy, beside the product alone with its logits in the inputs' dtype."""
    vocabulary, sizes = (300, (32,)) if quick else (151_936, (4096, 1024))
    for size in sizes:
        weight = normal(place, vocabulary, size)
        for rows in (9,) if quick else (2048, 16_384):
            hidden, flops = normal(place, rows, size), 2.0 * rows * vocabulary * size
            shape = f"{rows} x {vocabulary} x {size}"
            offsets = torch.arange(rows + 1, device=place.device)
            ids = torch.randint(vocabulary, (rows,), dtype=torch.int32, device=place.device)
            names = BACKENDS if place.device.type == "cuda" else ("auto",)
            for name in names:
                yield Work("head", f"psykern:{name}", shape, scored(hidden, weight, offsets, ids, name), flops)
            out = torch.empty(rows, vocabulary, dtype=place.dtype, device=place.device)
            yield Work("head", "product alone", shape, lambda h=hidden, w=weight, o=out: torch.mm(h, w.T, out=o), flops)


def scored(
    hidden: Tensor, weight: Tensor, offsets: Tensor, ids: Tensor, backend: kernels.Backend
) -> Callable[[], object]:
    return lambda: kernels.option_logprobs(hidden, weight, offsets, ids, backend=backend)


def elementwise(place: Place, quick: bool) -> Iterator[Work]:
    rows, size, inner = (9, 32, 48) if quick else (16_384, 4096, 12_288)
    x, y, normed, summed = (normal(place, rows, size) for _ in range(4))
    gate, up, product = (normal(place, rows, inner) for _ in range(3))
    weight, q = normal(place, size), normal(place, rows, 4 if quick else 32, 8 if quick else 128)
    table = torch.rand(rows, q.shape[2] // 2, device=place.device)
    positions = torch.arange(rows, dtype=torch.int32, device=place.device)
    rotated = torch.empty_like(q)

    def norm() -> object:
        return kernels.add_rms_norm(x, y, weight, 1e-6, normed=normed, summed=summed)

    def rotate() -> object:
        return kernels.qk_norm_rope(q, weight[: q.shape[2]], table, table, positions, 1e-6, out=rotated)

    yield Work("elementwise", "add_rms_norm", f"{rows} x {size}", norm, num_bytes=4 * x.nbytes)
    shape = f"{rows} x {q.shape[1]} x {q.shape[2]}"
    yield Work("elementwise", "qk_norm_rope", shape, rotate, num_bytes=2 * q.nbytes + 2 * table.nbytes)
    run = lambda: kernels.silu_mul(gate, up, out=product)  # noqa: E731
    yield Work("elementwise", "silu_mul", f"{rows} x {inner}", run, num_bytes=3 * gate.nbytes)
    yield Work("elementwise", "sum", f"{rows} x {size}", lambda: x.sum(dtype=torch.float32), num_bytes=x.nbytes)


def experts(place: Place, quick: bool) -> Iterator[Work]:
    """Of Qwen3-30B-A3B, with rows that go to random experts."""
    size, inner, num_experts = (32, 48, 4) if quick else (2048, 768, 128)
    gates, ups = (normal(place, num_experts, inner, size) * size**-0.5 for _ in range(2))
    weights = (gates, ups, normal(place, num_experts, size, inner) * inner**-0.5)
    for rows in (9,) if quick else (16_384, 512):
        yield from experts_of(place, rows, 2 if quick else 8, weights)


def experts_of(place: Place, rows: int, top_k: int, weights: tuple[Tensor, Tensor, Tensor]) -> Iterator[Work]:
    """``psykern`` is the three operations in turn. Beside them a dense product of as many rows, and torch's grouped one
    of rows in order."""
    gates, ups, downs = weights
    num_experts, size, inner = downs.shape
    routes = kernels.Routes.of(torch.rand(rows, num_experts, device=place.device).topk(top_k).indices, num_experts)
    x, each, gated = (normal(place, *shape) for shape in ((rows, size), (rows * top_k, size), (rows * top_k, inner)))
    shares, ends = torch.rand(rows, top_k, device=place.device), routes.offsets[1:].contiguous()
    flops, shape = 2.0 * rows * top_k * size * inner, f"{rows} rows, {top_k} of {num_experts}"
    total = torch.zeros_like(x)

    def run() -> None:
        kernels.expert_swiglu(x, gates, ups, routes, out=gated)
        kernels.expert_linear(gated, downs, routes, out=each)
        kernels.add_weighted(each, shares, total)

    runs: dict[str, tuple[Callable[[], object], float]] = {
        "psykern": (run, 3 * flops),
        "expert_swiglu": (lambda: kernels.expert_swiglu(x, gates, ups, routes, out=gated), 2 * flops),
        "expert_linear": (lambda: kernels.expert_linear(gated, downs, routes, out=each), flops),
        "dense": (lambda: torch.mm(gated, downs[0].T, out=each), flops),
        "torch_grouped": (lambda: torch._grouped_mm(gated, downs.transpose(1, 2), offs=ends), flops),
    }
    for name, (call, count) in runs.items():
        yield Work("experts", name, shape, call, count)
    add = lambda: kernels.add_weighted(each, shares, total)  # noqa: E731
    yield Work("experts", "add_weighted", shape, add, num_bytes=each.nbytes + 2 * x.nbytes)


def normal(place: Place, *shape: int) -> Tensor:
    return torch.randn(shape, device=place.device, dtype=torch.float32).to(place.dtype)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each piece of work")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--name", help="CSV file in results/; default: no file")
    options = parser.parse_args(arguments)
    place = Place(options.device, dtype_of(options))
    watcher = Watcher() if options.device.type == "cuda" else None
    rows: list[dict[str, object]] = []
    makers = dict(zip(KINDS, (products, attention, head, elementwise, experts), strict=True))
    for kind in options.only:
        for work in makers[kind](place, options.quick):
            first = len(watcher.lines) if watcher else 0
            try:
                seconds, runs = repeated(work, options.seconds, options.device)
            except Exception as error:  # others' kernels may refuse a shape; psykern's failure is seen in the row
                print(
                    f"not measured: {work.name}, {work.shape}: {type(error).__name__}: {str(error)[:300]}", flush=True
                )
                continue
            row: dict[str, object] = {"kind": work.kind, "provider": work.name, "shape": work.shape}
            row |= {"seconds": float(f"{seconds:.4g}"), "runs": runs}
            row["tflops"] = round(work.flops / seconds / 1e12, 3) if work.flops else ""
            row["gb_per_second"] = round(work.num_bytes / seconds / 1e9, 1) if work.num_bytes else ""
            row |= watcher.since(first) if watcher else dict.fromkeys(("mhz", "watt", "celsius"), "")
            rows.append(row)
            print_row(row)
            if options.name:
                write_csv(options.name, rows, options.folder, options.device)
    if watcher:
        watcher.close()


if __name__ == "__main__":
    main()
