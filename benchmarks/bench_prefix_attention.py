"""prefix_attention beside torch's scaled_dot_product_attention (SDPA), at the heads of Qwen2.5-0.5B and of
Qwen3-0.6B, and beside itself without what it shares.

    causal     one sequence; SDPA with grouped keys as they are (enable_gqa)
    shared     8 sequences of 1,024 tokens, the first half common: one call, or 8 of their own (psykern_apart)
    branches   a transcript of 4,096 tokens with four 3-token options at every 50th position, the options' queries
               alone: one call, or one for each option (psykern_apart, sdpa_apart)
    window     16,384 tokens with a window of 512, or without one (no_window)

FLOPs: 4 Hq Dh for each pair of a query and a key that it sees, in each provider those of its own work. `psykern_times`
is a provider's time in times of psykern's. Sharing half of 8 sequences leaves 0.78 of the pairs, so 1.28 is what it can
gain at an equal rate. On a CPU stand beside it the processor's own peak for the inputs' dtype and the libraries' square
products (``rates.py``); `share_of_peak` compares best runs.

On a GPU (bf16, heads of 128) SDPA is torch's flash attention, and beside it stand psykern's other backends and, for
the first heads and the longest sequence, FlexAttention (compiled, with a block mask made beforehand). The sequences of
`shared` are one batch for SDPA (sdpa_batch), and `branches` has them as a user without branches computes them: each
option a sequence of its own, with all of its transcript up to there, the four of a place as one batch (sdpa_sequences).

    python benchmarks/bench_prefix_attention.py [--cases causal shared] [--repeats 5] [--name prefix_attention_cpu]
    python benchmarks/bench_prefix_attention.py --device cuda --name prefix_attention_gpu
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

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
from rates import Rates, begin_unheld, denominators
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from psykern import kernels


class Heads(NamedTuple):
    queries: int
    keys: int
    size: int


HEADS = (Heads(14, 2, 64), Heads(16, 8, 128))
GPU_HEADS = (Heads(16, 8, 128), Heads(32, 8, 128))  # of Qwen3-0.6B and of Qwen3-8B
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.03, torch.float16: 4e-3}  # of means of normal numbers


class Place(NamedTuple):
    device: torch.device = CPU
    dtype: torch.dtype = torch.float32
    beside: bool = False  # whatever else a user of a GPU would pick
    flex: bool = False  # FlexAttention too, which takes many seconds to compile
    square: int = 2048  # side of the libraries' product


class Provider(NamedTuple):
    run: Callable[[], Any]
    pairs: int  # of a query and a key, that it computes
    collect: Callable[[Any], Tensor] = lambda result: result  # what psykern gives, of its result; not timed


Providers = dict[str, Provider]


@dataclass(frozen=True)
class Problem:
    """Queries, keys and values with the segments of one call of ``psykern.kernels.prefix_attention``."""

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
        object.__setattr__(self, "segments", kernels.Segments(*(a.int() for a in arrays)))
        object.__setattr__(self, "pairs", sum(int(p.sum()) + len(p) for p in positions))

    def attend(self, window: int | None = None, backend: kernels.Backend = "auto") -> Tensor:
        scale = self.q.shape[2] ** -0.5
        return kernels.prefix_attention(
            self.q, self.k, self.v, self.segments, softmax_scale=scale, window=window, backend=backend
        )

    def apart(self) -> list[Problem]:
        """Each segment as a call of its own, on the same arrays."""
        starts = [0, *torch.tensor(self.lengths).cumsum(0).tolist()]
        return [
            Problem(self.q[starts[s] : starts[s + 1]], self.k, self.v, [self.lengths[s]], [self.paths[s]])
            for s in range(len(self.lengths))
        ]


def sdpa(segment: Problem) -> Tensor:
    """One segment; its queries are the last of its path."""
    (path,) = segment.paths
    keys, values = (
        torch.cat([x[a:b] for a, b in path]) if len(path) > 1 else x[slice(*path[0])] for x in (segment.k, segment.v)
    )
    n, end = len(segment.q), len(keys)
    mask: Tensor | None = None
    if n != end:
        on_gpu = segment.q.is_cuda
        mask = causal_lower_right(n, end) if on_gpu else torch.ones(n, end, dtype=torch.bool).tril(end - n)
    q, k, v = (x.transpose(0, 1)[None] for x in (segment.q, keys, values))
    with flash(segment.q):
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    return out[0].transpose(0, 1)


def flash(x: Tensor) -> AbstractContextManager[object]:
    """On a GPU torch's flash attention or an error, never a slower one in its place."""
    is_half = x.dtype in (torch.bfloat16, torch.float16)
    return sdpa_kernel(SDPBackend.FLASH_ATTENTION) if x.is_cuda and is_half else nullcontext()


