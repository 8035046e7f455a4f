"""psykern's products with weights beside those of libraries, at the layers of Qwen2.5-0.5B and Qwen3-0.6B, and beside
the processor's own peak (``rates.py``).

Layers are what a decoder multiplies at once: ``qkv`` queries, keys and values of the same rows, ``o`` the projection
behind attention, ``gate_up`` and ``down``. psykern reads weights as a file has them and packs them in each call;
``onednn`` has packed them beforehand, once for each number of rows; ``mm`` and ``openblas`` are given the layers of
``qkv`` and ``gate_up`` as one. Inputs and weights have one dtype. FLOPs: 2 N K M;
rates and shares are those of the best run.

    python benchmarks/bench_linear.py [--rows 64 2048] [--dtypes float32 bfloat16] [--repeats 9] [--name linear_cpu]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from harness import DTYPES, RESULTS, keep_working, print_row, time_side_by_side, write_csv, write_results
from rates import Work, begin_unheld, best_gflops, libraries, peaks
from shapes import SHAPES
from torch import Tensor

from psykern import kernels

MODELS = ("Qwen2.5-0.5B", "Qwen3-0.6B")
ROWS = (1, 16, 64, 256, 2048)
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}  # results are about normal; bf16 rounds the result
RUN_SECONDS = 0.01  # of a timed run: small products are repeated


def layers_of(model: str) -> dict[str, tuple[int, list[int]]]:
    """K and the layers' M by name."""
    shape = SHAPES[model]
    hidden, inner = int(shape["hidden_size"]), int(shape["intermediate_size"])
    queries, keys = (int(shape[key]) * int(shape["head_dim"]) for key in ("num_attention_heads", "num_key_value_heads"))
    return {
        "qkv": (hidden, [queries, keys, keys]),
        "o": (queries, [hidden]),
        "gate_up": (hidden, [inner, inner]),
        "down": (inner, [hidden]),
    }


def providers_of(x: Tensor, weights: Sequence[Tensor]) -> dict[str, Callable[[], Tensor]]:
    """Each gives [N, all M] side by side."""
    out = x.new_empty(len(x), sum(map(len, weights)))
    outs = out.split([len(w) for w in weights], dim=1)

    def own() -> Tensor:
        kernels.linear(x, [(w, None) for w in weights], outs, backend="cpu")
        return out

    return {"psykern": own, **libraries(x, torch.cat(list(weights)))}


def bench(rows: int, k: int, sizes: Sequence[int], dtype: torch.dtype, repeats: int) -> list[dict[str, object]]:
    torch.manual_seed(0)
    x = torch.randn(rows, k).to(dtype)
    weights = [(torch.randn(m, k) * k**-0.5).to(dtype) for m in sizes]
    expected = x.float() @ torch.cat(weights).float().T

    def check(name: str, result: Tensor) -> None:
        del name
        torch.testing.assert_close(result.float(), expected, atol=TOLERANCE[dtype], rtol=0)

    flops = 2.0 * rows * k * sum(sizes)
    providers = keep_working(providers_of(x, weights), check)
    once = time_side_by_side(providers, repeats=3)
    works = {name: repeated(run, flops, once[name].median) for name, run in providers.items()}
    own = peaks(dtype)
    timings = time_side_by_side({name: work.run for name, work in (own | works).items()}, repeats)
    peak = best_gflops(own, timings)
    rates = {name: work.gflops(timings[name]) for name, work in works.items()}
    return [
        {
            "rows": rows,
            "k": k,
            "m": sum(sizes),
            "dtype": str(dtype).removeprefix("torch."),
            "provider": name,
            **{column: seconds_of_one(works[name], flops, value) for column, value in timings[name].columns().items()},
            "gflops": round(rates[name], 1),
            "peak_gflops": round(peak, 1),
            "share_of_peak": round(rates[name] / peak, 3),
        }
        for name in providers
    ]


def repeated(run: Callable[[], object], flops: float, seconds: float) -> Work:
    """As often as fills ``RUN_SECONDS``."""
    times = max(1, round(RUN_SECONDS / seconds))

    def runs() -> None:
        for _ in range(times):
            run()

    return Work(runs, flops * times)


def seconds_of_one(work: Work, flops: float, seconds: object) -> float:
    return float(f"{float(str(seconds)) * flops / work.flops:.4g}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=("float32", "bfloat16"))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that everything runs")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where files go")
    parser.add_argument("--name", help="CSV and PNG in results/; default: no file")
    options = parser.parse_args(arguments)
    table: list[dict[str, object]] = []
    for model in options.models[:1] if options.quick else options.models:
        for layer, (k, sizes) in ({"qkv": (64, [32, 16, 16])} if options.quick else layers_of(model)).items():
            for dtype in options.dtypes:
                for rows in (5,) if options.quick else options.rows:
                    for row in bench(rows, k, sizes, DTYPES[dtype], options.repeats):
                        table.append({"model": model, "layer": layer, **row, "panel": f"{model} {layer}, {dtype}"})
                        print_row(table[-1])
                if options.name:
                    write_csv(options.name, table, options.folder)
    if options.name:
        write_results(options.name, table, x="rows", y="share_of_peak", panel="panel", folder=options.folder)


if __name__ == "__main__":
    begin_unheld()
    main()
