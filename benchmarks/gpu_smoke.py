"""Is each operation right on this GPU, at the shapes that the engine gives it? A minute, before anything else.

    CUDA_LAUNCH_BLOCKING=1 python benchmarks/gpu_smoke.py --device cuda --name smoke --folder FOLDER

Each operation of each backend runs twice on the same random inputs: the results must be those of plain torch in fp32,
which is given the same numbers, and the second run's bytes those of the first: an error that moves is a race. What
stands in the store outside the ranges of a query is NaN. Each group of operations has a process of its own in each
dtype: most of the time is compiling, and an illegal address ends a process's use of the device. Exit status: 0, or 1
if something is wrong.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from bench_prefix_attention import Heads, Place, Problem, draw
from harness import DTYPES, add_arguments, dtype_of, print_row, write_csv
from torch import Tensor

from psykern import kernels

GROUPS = ("attention", "head", "elementwise", "products", "experts")
SECONDS = 70  # that a process may take
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}  # of the largest number


class Case(NamedTuple):
    name: str
    run: Callable[[kernels.Backend], Sequence[Tensor]]
    expected: Callable[[], Sequence[Tensor]]
    tolerance: float
    backends: tuple[kernels.Backend, ...] = ("triton",)


def attention(place: Place, quick: bool) -> Iterator[Case]:
    """Causal, several ranges, options as tails, a window; heads of Qwen3-8B and of Llama-3.2-1B."""
    many = 40 if quick else 1500
    for heads in (Heads(4, 2, 16),) if quick else (Heads(32, 8, 128), Heads(32, 8, 64)):
        points = list(range(many // 3, many, max(2, many // 30)))
        shared, options = (many // 2, many), (many, many + 3 * len(points))
        problems = {
            "causal": draw(heads, [many], [[(0, many)]], place),
            "ranges": draw(
                heads, [many // 2, 7], [[(0, many // 3), shared], [(3, many // 3), (many, many + 9)]], place
            ),
            "tails": draw(
                heads,
                [3] * len(points),
                [[(0, p), (options[0] + 3 * i, options[0] + 3 * i + 3)] for i, p in enumerate(points)],
                place,
            ),
        }
        for name, problem in problems.items():
            poison(problem)
            for window in (None, many // 5) if heads.size != 64 else (None,):
                yield attention_case(f"{name}, {heads}, window {window}", problem, window, TOLERANCE[place.dtype])


def poison(problem: Problem) -> None:
    """NaN in every row of the store that no path holds."""
    seen = torch.zeros(len(problem.k), dtype=torch.bool)
    for path in problem.paths:
        for begin, end in path:
            seen[begin:end] = True
    for x in (problem.k, problem.v):
        x[~seen.to(x.device)] = float("nan")


def attention_case(name: str, problem: Problem, window: int | None, tolerance: float) -> Case:
    wide = [x.nan_to_num(0.0).float() for x in (problem.q, problem.k, problem.v)]
    options = {"softmax_scale": problem.q.shape[2] ** -0.5, "window": window}

    def expected() -> Sequence[Tensor]:
        return [kernels.prefix_attention(*wide, problem.segments, backend="reference", **options)]

    def run(backend: kernels.Backend) -> Sequence[Tensor]:
        out = torch.full_like(problem.q, float("nan"))
        arrays = (problem.q, problem.k, problem.v, problem.segments)
        return [kernels.prefix_attention(*arrays, out=out, backend=backend, **options)]

    return Case(name, run, expected, tolerance)


def head(place: Place, quick: bool) -> Iterator[Case]:
    for vocabulary, size in ((300, 24),) if quick else ((151_936, 4096), (151_936, 1024), (128_256, 2048)):
        weight = normal(place, vocabulary, size) * 0.05
        for rows in (1, 9) if quick else (1, 16, 33, 2048, 4099):
            hidden = normal(place, rows, size)
            offsets = torch.arange(rows + 1, device=place.device) * 2
            ids = torch.randint(vocabulary, (2 * rows,), dtype=torch.int32, device=place.device)
            yield head_case(f"R {rows}, V {vocabulary}, D {size}", hidden, weight, offsets, ids)


def head_case(name: str, hidden: Tensor, weight: Tensor, offsets: Tensor, ids: Tensor) -> Case:
    def parts(found: kernels.OptionLogprobs) -> Sequence[Tensor]:
        return [found.lse, found.logits, found.entropy]

    def expected() -> Sequence[Tensor]:
        whole = [torch.nn.functional.linear(h.float(), weight.float()) for h in hidden.split(512)]
        lse = torch.cat([z.double().logsumexp(1) for z in whole])
        entropy = torch.cat([torch.distributions.Categorical(logits=z).entropy() for z in whole])
        row = torch.repeat_interleave(offsets.diff())
        logits = (hidden.float()[row] * weight.float()[ids.long()]).sum(1)
        return [lse.float(), logits, entropy]

    def run(backend: kernels.Backend) -> Sequence[Tensor]:
        return parts(kernels.option_logprobs(hidden, weight, offsets, ids, backend=backend))

    return Case(name, run, expected, 1e-4, ("triton", "cuda"))  # sums are fp32 whatever the inputs


def elementwise(place: Place, quick: bool) -> Iterator[Case]:
    rows = 9 if quick else 4099
    for sizes in ((24, 40, 3, 8),) if quick else ((4096, 12_288, 32, 128), (1024, 3072, 16, 128)):
        yield from elementwise_of(place, rows, *sizes)


def elementwise_of(place: Place, rows: int, size: int, inner: int, heads: int, width: int) -> Iterator[Case]:
    x, y, weight = normal(place, rows, size), normal(place, rows, size), normal(place, size)
    gate_up = normal(place, rows, 2 * inner)
    q = normal(place, rows, (heads + 2) * width)[:, : heads * width].unflatten(1, (heads, width))  # rows lie apart
    table = torch.rand(rows + 5, width // 2, device=place.device)
    positions = torch.randint(rows, (rows,), dtype=torch.int32, device=place.device)

    def norm(backend: kernels.Backend, wide: bool = False) -> Sequence[Tensor]:
        a, b, w = (t.float() if wide else t for t in (x, y, weight))
        return kernels.add_rms_norm(a, b, w, 1e-6, backend=backend)

    def rotate(backend: kernels.Backend, wide: bool = False) -> Sequence[Tensor]:
        a, w = (t.float() if wide else t for t in (q, weight[:width]))
        return [kernels.qk_norm_rope(a, w, table, table, positions, 1e-6, backend=backend)]

    def gated(backend: kernels.Backend, wide: bool = False) -> Sequence[Tensor]:
        both = gate_up.float() if wide else gate_up
        return [kernels.silu_mul(both[:, :inner], both[:, inner:], backend=backend)]

    for name, run in (("add_rms_norm", norm), ("qk_norm_rope", rotate), ("silu_mul", gated)):
        expected = partial(run, "reference", True)
        yield Case(f"{name}, {rows} x {size}", run, expected, TOLERANCE[place.dtype], ("triton", "cuda"))


def products(place: Place, quick: bool) -> Iterator[Case]:
    rows, size, inner = (9, 24, 40) if quick else (4099, 4096, 12_288)
    x = normal(place, rows, size)
    gate, up = (normal(place, inner, size) * size**-0.5 for _ in range(2))
    store = normal(place, rows + 7, inner)

    def linear(backend: kernels.Backend) -> Sequence[Tensor]:
        """Into rows of a larger array, added to what is there."""
        outs = [store.clone()[5 : 5 + rows], torch.empty_like(store)[:rows]]
        kernels.linear(x, [(gate, None)], outs[:1], add=True, backend=backend)
        kernels.linear(x, [(up, None)], outs[1:], backend=backend)
        return outs

    def linear_wide() -> Sequence[Tensor]:
        return [store[5 : 5 + rows].float() + x.float() @ gate.float().T, x.float() @ up.float().T]

    def swiglu_wide() -> Sequence[Tensor]:
        return [torch.nn.functional.silu(x.float() @ gate.float().T) * (x.float() @ up.float().T)]

    most = 2 * TOLERANCE[place.dtype]
    yield Case("linear", linear, linear_wide, most)
    yield Case("swiglu", lambda b: [kernels.swiglu(x, (gate, None), (up, None), backend=b)], swiglu_wide, most)


def experts(place: Place, quick: bool) -> Iterator[Case]:
    """Of Qwen3-30B-A3B; the experts' shares of rows differ, and some have none."""
    size, inner, num_experts = (24, 40, 5) if quick else (2048, 768, 128)
    gates, ups = (normal(place, num_experts, inner, size) * size**-0.5 for _ in range(2))
    weights = (gates, ups, normal(place, num_experts, size, inner) * inner**-0.5)
    for rows in (9,) if quick else (300, 4099):
        likes = torch.rand(rows, num_experts, device=place.device) - torch.arange(num_experts, device=place.device) / 80
        yield from experts_of(place, likes.topk(2 if quick else 8).indices, weights)