def stacked(sequences: Sequence[Problem]) -> list[Tensor]:
    """Queries, keys and values of sequences of one length, [B, H, T, Dh] each."""
    return [torch.stack([getattr(s, name) for s in sequences]).transpose(1, 2) for name in "qkv"]


def sdpa_batch(inputs: Sequence[Tensor]) -> Tensor:
    """Whole sequences as one batch; [B, T, Hq, Dh]."""
    q, k, v = inputs
    with flash(q):
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def flex(problem: Problem) -> Callable[[], Tensor]:
    """FlexAttention of all segments at once: a mask by ranges of keys, as blocks."""
    device = problem.q.device
    ranges = [[*path, *[(0, 0)] * (2 - len(path))] for path in problem.paths]  # at most two
    of_query = torch.repeat_interleave(torch.arange(len(problem.lengths)), torch.tensor(problem.lengths))
    bounds = torch.tensor(ranges)[of_query].to(device)  # [N, 2, 2]
    own = torch.tensor([path[-1] for path in problem.paths])[of_query].to(device)  # [N, 2] where queries' keys stand
    starts = torch.tensor([0, *problem.lengths]).cumsum(0)[of_query]
    counts = torch.tensor(problem.lengths)[of_query]
    last = own[:, 1] - (counts - 1 - (torch.arange(len(of_query)) - starts)).to(device) - 1  # the query's own key

    def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        front, back = bounds[query, 0], bounds[query, 1]
        inside = ((key >= front[0]) & (key < front[1])) | ((key >= back[0]) & (key < back[1]))
        in_own = (key >= own[query, 0]) & (key < own[query, 1])
        return inside & (~in_own | (key <= last[query]))

    blocks = create_block_mask(visible, None, None, len(problem.q), len(problem.k), device=device)
    attention = compiled(flex_attention, device)
    q, k, v = (x.transpose(0, 1)[None] for x in (problem.q, problem.k, problem.v))
    return lambda: attention(q, k, v, block_mask=blocks, enable_gqa=True)[0].transpose(0, 1)


def draw(heads: Heads, lengths: list[int], paths: list[list[tuple[int, int]]], place: Place) -> Problem:
    torch.manual_seed(0)
    rows = max(b for path in paths for _, b in path)
    k, v = torch.randn(2, rows, heads.keys, heads.size, device=place.device).to(place.dtype)
    q = torch.randn(sum(lengths), heads.queries, heads.size, device=place.device).to(place.dtype)
    return Problem(q, k, v, lengths, paths)


def with_others(providers: Providers, problem: Problem, place: Place) -> Providers:
    """On a GPU also each backend by its name, and FlexAttention."""
    if not place.beside:
        return providers
    for backend in available(("triton", "cuda") if place.device.type == "cuda" else ("reference",), place.device):
        providers[f"psykern:{backend}"] = Provider(
            lambda backend=backend: problem.attend(backend=backend), problem.pairs
        )
    if place.flex:
        try:
            providers["flex_attention"] = Provider(flex(problem), problem.pairs)
        except Exception as error:
            print(f"not measured: flex_attention: {error!s:.200}")
    return providers


def causal(heads: Heads, tokens: int, place: Place) -> Providers:
    one = draw(heads, [tokens], [[(0, tokens)]], place)
    return with_others(
        {"psykern": Provider(one.attend, one.pairs), "sdpa": Provider(lambda: sdpa(one), one.pairs)}, one, place
    )


def shared(heads: Heads, tokens: int, place: Place) -> Providers:
    half = tokens // 2
    paths = [[(0, half)], *[[(0, half), (half * (i + 1), half * (i + 2))] for i in range(8)]]
    together = draw(heads, [half] * 9, paths, place)
    sequences = [
        Problem(
            torch.cat([together.q[:half], together.q[half * (i + 1) : half * (i + 2)]]),
            *keys,
            [tokens],
            [[(0, tokens)]],
        )
        for i in range(8)
        for keys in [[torch.cat([x[:half], x[half * (i + 1) : half * (i + 2)]]) for x in (together.k, together.v)]]
    ]

    def gather(outputs: Sequence[Tensor]) -> Tensor:
        return torch.cat([outputs[0][:half], *[out[half:] for out in outputs]])

    pairs = sum(s.pairs for s in sequences)
    providers: Providers = {
        "psykern": Provider(together.attend, together.pairs),
        "psykern_apart": Provider(lambda: [s.attend() for s in sequences], pairs, gather),
        "sdpa_apart": Provider(lambda: [sdpa(s) for s in sequences], pairs, gather),
    }
    if place.beside:
        batch = stacked(sequences)
        providers["sdpa_batch"] = Provider(lambda: sdpa_batch(batch), pairs, gather)
    return with_others(providers, together, place)


