"""From how many common tokens on a share pays (``plan.MIN_SHARE``), and what planning itself costs.

A share saves its tokens' arithmetic and costs attention calls over one more range of keys. Per study and minimum: rows
computed, segments, seconds to plan and seconds to run, side by side, at the shape of Qwen2.5-0.5B with 4 layers and
random weights. Then a plan of 100,000 transcripts of 1,000 tokens. Needs the shared transcripts.

With ``--units`` instead: tokens computed in units of several sizes, cut along the file and along the texts, beside what
one trie for each study computes (Qwen3's tokenizer, no options, nothing is run).

    python benchmarks/bench_plan.py [--repeats 2] [--name plan.csv] [--units]
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from harness import time_side_by_side, write_csv
from providers import SHARED, accepted, load_studies, make_checkpoint

from psykern.core.errors import Source
from psykern.core.settings import MIN_SHARE, Settings
from psykern.core.types import EncodedTranscript, TargetScores
from psykern.data.dataset import Dataset
from psykern.data.encode import Encoder
from psykern.data.read import read
from psykern.data.tokenizer import Tokenizer
from psykern.data.units import WINDOW_TOKENS, units
from psykern.engine.budgets import CPU_BUDGETS
from psykern.engine.engine import Engine
from psykern.engine.plan import Plan, plan
from psykern.kernels.compute import Compute
from psykern.models.model import Model

MINIMA = (1, 8, 32, 128, 10**9)
STUDIES = {"guenther2024substitutions": 12, "thoma2025riskychoice": 16, "franke2024bayesian": 12}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--name", help="CSV file in results/; default: no file")
    parser.add_argument("--units", action="store_true", help="what units of several sizes compute")
    options = parser.parse_args(arguments)
    if options.units:
        rows = bench_units()
        if options.name:
            print(f"written: {write_csv(options.name, rows)}")
        return
    with tempfile.TemporaryDirectory() as temporary:
        make_checkpoint(Path(temporary), layers=4)
        folder = Path(temporary) / "torch.float32"
        model = Model(folder, Compute.resolve("cpu"))
        rows = []
        for study in load_studies(STUDIES, Tokenizer.load(folder)):
            rows += bench_minima(study.name, study.encoded, model, options.repeats)
    bench_large_plan()
    if options.name:
        print(f"written: {write_csv(options.name, rows)}")


def bench_minima(
    name: str, transcripts: list[EncodedTranscript], model: Model, repeats: int
) -> list[dict[str, object]]:
    def run(min_share: int) -> TargetScores:
        return Engine(model).run(plan_with(transcripts, min_share))

    scores = {minimum: run(minimum).logprob for minimum in MINIMA}  # the warm-up too
    for minimum, got in scores.items():
        difference = float(np.abs(got - scores[MINIMA[-1]]).max())
        if difference > 1e-5:
            raise SystemExit(f"{name}: min_share {minimum} changes a score by {difference:.1e} nats: refused")
    providers: dict[str, Callable[[], object]] = {str(m): partial(run, m) for m in MINIMA}
    rows = []
    for minimum, timing in time_side_by_side(providers, repeats, warmup=0).items():
        start = time.perf_counter()
        planned = plan_with(transcripts, int(minimum))
        row = {
            "study": name,
            "min_share": int(minimum),
            "transcripts": planned.num_transcripts,
            "tokens": planned.num_tokens,
            "computed_tokens": planned.num_computed,
            "seconds_plan": round(time.perf_counter() - start, 4),
            "seconds": round(timing.median, 3),
            "seconds_p20": round(timing.p20, 3),
            "seconds_p80": round(timing.p80, 3),
        }
        rows.append(row)
        print("  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
    return rows


def bench_units() -> list[dict[str, object]]:
    encoder = Encoder(Tokenizer.load(SHARED / "tokenizers" / "qwen3"), Settings(options="none"))
    rows: list[dict[str, object]] = []
    for path in sorted((SHARED / "psych").glob("*.jsonl.gz")):
        transcripts = list(accepted(read(Dataset.find(path, hashed=False))))
        encoded = {t.source.line: t for t in encoder.encode(transcripts).transcripts}
        row: dict[str, object] = {"study": path.name.removesuffix(".jsonl.gz"), "transcripts": len(transcripts)}
        row["tokens"] = sum(len(t.token_ids) for t in encoded.values())
        row["one_trie"] = plan_with(list(encoded.values()), MIN_SHARE).num_computed
        for size in (17, 21):
            for order, window in {"file": 1, "text": WINDOW_TOKENS}.items():
                cut = units(transcripts, unit_tokens=2**size, window_tokens=window)
                plans = (plan_with([encoded[t.source.line] for t in u.transcripts], MIN_SHARE) for u in cut)
                row[f"{order}_{size}"] = sum(p.num_computed for p in plans)
        rows.append(row)
        print("  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
    numbers = [name for name in rows[0] if name != "study"]
    rows.append({"study": "all", **{name: sum(int(str(row[name])) for row in rows) for name in numbers}})
    print("  ".join(f"{k} {v}" for k, v in rows[-1].items()), flush=True)
    return rows


def plan_with(transcripts: list[EncodedTranscript], min_share: int) -> Plan:
    return plan(
        transcripts,
        wave_tokens=CPU_BUDGETS.wave_tokens,
        batch_tokens=CPU_BUDGETS.batch_tokens,
        min_share=min_share,
    )


def bench_large_plan(count: int = 100_000, length: int = 1000, shared: int = 300) -> None:
    rng = np.random.default_rng(0)
    front = rng.integers(150_000, size=shared)
    transcripts = [encoded(np.concatenate((front, rng.integers(150_000, size=length - shared)))) for _ in range(count)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    planned = plan_with(transcripts, min_share=32)
    seconds = time.perf_counter() - start
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    times = grown / (4 * planned.num_tokens)
    print(
        f"{count:,} transcripts of {length:,} tokens: {seconds:.1f} s, {planned.num_computed:,} rows in "
        f"{planned.num_waves:,} waves, memory {grown / 1e6:,.0f} MB = {times:.1f} times the tokens"
    )


def encoded(token_ids: np.ndarray) -> EncodedTranscript:
    """A transcript with a one-token response every 30 tokens."""
    starts = np.arange(350, len(token_ids), 30, dtype=np.int32)
    none = np.empty(0, np.int32)
    return EncodedTranscript(
        study="",
        experiment="",
        participant="",
        source=Source("", 0),
        token_ids=token_ids.astype(np.int32),
        responses=("",) * len(starts),
        spans_tok=np.stack((starts, starts + 1), axis=1),
        flags=(None,) * len(starts),
        options=(None,) * len(starts),
        option_index=np.full(len(starts), -1, np.int32),
        branch_response=none,
        branch_parent_tok=none,
        branch_scored_tok=none,
        branch_offsets=np.zeros(1, np.int64),
        branch_token_ids=none,
        num_dropped=0,
    )


if __name__ == "__main__":
    main()
