"""psykern beside what people do today, end to end on real transcripts: same weights, same rows, one process.

    study     the study's procedure: one transcript at a time, logits of all tokens, cross-entropy of all of them
    careful   a careful user's: transformers, one transcript at a time, only the predicting rows through the head
    psykern   from the texts on (the other two are given tokens and spans), tokenizing and planning included;
              psykern:cpu and psykern:reference name the backend; psykern:bf16 reads a checkpoint in bf16

Random weights at the shape of Qwen2.5-0.5B, with 4 layers unless ``--layers 24`` asks for all, and Qwen3's tokenizer.
The weights are numbers that bf16 holds, so that the checkpoint in bf16 is the same model.

``--shape Qwen3-8B --device cuda`` takes another shape (``shapes.py``) and runs all studies together, in bf16 on a GPU.
Weights are drawn there, all layers different, and saved with the shape's tokenizer, one shard a layer; the drawn model
is the one that the others run, and a copy of it in fp32 is the oracle. First the shortest transcript of each study, of
6,000 tokens at most, is compared with the oracle on the same device: the RMS of differences of log-probabilities
should stay within 0.035 nats (0.003 where psykern computes in fp32); thrice that is refused. Then the others are
warmed with these transcripts and timed once; psykern runs once and is timed ``--repeats`` times, and so is, but once,
psykern:streamed, which holds two layers at a time: the last run must give the first one's bytes. GFLOP/s are compared
with a square bf16 product. ``idle_share`` is the engine's; ``kernel_idle_share`` is what torch's profiler
saw of one more run on CUDA: the share of the time from the first kernel to the last in which none ran. The file is
written after each provider.

Tokens per second count the tokens of the transcripts, not those computed; GFLOP/s count what psykern computed
(``budgets.cost``), over the whole time, and ``share_of_sgemm`` compares them with a square product just before. Needs
the shared transcripts.

    python benchmarks/bench_score.py --device cuda --shape Qwen3-8B --mix gpu --name score_gpu_qwen3-8b
    python benchmarks/bench_score.py [--layers 4] [--mix full|medium|small|many|longest] [--repeats 1] [--name FILE]
"""

from __future__ import annotations

import argparse
import copy
import gc
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from harness import (
    Timing,
    add_arguments,
    dtype_of,
    matrix_gflops,
    print_row,
    sgemm_gflops,
    write_csv,
)
from providers import (
    MIXES,
    SHARED,
    Study,
    load_studies,
    make_checkpoint,
    make_shape,
    measure,
    run_careful_user,
    run_psykern,
    run_study_procedure,
    shortest_of,
    together,
    weight_bytes,
)
from shapes import SHAPES
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from psykern import demo
from psykern.core.settings import MIN_SHARE
from psykern.data.tokenizer import Tokenizer
from psykern.engine.budgets import Budgets, cost
from psykern.engine.budgets import budgets as best_budgets
from psykern.engine.engine import Engine
from psykern.engine.plan import Plan
from psykern.kernels import Backend, resolve
from psykern.kernels.compute import Compute
from psykern.models.model import Model

