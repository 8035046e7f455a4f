"""option_logprobs beside what a user writes, ``log_softmax(hidden @ weight.T)`` and a gather, at the study's
vocabularies; and beside the processor's own peak and the libraries' square products of the same run (``rates.py``; on
a GPU ``gemm``: the plain product ``hidden @ weight.T`` itself). psykern_bf16 has weights in bf16, psykern_bf16_both the
hidden states too, so its peak is that of bf16.

On a GPU also beside torch compiled, liger-kernel and cut-cross-entropy (where they are installed), in bf16; and all of
psykern's own backends. One target a row, as in most studies. FLOPs: 2 R V D, the logits alone. Memory: the peak above
the start of one call.

    python benchmarks/bench_option_logprobs.py [--rows 8 32 512] [--repeats 7] [--name option_logprobs_cpu]
    python benchmarks/bench_option_logprobs.py --device cuda --name option_logprobs_gpu
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial

import torch
from harness import (
    PeakMemory,
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
from rates import Rates, begin_unheld, best_gflops, denominators, peaks
from torch import Tensor

from psykern import kernels

VOCABULARY = 151_936
HIDDEN_SIZES = (896, 1024)
BF16_PRODUCTS = ("psykern_bf16_both",)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048)
TORCH_ROWS = 512  # beyond these its logits take gigabytes
MEMORY_ROWS = 8192
GPU_SHAPES = ((151_936, 1024), (151_936, 4096), (128_256, 4096))  # (V, D)
GPU_ROWS = (128, 512, 2048, 8192)
OWN_TOLERANCE = 1e-3  # nats: fp32 sums of products of 16-bit numbers, in another order
OTHERS_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}  # their logits are rounded


def log_softmax(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> Tensor:
    return torch.log_softmax(hidden @ weight.T, dim=-1).gather(1, token_ids[:, None].long())[:, 0]


def psykern(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> Tensor:
    scores = kernels.option_logprobs(hidden, weight, torch.arange(len(hidden) + 1), token_ids, backend="cpu")
    return scores.logits - scores.lse


def scored(hidden: Tensor, weight: Tensor, token_ids: Tensor, backend: kernels.Backend) -> Tensor:
    offsets = torch.arange(len(hidden) + 1, device=hidden.device)
    scores = kernels.option_logprobs(hidden, weight, offsets, token_ids, backend=backend)
    return scores.logits - scores.lse


def cross_entropies(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Fused linear cross-entropies of others, where they are installed."""
    labels = token_ids.long()
    found: dict[str, Callable[[], Tensor]] = {}
    try:
        from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

        loss = LigerFusedLinearCrossEntropyLoss(reduction="none")
        found["liger"] = lambda: -loss(weight, hidden, labels)
    except Exception as error:
        print(f"not measured: liger: {error!s:.200}")
    try:
        from cut_cross_entropy import linear_cross_entropy

        found["cut_cross_entropy"] = lambda: -linear_cross_entropy(hidden, weight, labels, reduction="none")
    except Exception as error:
        print(f"not measured: cut_cross_entropy: {error!s:.200}")
    return found


