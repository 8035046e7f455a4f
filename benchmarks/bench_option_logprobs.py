"""option_logprobs on the CPU beside what a user writes, ``log_softmax(hidden @ weight.T)`` and a gather, at Qwen's
vocabulary; and beside the machine's own matrix rate (``sgemm``: a square product of the same run).

One target a row, as in most studies. FLOPs: 2 R V D, the logits alone. Memory: the peak above the start of one call.

    python benchmarks/bench_option_logprobs.py [--rows 8 32 512] [--repeats 7] [--name option_logprobs_cpu]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
from harness import SGEMM_FLOPS, PeakMemory, print_row, sgemm, time_side_by_side, write_results
from torch import Tensor

from psykern import kernels

VOCABULARY = 151_936
HIDDEN_SIZES = (896, 1024)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048)
TORCH_ROWS = 512  # beyond these its logits take gigabytes
MEMORY_ROWS = 8192


def log_softmax(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> Tensor:
    return torch.log_softmax(hidden @ weight.T, dim=-1).gather(1, token_ids[:, None].long())[:, 0]


def psykern(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> Tensor:
    scores = kernels.option_logprobs(hidden, weight, torch.arange(len(hidden) + 1), token_ids, backend="cpu")
    return scores.logits - scores.lse


def bench(rows: int, hidden_size: int, repeats: int) -> list[dict[str, object]]:
    torch.manual_seed(0)
    hidden = torch.randn(rows, hidden_size)
    weight = torch.randn(VOCABULARY, hidden_size) * 0.02
    token_ids = torch.randint(VOCABULARY, (rows,), dtype=torch.int32)
    half = weight.bfloat16()
    providers: dict[str, Callable[[], Tensor]] = {
        "psykern": lambda: psykern(hidden, weight, token_ids),
        "psykern_bf16": lambda: psykern(hidden, half, token_ids),
    }
    if rows <= TORCH_ROWS:
        providers["log_softmax"] = lambda: log_softmax(hidden, weight, token_ids)
        torch.testing.assert_close(psykern(hidden, weight, token_ids), providers["log_softmax"](), atol=2e-5, rtol=0)
    rounded = psykern(hidden[:8], half.float(), token_ids[:8])
    torch.testing.assert_close(psykern(hidden[:8], half, token_ids[:8]), rounded, atol=0, rtol=0)
    timings = time_side_by_side({**providers, "sgemm": sgemm}, repeats)
    rates = {name: 2 * rows * VOCABULARY * hidden_size / timings[name].median / 1e9 for name in providers}
    rates["sgemm"] = SGEMM_FLOPS / timings["sgemm"].median / 1e9
    table = []
    for name in providers:
        with PeakMemory().watch() as peak:
            providers[name]()
        table.append(
            {
                "rows": rows,
                "hidden_size": hidden_size,
                "vocab_size": VOCABULARY,
                "provider": name,
                **timings[name].columns(),
                "gflops": round(rates[name], 1),
                "share_of_sgemm": round(rates[name] / rates["sgemm"], 3),
                "times_log_softmax": round(rates[name] / rates["log_softmax"], 2) if "log_softmax" in rates else "",
                "peak_mb": round(peak.bytes / 1e6, 1),
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
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--hidden-sizes", type=int, nargs="+", default=HIDDEN_SIZES)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--name", help="CSV and PNG in results/; default: no file")
    options = parser.parse_args(arguments)
    table = [row for d in options.hidden_sizes for r in options.rows for row in bench(r, d, options.repeats)]
    for hidden_size in options.hidden_sizes:
        table.append({**dict.fromkeys(table[0], ""), **bench_memory(hidden_size)})
        print_row(table[-1])
    if options.name:
        write_results(options.name, table, x="rows", y="gflops", panel="hidden_size")


if __name__ == "__main__":
    main()
