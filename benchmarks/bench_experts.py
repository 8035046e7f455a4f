"""The products of a mixture of experts beside those of a dense layer, at the shape of Qwen3-30B-A3B, and beside the
processor's own peak (``rates.py``).

Cases: ``gate_up`` is ``expert_swiglu``, which gathers its rows, ``down`` is ``expert_linear``, which scatters them.
Each row goes to 8 of 128 experts: ``even`` gives each expert as many rows, ``skewed`` prefers expert e by
(e + 1)^-0.7. ``psykern_loop`` is ``swiglu`` or ``linear`` of each expert's rows in turn, sorted beforehand and left in
that order: the same products on the same rows. ``psykern_whole`` is one such product of all rows with the weights of
one expert: what a dense layer of that shape would take, which packs its weights for more rows and reads them from a
cache. ``reference`` is a loop of torch's products. FLOPs: 2 N k K M, twice that for ``gate_up``; rates and shares are
those of the best run.

    python benchmarks/bench_experts.py [--rows 64 2048 8192] [--dtypes float32 bfloat16] [--repeats 5] [--name NAME]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from harness import DTYPES, RESULTS, keep_working, print_row, time_side_by_side, write_csv
from rates import Work, begin_unheld, best_gflops, peaks
from torch import Tensor
from torch.nn import functional

from psykern import kernels
from psykern.kernels.routes import Routes

ROWS = (64, 2048, 8192)
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}  # results are about normal; bf16 rounds the result


@dataclass(frozen=True, slots=True)
class Shape:
    hidden: int
    inner: int
    experts: int
    top_k: int


QWEN3_30B_A3B, TINY = Shape(2048, 768, 128, 8), Shape(64, 32, 4, 2)


def routes_of(rows: int, shape: Shape, routing: str) -> Routes:
    if routing == "even":
        first = torch.arange(rows)[:, None] * shape.top_k
        return Routes.of((first + torch.arange(shape.top_k)) % shape.experts, shape.experts)
    liked = (1 + torch.arange(shape.experts)).float() ** -0.7
    return Routes.of(torch.multinomial(liked.expand(rows, -1), shape.top_k), shape.experts)


@dataclass(frozen=True, slots=True)
class Case:
    """Rows of either product, and its weights."""

    x: Tensor  # [N, K] of gate_up, [N * k, K] of down
    weights: tuple[list[Tensor], ...]  # gates and ups, or downs: [M, K] of each expert
    routes: Routes

    @classmethod
    def of(cls, layer: str, rows: int, shape: Shape, routing: str, dtype: torch.dtype) -> Case:
        torch.manual_seed(0)
        is_down = layer == "down"
        count, k, m = (rows * shape.top_k, shape.inner, shape.hidden) if is_down else (rows, shape.hidden, shape.inner)
        weights = [(torch.randn(shape.experts, m, k) * k**-0.5).to(dtype) for _ in range(1 if is_down else 2)]
        of_experts = tuple([each.clone() for each in weight] for weight in weights)  # arrays of their own, as in a file
        return cls(torch.randn(count, k).to(dtype), of_experts, routes_of(rows, shape, routing))

    @property
    def sorted_x(self) -> Tensor:
        """[N * k, K]"""
        return self.x if len(self.weights) == 1 else self.x[self.routes.slots.long() // self.routes.top_k]

    @property
    def flops(self) -> float:
        return 2.0 * len(self.routes.slots) * sum(weight[0].numel() for weight in self.weights)

    def grouped(self, out: Tensor, backend: kernels.Backend) -> Tensor:
        if len(self.weights) == 1:
            return kernels.expert_linear(self.x, self.weights[0], self.routes, out=out, backend=backend)
        return kernels.expert_swiglu(self.x, *self.weights, self.routes, out=out, backend=backend)

    def one(self, rows: Tensor, expert: int, out: Tensor) -> Tensor:
        """A dense layer's product of rows with one expert."""
        layers = [(weight[expert], None) for weight in self.weights]
        if len(layers) == 1:
            return kernels.linear(rows, layers, [out], backend="cpu")[0]
        return kernels.swiglu(rows, *layers, out=out, backend="cpu")

    def expected(self, experts: Sequence[int]) -> Tensor:
        """In the order of slots sorted by expert, in fp32; ``experts``: whose weights each expert's rows meet."""
        results = []
        for rows, expert in zip(self.sorted_x.split(self.counts), experts, strict=True):
            first, *second = (rows.float() @ weight[expert].float().T for weight in self.weights)
            results.append(functional.silu(first) * second[0] if second else first)
        return torch.cat(results)

    @property
    def counts(self) -> list[int]:
        return self.routes.offsets.diff().tolist()


