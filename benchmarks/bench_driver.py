"""What a run costs beside its model: reading, tokenizing, planning, laying out waves, writing.

    python benchmarks/bench_driver.py [--limit 120] [--repeats 3] [--name driver_cpu.csv]
    python benchmarks/bench_driver.py --overhead [--name driver_overhead_cpu.csv]

The first replaces the engine by one that lays out each plan's waves and returns made scores at once: tokens per second
from raw text, with a token cache that is written, and from one that is there. Seconds are those of ``psykern.score``
less the loading of the model. The second runs the shape of Qwen2.5-0.5B with 24 layers, and counts as overhead all of
the run but the waves' arithmetic; loading and hashing are left out.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from harness import RESULTS, Timing, print_row, write_csv
from instant import make_tiny, score_instantly
from providers import SHARED, make_checkpoint

import psykern
from psykern import Settings
from psykern.core.types import TargetScores
from psykern.engine import engine
from psykern.engine.plan import Plan

PHASES = ("hash", "scan", "read", "encode", "plan", "run", "write")  # of the manifest; they overlap
MADE_LOGPROB = -1.0  # nats per token


def made_scores(plan: Plan) -> TargetScores:
    """MADE_LOGPROB for every target that a wave holds, NaN for one that none does."""
    logprob = np.full(plan.num_targets, np.nan, np.float32)
    for wave in plan.waves():
        logprob[wave.target_ids] = MADE_LOGPROB
    return TargetScores(logprob, np.ones(plan.num_targets, np.bool_), -logprob)


def score_at_once(model: Path, data: Path, out: Path, settings: Settings, cache: Path | None = None) -> psykern.Run:
    """A run with made scores. Raises SystemExit where records are not what was made."""
    run = score_instantly(model, data, out, settings, cache, made_scores)
    table = psykern.read_run(out, columns=["num_tokens", "logprob"])
    scored = np.array(table["num_tokens"]) > 0
    logprob = np.array(table["logprob"], dtype=np.float64)
    if not np.array_equal(logprob[scored], MADE_LOGPROB * np.array(table["num_tokens"])[scored]):
        raise SystemExit(f"{out}: expected {MADE_LOGPROB} nats for every scored token, got others: refused")
    return run


def bench_rates(folder: Path, data: Path, settings: Settings, repeats: int) -> list[dict[str, object]]:
    """A row per source of tokens."""
    model = make_tiny(folder / "model")
    cache = folder / "cache"
    runs: dict[str, list[psykern.Run]] = {"raw": [], "writing_cache": [], "warm_cache": []}
    for turn in range(repeats):
        shutil.rmtree(cache, ignore_errors=True)
        for source, timed in runs.items():
            out = folder / f"{source}-{turn}"
            timed.append(score_at_once(model, data, out, settings, None if source == "raw" else cache))
            shutil.rmtree(out)
    rows = []
    for source, timed in runs.items():
        timing = Timing.of([run.manifest.seconds["total"] - run.manifest.seconds["load"] for run in timed])
        counts, phases = timed[-1].manifest.counts, timed[-1].manifest.seconds
        row = {"source": source, "transcripts": counts.transcripts, "responses": counts.responses}
        row |= {"tokens": counts.tokens, **timing.columns(), "repeats": repeats}
        row |= {"tokens_per_second": round(counts.tokens / timing.median)}
        row |= {f"last_{phase}_s": round(phases.get(phase, 0.0), 3) for phase in PHASES}
        rows.append({**row, "load_average": round(os.getloadavg()[0], 2)})
        print_row(rows[-1])
    return rows


def bench_overhead(folder: Path, data: Path, settings: Settings, layers: int) -> list[dict[str, object]]:
    """One row: what of a real run is not the waves' arithmetic."""
    make_checkpoint(folder, layers)
    run_wave, seconds = engine.run_wave, 0.0

    def timed(*arguments: Any) -> Any:
        nonlocal seconds
        start = time.perf_counter()
        result = run_wave(*arguments)
        seconds += time.perf_counter() - start
        return result

    with mock.patch.object(engine, "run_wave", timed):
        run = psykern.score(folder / "torch.float32", data, folder / "run", settings)
    phases, counts = run.manifest.seconds, run.manifest.counts
    whole = phases["total"] - phases["load"] - phases["hash"]
    row: dict[str, object] = {"layers": layers, "tokens": counts.tokens, "computed_tokens": counts.computed_tokens}
    row |= {"seconds": round(whole, 3), "compute_seconds": round(seconds, 3)}
    row |= {"overhead_share": round(1 - seconds / whole, 5)}
    row |= {f"{phase}_s": round(phases.get(phase, 0.0), 3) for phase in PHASES}
    row |= {"load_average": round(os.getloadavg()[0], 2)}
    print_row(row)
    return [row]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--overhead", action="store_true", help="a real model's run instead")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--data", type=Path, default=SHARED / "psych")
    parser.add_argument("--limit", type=int, help="transcripts per study; default 120, with --overhead 2")
    parser.add_argument("--studies", nargs="+")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=RESULTS)
    parser.add_argument("--name", help="CSV file in results/; default: no file")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    settings = Settings(
        limit=options.limit or (2 if options.overhead else 120),
        studies=tuple(options.studies) if options.studies else None,
        device="cpu",
    )
    with tempfile.TemporaryDirectory() as temporary:
        if options.overhead:
            rows = bench_overhead(Path(temporary), options.data, settings, options.layers)
        else:
            rows = bench_rates(Path(temporary), options.data, settings, options.repeats)
    if options.name:
        print(f"written: {write_csv(options.name, rows, options.folder)}")


if __name__ == "__main__":
    main()