def branches(heads: Heads, tokens: int, place: Place) -> Providers:
    points = [point for point in range(50, tokens, 50) for _ in range(4)]
    paths = [[(0, point), (tokens + 3 * i, tokens + 3 * i + 3)] for i, point in enumerate(points)]
    options = draw(heads, [3] * len(points), paths, place)
    apart = options.apart()
    providers: Providers = {
        "psykern": Provider(options.attend, options.pairs),
        "psykern_apart": Provider(lambda: [s.attend() for s in apart], options.pairs, torch.cat),
        "sdpa_apart": Provider(lambda: [sdpa(s) for s in apart], options.pairs, torch.cat),
    }
    if place.beside:
        wholes = [whole(s) for s in apart]
        fours = [stacked(wholes[i : i + 4]) for i in range(0, len(wholes), 4)]
        providers["sdpa_sequences"] = Provider(
            lambda: [sdpa_batch(four) for four in fours],
            sum(s.pairs for s in wholes),
            lambda outputs: torch.cat([out[-3:] for four in outputs for out in four]),
        )
    return with_others(providers, options, place)


def whole(option: Problem) -> Problem:
    """An option as a sequence: queries for its path too, drawn anew, for nobody reads what becomes of them."""
    (path,) = option.paths
    k, v = (torch.cat([x[a:b] for a, b in path]) for x in (option.k, option.v))
    front = torch.randn(len(k) - len(option.q), *option.q.shape[1:], device=k.device).to(k.dtype)
    return Problem(torch.cat([front, option.q]), k, v, [len(k)], [[(0, len(k))]])


def window(heads: Heads, tokens: int, place: Place) -> Providers:
    one = draw(heads, [tokens], [[(0, tokens)]], place)
    width = min(512, tokens // 2)
    pairs = one.pairs - (tokens - width) * (tokens - width + 1) // 2
    return {"psykern": Provider(lambda: one.attend(width), pairs), "no_window": Provider(one.attend, one.pairs)}


# First what psykern is for, as a run may be cut.
CASES: dict[str, tuple[Callable[[Heads, int, Place], Providers], Sequence[int]]] = {
    "branches": (branches, (4096,)),
    "shared": (shared, (1024,)),
    "causal": (causal, (1024, 4096, 16_384)),
    "window": (window, (16_384,)),
}


def bench(case: str, heads: Heads, tokens: int, repeats: int, place: Place) -> list[dict[str, object]]:
    providers = CASES[case][0](heads, tokens, place)
    truth = providers["psykern"].run()

    def check(name: str, result: Any) -> None:
        if name != "no_window":
            torch.testing.assert_close(providers[name].collect(result), truth, atol=TOLERANCE[place.dtype], rtol=0)

    runs = keep_working({name: provider.run for name, provider in providers.items()}, check)
    if case != "window" and not {"sdpa", "sdpa_apart"} & runs.keys():
        raise SystemExit(f"{case} {tokens}: psykern agrees with no other provider: refused")
    works = denominators(place.dtype, place.square) if place.device == CPU else {}
    beside = {name: work.run for name, work in works.items()}
    timings = time_side_by_side(runs | beside, repeats, device=place.device)
    rates = Rates.of(works, timings) if works else None
    table = []
    for name in runs:
        timing = timings[name]
        gflop = 4 * heads.queries * heads.size * providers[name].pairs / 1e9
        table.append(
            {
                "case": f"{case} {tokens}",
                "heads": f"{heads.queries} ({heads.keys}) of {heads.size}",
                "tokens": tokens,
                "provider": name,
                **timing.columns(),
                "gflops": round(gflop / timing.median, 1),
                "share_of_peak": "" if rates is None else rates.share(gflop / timing.best),
                "psykern_times": round(timing.median / timings["psykern"].median, 2),
                **({} if rates is None else rates.columns()),
            }
        )
        print_row(table[-1])
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--name", help="CSV and PNG in results/; default: no file")
    add_arguments(parser)
    options = parser.parse_args(arguments)
    place = Place(options.device, dtype_of(options), beside=options.quick or options.device.type == "cuda")
    place = place._replace(square=64) if options.quick else place
    some_heads = (Heads(4, 2, 16),) if options.quick else HEADS if options.device.type == "cpu" else GPU_HEADS
    table = []
    for case in options.cases:
        for heads in some_heads:
            sizes = (128,) if options.quick else CASES[case][1]
            for tokens in sizes:
                at = place._replace(flex=place.beside and (heads, tokens) == (some_heads[0], sizes[-1]))
                table += bench(case, heads, tokens, options.repeats, at)
                if options.name:
                    write_csv(options.name, table, options.folder, options.device)
    if options.name:
        y = "share_of_peak" if options.device.type == "cpu" else "psykern_times"
        drawing = {"x": "case", "y": y, "panel": "heads"}
        write_results(options.name, table, **drawing, folder=options.folder, device=options.device)


if __name__ == "__main__":
    begin_unheld()
    main()