TOLERANCE = 1e-4  # nats per response
RMS_TOLERANCE = {torch.float32: 0.003, torch.bfloat16: 0.035}  # nats per token, against transformers in fp32
ORACLE_TOKENS = 6000  # of a transcript that is scored in fp32 on a GPU, at most
CHECKPOINTS = {"psykern:bf16": torch.bfloat16}  # of the other providers: fp32
OWN: dict[str, Backend] = {
    "psykern": "auto",
    "psykern:cpu": "cpu",
    "psykern:reference": "reference",
    "psykern:bf16": "auto",
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--shape", choices=SHAPES, help="one of the study's models, as a GPU runs it")
    parser.add_argument("--data", type=Path, default=SHARED, help="folder with psych and tokenizers")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--mix", choices=MIXES, default="full")
    parser.add_argument(
        "--repeats", type=int, default=1, help="of psykern and, without --shape, of careful; others are timed once"
    )
    parser.add_argument("--providers", nargs="+", default=["study", "careful", "psykern"])
    parser.add_argument("--studies", nargs="+", help="only these of the mix")
    parser.add_argument("--min-share", type=int, default=MIN_SHARE)
    parser.add_argument("--name", help="CSV file in results/; default: no file")
    options = parser.parse_args(arguments)
    if options.shape:
        bench_shape(options)
        return

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        oracle = make_checkpoint(folder, options.layers)
        models = {
            name: Model(folder / str(CHECKPOINTS.get(name, torch.float32)), Compute.resolve("cpu", backend=backend))
            for name, backend in OWN.items()
        }
        tokenizer = Tokenizer.load(folder / "torch.float32")
        mix = {name: n for name, n in MIXES[options.mix].items() if not options.studies or name in options.studies}
        studies = load_studies(mix, tokenizer)
        print(f"{sum(s.num_tokens for s in studies):,} tokens, {sum(s.num_responses for s in studies):,} responses")
        rows = []
        for study in studies:
            rows += bench_study(study, folder, oracle, models, tokenizer, options)
    print_totals(rows, options.providers)
    if options.name:
        print(f"written: {write_csv(options.name, rows, options.folder)}")


def bench_shape(options: argparse.Namespace) -> None:
    """One of the study's shapes on a device: exactness first, then every provider over all studies."""
    device, dtype = options.device, dtype_of(options)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data, mix = options.data / "psych", dict(MIXES[options.mix])
        if not data.is_dir():
            data, mix = demo.SAMPLE, dict(MIXES["demo"])
        mix = {name: n for name, n in mix.items() if not options.studies or name in options.studies}
        start = time.perf_counter()
        user = make_shape(folder, options, dtype)
        tokenizer = Tokenizer.load(folder)
        studies = load_studies(mix, tokenizer, data)
        print(f"checkpoint and {sum(s.num_tokens for s in studies):,} tokens in {time.perf_counter() - start:.1f} s")
        short = together("short", [one for one in map(shortest_of, studies) if one.num_tokens <= ORACLE_TOKENS])
        if not short.encoded:
            raise SystemExit(f"expected a transcript of at most {ORACLE_TOKENS} tokens in {', '.join(mix)}")
        expected = run_careful_user(copy.deepcopy(user).float(), short)
        release(device)
        model = Model(folder, Compute(device, dtype, resolve("auto", device)))
        budgets = best_budgets(model.spec, device, dtype)
        got = run_psykern(Engine(model), tokenizer, short, MIN_SHARE, budgets)[0].logprob
        rms = float(np.sqrt(np.mean((got - expected) ** 2.0)))
        print(f"RMS of differences from transformers in fp32: {rms:.5f} nats, {len(expected)} tokens", flush=True)
        if rms > 3 * RMS_TOLERANCE[dtype]:  # what lies between is the summary's to tell
            raise SystemExit(f"RMS: expected at most {RMS_TOLERANCE[dtype]}, got {rms:.5f}: refused")
        bench_providers(together("all", studies), short, folder, user, model, budgets, tokenizer, options, rms)


def release(device: torch.device) -> None:
    """What is no longer used goes back to the device, whose free memory decides how many layers stay on it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def kernel_idle_share(run: Callable[[], object]) -> float | None:
    """``idle_share`` of the kernels that a run starts on a GPU, as torch's profiler saw them."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
    kernels = [
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA and not event.name.startswith(("Memcpy", "Memset"))
    ]
    return idle_share(np.array(kernels)) if kernels else None


def idle_share(spans: np.ndarray) -> float:
    """The share of the time from the first start to the last end that lies in none of the spans [n, 2]."""
    starts, ends = spans[spans[:, 0].argsort()].T
    ends = np.maximum.accumulate(ends)
    return float((starts[1:] - ends[:-1]).clip(min=0).sum() / (ends[-1] - starts[0]))


def bench_providers(
    study: Study,
    short: Study,
    folder: Path,
    user: PreTrainedModel,
    model: Model,
    budgets: Budgets,
    tokenizer: Tokenizer,
    options: argparse.Namespace,
    rms: float,
) -> None:
    """One row per provider. Scores far from the first provider's, or other bytes in a further run, are refused."""
    device, dtype, spec = options.device, dtype_of(options), model.spec
    used: list[tuple[Plan, float | None]] = []

    def psykern_logprobs(decoder: Model) -> np.ndarray:
        runner = Engine(decoder)
        scores, planned = run_psykern(runner, tokenizer, study, options.min_share, budgets)
        used[:] = [(planned, runner.idle_share)]
        return scores.logprob

    baselines = {"study": run_study_procedure, "careful": run_careful_user}
    models = {"psykern": model}
    if "psykern:streamed" in options.providers:
        models["psykern:streamed"] = Model(folder, model.compute, num_slots=2)
    rows: list[dict[str, object]] = []
    scored: dict[str, np.ndarray] = {}
    for name in options.providers:
        is_own = name in models
        run = partial(psykern_logprobs, models[name]) if is_own else partial(baselines[name], user, study)
        release(device)
        first = run() if is_own else baselines[name](user, short)  # compiles, allocates, reads
        rate = matrix_gflops(device, dtype)
        repeats = options.repeats if name == "psykern" else 1
        scores, seconds, peak = measure(run, repeats, device)
        if is_own and scores.tobytes() != first.tobytes():
            raise SystemExit(f"{study.name}: {name}: two runs give different bytes: refused")
        scored[name] = scores
        difference = float(np.sqrt(np.mean((scores - next(iter(scored.values()))) ** 2.0)))
        if difference > 2 * RMS_TOLERANCE[torch.bfloat16]:  # both are rounded, and each may be that far from fp32
            raise SystemExit(
                f"{study.name}: {name} differs from {options.providers[0]} by {difference:.3f} RMS: refused"
            )
        timing = Timing.of(seconds)
        row: dict[str, object] = {
            "shape": options.shape,
            "study": study.name,
            "provider": name,
            "dtype": str(dtype).removeprefix("torch."),
            "transcripts": len(study.transcripts),
            "responses": study.num_responses,
            "tokens": study.num_tokens,
            "computed_tokens": study.num_tokens,
            **timing.columns(),
            "repeats": repeats,
            "tokens_per_second": round(study.num_tokens / timing.median, 1),
            "peak_mb": round(peak / 1e6),
            "rms_against_fp32": round(rms, 6),
            "matrix_gflops": round(rate, 1),
            **dict.fromkeys(("gflops", "share_of_matrix", "idle_share", "kernel_idle_share"), ""),
        }
        if is_own:
            planned, idle = used[0]
            work = cost(planned, spec, dtype)
            gflops = (work.flops_body + work.flops_attention + work.flops_head) / timing.median / 1e9
            row |= {"computed_tokens": planned.num_computed, "gflops": round(gflops, 1)}
            row |= {"share_of_matrix": round(gflops / rate, 3), "idle_share": "" if idle is None else round(idle, 4)}
        rows.append(row)
        print_row(row)
        if options.name:
            write_csv(options.name, rows, options.folder, device)
    if device.type == "cuda" and "psykern" in options.providers:  # last, as a profiler may stay attached
        share = kernel_idle_share(partial(psykern_logprobs, model))
        rows[options.providers.index("psykern")]["kernel_idle_share"] = "" if share is None else round(share, 4)
        print(f"share of the time in which no kernel ran: {share}")
        if options.name:
            write_csv(options.name, rows, options.folder, device)


def bench_study(
    study: Study,
    folder: Path,
    oracle: PreTrainedModel,
    models: dict[str, Model],
    tokenizer: Tokenizer,
    options: argparse.Namespace,
) -> list[dict[str, object]]:
    """One row per provider. A result that differs from the careful user's by more than the tolerance is refused."""
    planned: list[Plan] = []

    def psykern_logprobs(model: Model) -> np.ndarray:
        scores, used = run_psykern(Engine(model), tokenizer, study, options.min_share)
        planned[:] = [used]
        return scores.logprob

    providers: dict[str, Callable[[], np.ndarray]] = {
        "study": lambda: run_study_procedure(oracle, study),
        "careful": lambda: run_careful_user(oracle, study),
        **{name: partial(psykern_logprobs, model) for name, model in models.items()},
    }
    lengths = np.concatenate([t.spans_tok[:, 1] - t.spans_tok[:, 0] for t in study.encoded])
    starts = np.concatenate(([0], np.cumsum(lengths[lengths > 0])[:-1]))
    spec = models["psykern"].spec
    rows: list[dict[str, object]] = []
    expected: np.ndarray | None = None
    for name in options.providers:
        repeats = 1 if name == "study" else options.repeats
        matrix_rate = sgemm_gflops()
        scores, seconds, peak = measure(providers[name], repeats)
        per_response = np.add.reduceat(scores.astype(np.float64), starts)
        if expected is None:
            expected = per_response
        difference = float(np.abs(per_response - expected).max())
        if difference > TOLERANCE:
            raise SystemExit(
                f"{study.name}: {name} differs from {options.providers[0]} by {difference:.1e} nats: refused"
            )
        timing = Timing.of(seconds)
        gflops: float | None = None
        if name.startswith("psykern"):
            work = cost(planned[0], spec, torch.float32)
            gflops = (work.flops_body + work.flops_attention + work.flops_head) / timing.median / 1e9
        rows.append(
            {
                "study": study.name,
                "provider": name,
                "layers": spec.num_layers,
                "checkpoint": str(CHECKPOINTS.get(name, torch.float32)).removeprefix("torch."),
                "transcripts": len(study.transcripts),
                "responses": study.num_responses,
                "tokens": study.num_tokens,
                "computed_tokens": planned[0].num_computed if name.startswith("psykern") else study.num_tokens,
                "seconds": round(timing.median, 3),
                "seconds_p20": round(timing.p20, 3),
                "seconds_p80": round(timing.p80, 3),
                "repeats": repeats,
                "tokens_per_second": round(study.num_tokens / timing.median, 1),
                "peak_mb": round(peak / 1e6),
                "max_difference_nats": f"{difference:.1e}",
                "weights_mb": round(weight_bytes(folder / str(CHECKPOINTS.get(name, torch.float32))) / 1e6),
                "sgemm_gflops": round(matrix_rate, 1),
                "gflops": "" if gflops is None else round(gflops, 1),
                "share_of_sgemm": "" if gflops is None else round(gflops / matrix_rate, 3),
            }
        )
        print_row(rows[-1])
    return rows


def print_totals(rows: list[dict[str, object]], providers: Sequence[str]) -> None:
    """Per study and over all: how many times as fast the last provider is, and what sharing saved."""

    def total(column: str, provider: str, study: str | None = None) -> float:
        return sum(float(str(r[column])) for r in rows if r["provider"] == provider and study in (None, r["study"]))

    def times(provider: str, study: str | None, per: str) -> str:
        """How many times as much of `per` the last provider does in a second."""
        rates = [total(per, p, study) / total("seconds", p, study) for p in (last, provider)]
        return f"{rates[0] / rates[1]:5.2f}x {provider}"

    last = providers[-1]
    names: list[str | None] = [*dict.fromkeys(str(r["study"]) for r in rows), None]
    for study in names:
        rate = total("tokens", last, study) / total("seconds", last, study)
        saved = 1 - total("computed_tokens", last, study) / total("tokens", last, study)
        for what, per in ((f"{rate:.0f} tokens/s", "tokens"), ("per computed token", "computed_tokens")):
            print(f"{study or 'all':28} {what:20}", *(times(p, study, per) for p in providers[:-1]))
        print(f"{'':28} tokens saved by sharing {saved:.1%}")


if __name__ == "__main__":
    main()