def truth(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> Tensor:
    """From fp32 logits of the same inputs, some rows at a time; products of fp32 are not rounded to tf32."""
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    wide = weight.float()
    parts = [log_softmax(h.float(), wide, t) for h, t in zip(hidden.split(1024), token_ids.split(1024), strict=True)]
    torch.backends.cuda.matmul.allow_tf32 = allowed
    return torch.cat(parts)


def device_providers(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Those that are there on the device of the inputs."""
    inputs, device = (hidden, weight, token_ids), hidden.device
    backends = available(("auto", "triton", "cuda") if device.type == "cuda" else ("auto", "reference"), device)
    own = {"psykern" if name == "auto" else f"psykern:{name}": partial(scored, *inputs, name) for name in backends}
    others: dict[str, Callable[[], Tensor]] = {
        "torch": partial(log_softmax, *inputs),
        "torch_compiled": partial(compiled(log_softmax, device), *inputs),
        **(cross_entropies(*inputs) if device.type == "cuda" else {}),
    }
    return {**own, **others}


@torch.no_grad()
def bench_device(
    rows: int, vocabulary: int, hidden_size: int, repeats: int, device: torch.device, dtype: torch.dtype
) -> list[dict[str, object]]:
    torch.manual_seed(0)
    hidden = torch.randn(rows, hidden_size, device=device).to(dtype)
    weight = (torch.randn(vocabulary, hidden_size, device=device) * 0.02).to(dtype)
    token_ids = torch.randint(vocabulary, (rows,), dtype=torch.int32, device=device)
    inputs = (hidden, weight, token_ids)
    expected = truth(*inputs)

    def check(name: str, result: Tensor) -> None:
        tolerance = OWN_TOLERANCE if name.startswith("psykern") else OTHERS_TOLERANCE[dtype]
        torch.testing.assert_close(result.float(), expected, atol=tolerance, rtol=0)

    providers = keep_working(device_providers(*inputs), check)
    timings = time_side_by_side({**providers, "gemm": lambda: hidden @ weight.T}, repeats, 2, device)
    rates = {name: 2 * rows * vocabulary * hidden_size / timing.median / 1e9 for name, timing in timings.items()}
    table = []
    for name, timing in timings.items():
        with PeakMemory(device).watch() as peak:
            (providers.get(name) or (lambda: hidden @ weight.T))()
        table.append(
            {
                "rows": rows,
                "hidden_size": hidden_size,
                "vocab_size": vocabulary,
                "dtype": str(dtype).removeprefix("torch."),
                "provider": name,
                **timing.columns(),
                "gflops": round(rates[name], 1),
                "share_of_gemm": round(rates[name] / rates["gemm"], 3),
                "psykern_times": round(rates["psykern"] / rates[name], 2),
                "peak_mb": round(peak.bytes / 1e6, 1),
                "shape": f"V {vocabulary}, D {hidden_size}",
            }
        )
        print_row(table[-1])
    return table


def host_providers(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> dict[str, Callable[[], Tensor]]:
    """On a CPU; raises AssertionError where psykern is wrong."""
    half, half_hidden = weight.bfloat16(), hidden.bfloat16()
    providers: dict[str, Callable[[], Tensor]] = {
        "psykern": lambda: psykern(hidden, weight, token_ids),
        "psykern_bf16": lambda: psykern(hidden, half, token_ids),
        "psykern_bf16_both": lambda: psykern(half_hidden, half, token_ids),
    }
    if len(hidden) <= TORCH_ROWS:
        providers["log_softmax"] = lambda: log_softmax(hidden, weight, token_ids)
        torch.testing.assert_close(psykern(hidden, weight, token_ids), providers["log_softmax"](), atol=2e-5, rtol=0)
    for some_hidden in (hidden[:8], half_hidden[:8]):
        rounded = log_softmax(some_hidden.float(), half.float(), token_ids[:8])
        torch.testing.assert_close(psykern(some_hidden, half, token_ids[:8]), rounded, atol=2e-5, rtol=0)
    return providers


def bench(rows: int, hidden_size: int, repeats: int, vocab_size: int = VOCABULARY) -> list[dict[str, object]]:
    torch.manual_seed(0)
    hidden = torch.randn(rows, hidden_size)
    weight = torch.randn(vocab_size, hidden_size) * 0.02
    providers = host_providers(hidden, weight, torch.randint(vocab_size, (rows,), dtype=torch.int32))
    works = denominators(torch.float32)
    bf16 = {f"bf16 {name}": work for name, work in peaks(torch.bfloat16).items()}
    others = {name: work.run for name, work in (works | bf16).items()}
    timings = time_side_by_side({**providers, **others}, repeats)
    flops, beside = 2.0 * rows * vocab_size * hidden_size, Rates.of(works, timings)
    bf16_gflops = best_gflops(bf16, timings)
    table = []
    for name in providers:
        own_peak = bf16_gflops if name in BF16_PRODUCTS else beside.peak
        with PeakMemory().watch() as memory:
            providers[name]()
        table.append(
            {
                "rows": rows,
                "hidden_size": hidden_size,
                "vocab_size": vocab_size,
                "provider": name,
                **timings[name].columns(),
                "gflops": round(flops / timings[name].median / 1e9, 1),
                "share_of_peak": round(flops / timings[name].best / 1e9 / own_peak, 3),
                "times_log_softmax": round(timings["log_softmax"].median / timings[name].median, 2)
                if "log_softmax" in timings
                else "",
                "peak_mb": round(memory.bytes / 1e6, 1),
                **beside.columns(),
                "bf16_peak_gflops": round(bf16_gflops, 1),
            }
        )
        print_row(table[-1])
    return table


def bench_memory(hidden_size: int) -> dict[str, object]:
    """Peak memory of one call with many rows, fp32 weights."""
    hidden, weight = torch.randn(MEMORY_ROWS, hidden_size), torch.randn(VOCABULARY, hidden_size)
    token_ids = torch.zeros(MEMORY_ROWS, dtype=torch.int32)
    with PeakMemory().watch() as peak:
        psykern(hidden, weight, token_ids)
    return {"rows": MEMORY_ROWS, "hidden_size": hidden_size, "provider": "psykern", "peak_mb": peak.bytes / 1e6}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--rows", type=int, nargs="+", help="default: several, up to 2048 on a CPU and 8192 on a GPU")
    parser.add_argument("--hidden-sizes", type=int, nargs="+", default=HIDDEN_SIZES)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--name", help="CSV and PNG in results/; default: no file")
    options = parser.parse_args(arguments)
    device, dtype = options.device, dtype_of(options)
    if options.quick or device.type != "cpu":
        shapes, rows = (((1000, 64),), (3, 40)) if options.quick else (GPU_SHAPES, options.rows or GPU_ROWS)
        table = []
        for vocabulary, hidden_size in shapes:
            for r in rows:
                table += bench_device(r, vocabulary, hidden_size, options.repeats, device, dtype)
                if options.name:
                    write_csv(options.name, table, options.folder, device)
        if options.name:
            drawing = {"x": "rows", "y": "share_of_gemm", "panel": "shape"}
            write_results(options.name, table, **drawing, folder=options.folder, device=device)
        return
    rows = options.rows or ROWS
    table = [row for d in options.hidden_sizes for r in rows for row in bench(r, d, options.repeats)]
    for hidden_size in options.hidden_sizes:
        table.append({**dict.fromkeys(table[0], ""), **bench_memory(hidden_size)})
        print_row(table[-1])
    if options.name:
        write_results(options.name, table, x="rows", y="share_of_peak", panel="hidden_size", folder=options.folder)


if __name__ == "__main__":
    begin_unheld()
    main()