def experts_of(place: Place, chosen: Tensor, weights: tuple[Tensor, Tensor, Tensor]) -> Iterator[Case]:
    num_experts, size, inner = weights[2].shape
    rows, routes = len(chosen), kernels.Routes.of(chosen, num_experts)
    x, each = normal(place, rows, size), normal(place, chosen.numel(), size)
    gated, shares = normal(place, chosen.numel(), inner), torch.rand(chosen.shape, device=place.device)

    def swiglu(backend: kernels.Backend, wide: bool = False) -> Sequence[Tensor]:
        a, gates, ups = (t.float() if wide else t for t in (x, *weights[:2]))
        return [kernels.expert_swiglu(a, gates, ups, routes, backend=backend)]

    def linear(backend: kernels.Backend, wide: bool = False) -> Sequence[Tensor]:
        a, downs = (t.float() if wide else t for t in (gated, weights[2]))
        return [kernels.expert_linear(a, downs, routes, backend=backend)]

    def add(backend: kernels.Backend, wide: bool = False) -> Sequence[Tensor]:
        a, total = (t.float() if wide else t for t in (each, x.clone()))
        return [kernels.add_weighted(a, shares, total, backend=backend)]

    for name, run in (("expert_swiglu", swiglu), ("expert_linear", linear), ("add_weighted", add)):
        yield Case(f"{name}, {rows} rows", run, partial(run, "reference", True), 2 * TOLERANCE[place.dtype])