def providers_of(case: Case) -> dict[str, Callable[[], Tensor]]:
    sorted_x = case.sorted_x
    out = case.x.new_empty(len(sorted_x), len(case.weights[0][0]))
    spans = [(first, last) for first, last in pairwise(case.routes.offsets.tolist())]

    def loop() -> Tensor:
        for expert, (first, last) in enumerate(spans):
            if first < last:
                case.one(sorted_x[first:last], expert, out[first:last])
        return out

    return {
        "psykern": lambda: case.grouped(out, "cpu"),
        "psykern_loop": loop,
        "psykern_whole": lambda: case.one(sorted_x, 0, out),
        "reference": lambda: case.grouped(out, "reference"),
    }


def checked(case: Case) -> dict[str, Callable[[], Tensor]]:
    experts = range(len(case.counts))
    own, whole = case.expected(experts), case.expected([0] * len(experts))

    def check(name: str, result: Tensor) -> None:
        in_order = result[case.routes.slots.long()] if len(case.weights) == 1 and name in SCATTERED else result
        expected = whole if name == "psykern_whole" else own
        torch.testing.assert_close(in_order.float(), expected, atol=TOLERANCE[case.x.dtype], rtol=0.01)

    return keep_working(providers_of(case), check)


SCATTERED = ("psykern", "reference")  # whose results of down are in the order of slots


def bench(case: Case, repeats: int) -> list[dict[str, object]]:
    works = {name: Work(run, case.flops) for name, run in checked(case).items()}
    own = peaks(case.x.dtype)
    timings = time_side_by_side({name: work.run for name, work in (own | works).items()}, repeats)
    peak = best_gflops(own, timings)
    rates = {name: work.gflops(timings[name]) for name, work in works.items()}
    return [
        {
            "rows": case.routes.num_rows,
            "least_rows_of_expert": min(case.counts),
            "most_rows_of_expert": max(case.counts),
            "dtype": str(case.x.dtype).removeprefix("torch."),
            "provider": name,
            **timings[name].columns(),
            "gflops": round(rates[name], 1),
            "share_of_loop": round(rates[name] / rates["psykern_loop"], 3),
            "share_of_whole": round(rates[name] / rates["psykern_whole"], 3),
            "peak_gflops": round(peak, 1),
            "share_of_peak": round(rates[name] / peak, 3),
        }
        for name in works
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=("float32", "bfloat16"))
    parser.add_argument("--routings", nargs="+", choices=("even", "skewed"), default=("even", "skewed"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that everything runs")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where files go")
    parser.add_argument("--name", help="CSV in results/; default: no file")
    options = parser.parse_args(arguments)
    shape = TINY if options.quick else QWEN3_30B_A3B
    table: list[dict[str, object]] = []
    for dtype in options.dtypes:
        for rows in (5,) if options.quick else options.rows:
            for routing in options.routings:
                for layer in ("gate_up", "down"):
                    for row in bench(Case.of(layer, rows, shape, routing, DTYPES[dtype]), options.repeats):
                        table.append({"layer": layer, "routing": routing, **row})
                        print_row(table[-1])
                    if options.name:
                        write_csv(options.name, table, options.folder)


if __name__ == "__main__":
    begin_unheld()
    main()
