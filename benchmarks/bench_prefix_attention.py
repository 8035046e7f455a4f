"""prefix_attention on the CPU beside torch's scaled_dot_product_attention (SDPA), at the heads of Qwen2.5-0.5B and of
Qwen3-0.6B, and beside itself without what it shares.

    causal     one sequence; SDPA with grouped keys as they are (enable_gqa)
    shared     8 sequences of 1,024 tokens, the first half common: one call, or 8 of their own (psykern_apart)
    branches   a transcript of 4,096 tokens with four 3-token options at every 50th position, the options' queries
               alone: one call, or one for each option (psykern_apart, sdpa_apart)
    window     16,384 tokens with a window of 512, or without one (no_window)

FLOPs: 4 Hq Dh for each pair of a query and a key that it sees, in each provider those of its own work. `psykern_times`
is a provider's time in times of psykern's. Sharing half of 8 sequences leaves 0.78 of the pairs, so 1.28 is what it can
gain at an equal rate.

    python benchmarks/bench_prefix_attention.py [--cases causal shared] [--repeats 5] [--name prefix_attention_cpu]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from harness import SGEMM_FLOPS, print_row, sgemm, time_side_by_side, write_results
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from psykern import kernels


class Heads(NamedTuple):
    queries: int
    keys: int
    size: int


HEADS = (Heads(14, 2, 64), Heads(16, 8, 128))
TOLERANCE = 2e-5


@dataclass(frozen=True)
class Segments:
    """Queries, keys and values with the segments of one call; see ``psykern.kernels.prefix_attention``."""

    q: Tensor  # [N, Hq, Dh]
    k: Tensor  # [M, Hkv, Dh]
    v: Tensor  # [M, Hkv, Dh]
    lengths: list[int]  # [S] queries
    paths: list[list[tuple[int, int]]]  # [S] ranges of keys; the last ends with the segment's own

    def __post_init__(self) -> None:
        ends = [sum(b - a for a, b in path) for path in self.paths]
        positions = [torch.arange(end - n, end) for end, n in zip(ends, self.lengths, strict=True)]
        counts = [len(path) for path in self.paths]
        arrays = (
            torch.cat(positions),
            torch.tensor([0, *self.lengths]).cumsum(0),
            torch.tensor([0, *counts]).cumsum(0),
            torch.tensor([r for path in self.paths for r in path]),
        )
        object.__setattr__(self, "arrays", tuple(a.int() for a in arrays))
        object.__setattr__(self, "pairs", sum(int(p.sum()) + len(p) for p in positions))

    def attend(self, window: int | None = None) -> Tensor:
        scale = self.q.shape[2] ** -0.5
        return kernels.prefix_attention(
            self.q, self.k, self.v, *self.arrays, softmax_scale=scale, window=window, backend="cpu"
        )

    def apart(self) -> list[Segments]:
        """Each segment as a call of its own, on the same arrays."""
        starts = [0, *torch.tensor(self.lengths).cumsum(0).tolist()]
        return [
            Segments(self.q[starts[s] : starts[s + 1]], self.k, self.v, [self.lengths[s]], [self.paths[s]])
            for s in range(len(self.lengths))
        ]


def sdpa(segment: Segments) -> Tensor:
    """One segment; its queries are the last of its path."""
    (path,) = segment.paths
    keys, values = (
        torch.cat([x[a:b] for a, b in path]) if len(path) > 1 else x[slice(*path[0])] for x in (segment.k, segment.v)
    )
    n, end = len(segment.q), len(keys)
    mask = None if n == end else torch.ones(n, end, dtype=torch.bool).tril(end - n)
    q, k, v = (x.transpose(0, 1)[None] for x in (segment.q, keys, values))
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    return out[0].transpose(0, 1)


def draw(heads: Heads, lengths: list[int], paths: list[list[tuple[int, int]]]) -> Segments:
    torch.manual_seed(0)
    rows = max(b for path in paths for _, b in path)
    k, v = torch.randn(2, rows, heads.keys, heads.size)
    return Segments(torch.randn(sum(lengths), heads.queries, heads.size), k, v, lengths, paths)


Providers = dict[str, tuple[Callable[[], Tensor], int]]  # what to run, and how many pairs it computes


def causal(heads: Heads, tokens: int) -> Providers:
    one = draw(heads, [tokens], [[(0, tokens)]])
    return {"psykern": (one.attend, one.pairs), "sdpa": (lambda: sdpa(one), one.pairs)}


def shared(heads: Heads, tokens: int) -> Providers:
    half = tokens // 2
    paths = [[(0, half)], *[[(0, half), (half * (i + 1), half * (i + 2))] for i in range(8)]]
    together = draw(heads, [half] * 9, paths)
    sequences = [
        Segments(
            torch.cat([together.q[:half], together.q[half * (i + 1) : half * (i + 2)]]),
            *keys,
            [tokens],
            [[(0, tokens)]],
        )
        for i in range(8)
        for keys in [[torch.cat([x[:half], x[half * (i + 1) : half * (i + 2)]]) for x in (together.k, together.v)]]
    ]

    def gather(outputs: list[Tensor]) -> Tensor:
        return torch.cat([outputs[0][:half], *[out[half:] for out in outputs]])

    pairs = sum(s.pairs for s in sequences)
    return {
        "psykern": (together.attend, together.pairs),
        "psykern_apart": (lambda: gather([s.attend() for s in sequences]), pairs),
        "sdpa_apart": (lambda: gather([sdpa(s) for s in sequences]), pairs),
    }


def branches(heads: Heads, tokens: int) -> Providers:
    points = [point for point in range(50, tokens, 50) for _ in range(4)]
    paths = [[(0, point), (tokens + 3 * i, tokens + 3 * i + 3)] for i, point in enumerate(points)]
    options = draw(heads, [3] * len(points), paths)
    apart = options.apart()
    return {
        "psykern": (options.attend, options.pairs),
        "psykern_apart": (lambda: torch.cat([s.attend() for s in apart]), options.pairs),
        "sdpa_apart": (lambda: torch.cat([sdpa(s) for s in apart]), options.pairs),
    }


def window(heads: Heads, tokens: int) -> Providers:
    one = draw(heads, [tokens], [[(0, tokens)]])
    width = 512
    pairs = one.pairs - (tokens - width) * (tokens - width + 1) // 2
    return {"psykern": (lambda: one.attend(width), pairs), "no_window": (one.attend, one.pairs)}


CASES: dict[str, tuple[Callable[[Heads, int], Providers], Sequence[int]]] = {
    "causal": (causal, (1024, 4096, 16_384)),
    "shared": (shared, (1024,)),
    "branches": (branches, (4096,)),
    "window": (window, (16_384,)),
}


def bench(case: str, heads: Heads, tokens: int, repeats: int) -> list[dict[str, object]]:
    providers = CASES[case][0](heads, tokens)
    truth = providers["psykern"][0]()
    for name, (run, _) in providers.items():
        if name != "no_window":
            torch.testing.assert_close(run(), truth, atol=TOLERANCE, rtol=0)
    timings = time_side_by_side({**{name: run for name, (run, _) in providers.items()}, "sgemm": sgemm}, repeats)
    table = []
    for name, (_, pairs) in providers.items():
        gflops = 4 * heads.queries * heads.size * pairs / timings[name].median / 1e9
        table.append(
            {
                "case": f"{case} {tokens}",
                "heads": f"{heads.queries} ({heads.keys}) of {heads.size}",
                "tokens": tokens,
                "provider": name,
                **timings[name].columns(),
                "gflops": round(gflops, 1),
                "sgemm_gflops": round(SGEMM_FLOPS / timings["sgemm"].median / 1e9, 1),
                "psykern_times": round(timings[name].median / timings["psykern"].median, 2),
            }
        )
        print_row(table[-1])
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--name", help="CSV and PNG in results/; default: no file")
    options = parser.parse_args(arguments)
    table = [
        row
        for case in options.cases
        for heads in HEADS
        for tokens in CASES[case][1]
        for row in bench(case, heads, tokens, options.repeats)
    ]
    if options.name:
        write_results(options.name, table, x="case", y="psykern_times", panel="heads")


if __name__ == "__main__":
    main()