def normal(place: Place, *shape: int) -> Tensor:
    return torch.randn(shape, device=place.device, dtype=torch.float32).to(place.dtype)


def checked(case: Case, backend: kernels.Backend, place: Place) -> dict[str, object]:
    """A row: what was found of a case."""
    row: dict[str, object] = {"case": case.name, "backend": backend, "dtype": str(place.dtype).removeprefix("torch.")}
    row |= dict.fromkeys(("max_error", "rms_error", "seconds", "is_right", "error"), "")
    try:
        first = [t.clone() for t in case.run(backend)]
        synchronize(place)
        start = time.perf_counter()
        second = case.run(backend)
        synchronize(place)
        row["seconds"] = round(time.perf_counter() - start, 5)
        pairs = list(zip(first, case.expected(), strict=True))
        scale = max(1.0, *(float(right.abs().max()) for _, right in pairs))
        off = [(got.float() - right).abs() for got, right in pairs]
        row["max_error"] = float(f"{max(float(o.max()) for o in off) / scale:.3g}")
        row["rms_error"] = float(f"{max(float(o.square().mean().sqrt()) for o in off) / scale:.3g}")
        is_same = all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(first, second, strict=True))
        row["is_right"] = bool(max(float(o.max()) for o in off) <= case.tolerance * scale) and is_same
        row["error"] = "" if is_same else "the second run gave other bytes"
    except Exception as error:
        row |= {"is_right": False, "error": f"{type(error).__name__}: {error!s:.300}".replace("\n", " ")}
    return row


def synchronize(place: Place) -> None:
    if place.device.type == "cuda":
        torch.cuda.synchronize(place.device)


def check_group(options: argparse.Namespace) -> bool:
    makers = dict(zip(GROUPS, (attention, head, elementwise, products, experts), strict=True))
    rows: list[dict[str, object]] = []
    torch.manual_seed(0)
    place = Place(options.device, dtype_of(options))
    with torch.inference_mode():
        for case in makers[options.group](place, options.quick):
            for backend in case.backends if options.device.type == "cuda" else ("reference", "cpu"):
                rows.append(checked(case, backend, place))
                print_row(rows[-1])
                if options.name:
                    name = f"{options.name}_{options.group}_{rows[-1]['dtype']}"
                    write_csv(name, rows, options.folder, options.device)
    return all(bool(row["is_right"]) for row in rows)


def describe(device: torch.device) -> None:
    import triton

    print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, triton {triton.__version__}")
    if device.type == "cuda":
        print(f"cuDNN {torch.backends.cudnn.version()}, {torch.cuda.get_device_properties(device)}")
        print(subprocess.run(["nvidia-smi"], capture_output=True, text=True, check=False).stdout)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--group", choices=GROUPS, help="one, in this process; default: all, each in its own")
    parser.add_argument("--name", help="CSV files in results/, by group; default: none")
    given = list(arguments if arguments is not None else sys.argv[1:])
    options = parser.parse_args(given)
    if options.group:
        sys.exit(0 if check_group(options) else 1)
    describe(options.device)
    own = [sys.executable, str(Path(__file__).resolve()), *given]
    dtypes = [options.dtype] if options.dtype else list(DTYPES)
    begun = {
        f"{group} {dtype}": subprocess.Popen([*own, "--group", group, "--dtype", dtype])
        for group in GROUPS
        for dtype in dtypes
    }
    failed, end = [], time.monotonic() + SECONDS
    for name, process in begun.items():
        try:
            if process.wait(max(0.1, end - time.monotonic())) != 0:
                failed.append(name)
        except subprocess.TimeoutExpired:
            process.kill()
            failed.append(f"{name} (took more than {SECONDS} s)")
    print("wrong: " + ", ".join(failed) if failed else "all right")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
