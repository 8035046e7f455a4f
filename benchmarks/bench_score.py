"""psykern beside what people do today, end to end on real transcripts: same weights, same rows, one process.

    study     the study's procedure: one transcript at a time, logits of all tokens, cross-entropy of all of them
    careful   a careful user's: transformers, one transcript at a time, only the predicting rows through the head
    psykern   from the texts on (the other two are given tokens and spans), tokenizing and planning included;
              psykern:cpu and psykern:reference name the backend; psykern:stored reads a checkpoint in bf16;
              psykern:transformers has the library's modules compute the layers, with psykern's attention and head
    careful:bf16, psykern:bf16   the same in bf16, from a checkpoint in bf16

Random weights at the shape of Qwen2.5-0.5B, with 4 layers unless ``--layers 24`` asks for all, and Qwen3's tokenizer.
The weights are numbers that bf16 holds, so that the checkpoint in bf16 is the same model. What computes in bf16 is
compared with what the first provider in fp32 gave by the RMS of differences of tokens' log-probabilities.

``--shape Qwen3-8B --device cuda`` takes another shape (``shapes.py``) and runs all studies together, in bf16 on a GPU.
Weights are drawn there, all layers different, and saved with the shape's tokenizer, one shard a layer; the drawn model
is the one that the others run, and a copy of it in fp32 is the oracle. First the shortest transcript of each study, of
6,000 tokens at most, is compared with the oracle on the same device: the RMS of differences of log-probabilities
should stay within 0.035 nats (0.003 where psykern computes in fp32); thrice that is refused. Then the others are
warmed with these transcripts and timed once; psykern runs once and is timed ``--repeats`` times, and so is, but once,
psykern:streamed, which holds two layers at a time: the last run must give the first one's bytes. GFLOP/s are compared
with a square bf16 product after a pause (``matrix_gflops``), and with the products of one layer of the shape back to
back for a second and a half (``sustained_gflops``), which is what the device keeps up. ``idle_share`` is the engine's;
``kernel_idle_share`` is what torch's profiler saw of one more run on CUDA: the share of the time from the first kernel
to the last in which none ran; what each kernel took is in NAME_profile. ``encode_seconds`` and ``plan_seconds`` are in
psykern's time, and the others are spared them. The file is written after each provider.

Tokens per second count the tokens of the transcripts, not those computed; GFLOP/s count what psykern computed
(``budgets.cost``), over the whole time, and ``share_of_peak`` compares them with the processor's own peak for the
dtype, measured just before, as are the libraries' square products (``rates.py``). Needs the shared transcripts.

    python benchmarks/bench_score.py --device cuda --shape Qwen3-8B --mix gpu --name score_gpu_qwen3-8b
    python benchmarks/bench_score.py [--layers 4] [--mix full|medium|small|many|longest] [--repeats 1] [--name FILE]
"""

from __future__ import annotations

import argparse
import copy
import gc
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from unittest.mock import patch

import numpy as np
import rates
import torch
from bench_gpu_rates import layer_of, repeated
from bench_prefix_attention import Place
from comparison import Comparison, Distance, rms_of
from harness import (
    CPU,
    Timing,
    add_arguments,
    dtype_of,
    matrix_gflops,
    print_row,
    profile_kernels,
    write_csv,
)
from providers import (
    MIXES,
    SHARED,
    Scored,
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
from rates import Rates, begin_unheld
from shapes import SHAPES
from transformers import AutoModelForCausalLM

from psykern import demo
from psykern.core.settings import MIN_SHARE
from psykern.data.tokenizer import Tokenizer
from psykern.engine.budgets import budgets, cost
from psykern.kernels import Backend, resolve
from psykern.kernels.compute import Compute
from psykern.models.decoder import DecoderSpec
from psykern.models.foreign.model import ForeignModel
from psykern.models.model import Model
from psykern.models.weights import ModelFolder

TOLERANCE = 1e-4  # nats per response
RMS_TOLERANCE = {torch.float32: 0.003, torch.bfloat16: 0.035}  # nats per token, against transformers in fp32
ORACLE_TOKENS = 6000  # of a transcript that is scored in fp32 on a GPU, at most
CHECKPOINTS = dict.fromkeys(("careful:bf16", "psykern:bf16", "psykern:stored"), torch.bfloat16)  # of others: fp32
BF16 = ("careful:bf16", "psykern:bf16")  # they compute in it
OWN: dict[str, Backend] = {
    "psykern": "auto",
    "psykern:cpu": "cpu",
    "psykern:reference": "reference",
    "psykern:stored": "auto",
    "psykern:bf16": "auto",
}
LIBRARY = "psykern:transformers"
BASELINES = {"study": run_study_procedure, "careful": run_careful_user}
Runs = Mapping[str, Callable[[], Scored]]  # by the provider's name


@dataclass(frozen=True, slots=True, eq=False)
class Provider:
    """What the loop times, ready to run."""

    name: str
    run: Callable[[], Scored]
    dtype: torch.dtype  # in which it computes
    repeats: int
    verify: Callable[[Scored], float]  # how far from what is expected; raises SystemExit where that is too far


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """What the loop gives for a provider."""

    name: str
    scored: Scored  # of the last run
    timing: Timing
    repeats: int
    peak_bytes: int
    rates: Rates  # the machine's, just before; a GPU's square product stands for its peak
    difference: float  # as ``verify`` gave it

    def gflops(self, spec: DecoderSpec) -> tuple[float | str, float | str]:
        """The rate of what psykern computed, and its share of the peak; nothing for another's."""
        if self.scored.plan is None:
            return "", ""
        work = cost(self.scored.plan, spec, torch.float32)  # the type counts for the bytes alone
        rate = (work.flops_body + work.flops_attention + work.flops_head) / self.timing.median / 1e9
        return round(rate, 1), self.rates.share(rate * self.timing.median / self.timing.best)

    def columns(self, study: Study) -> dict[str, object]:
        """Those that both kinds of rows have."""
        planned = self.scored.plan
        return {
            "transcripts": len(study.transcripts),
            "responses": study.num_responses,
            "tokens": study.num_tokens,
            "computed_tokens": planned.num_computed if planned else study.num_tokens,
            **self.timing.columns(),
            "repeats": self.repeats,
            "tokens_per_second": round(study.num_tokens / self.timing.median, 1),
            "peak_mb": round(self.peak_bytes / 1e6),
        }


def bench(providers: Iterable[Provider], device: torch.device, square: int = 2048) -> Iterator[Measured]:
    """Each provider in turn. One whose result is wrong is refused, and with it the rest. ``square``: side of the
    product whose rate is measured before."""
    for provider in providers:
        on_cpu = device.type == "cpu"
        now = rates.measure(provider.dtype, square) if on_cpu else Rates(matrix_gflops(device, provider.dtype), {})
        scored, timing, peak = measure(provider.run, provider.repeats, device)
        difference = provider.verify(scored)
        yield Measured(provider.name, scored, timing, provider.repeats, peak, now, difference)


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
    rows = bench_studies(options)
    print_totals(rows, options.providers)
    if options.name:
        print(f"written: {write_csv(options.name, rows, options.folder)}")


def chosen(mix: dict[str, int], options: argparse.Namespace) -> dict[str, int]:
    return {name: count for name, count in mix.items() if not options.studies or name in options.studies}


def bench_studies(options: argparse.Namespace) -> list[dict[str, object]]:
    """The shape of Qwen2.5-0.5B on a CPU: a row for each study and provider."""
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        oracle = make_checkpoint(folder, options.layers)
        models: dict[str, Model | ForeignModel] = {
            name: Model(folder_of(name, folder), Compute(CPU, computes_in(name), resolve(OWN[name], CPU)))
            for name in OWN
        }
        if LIBRARY in options.providers:
            models[LIBRARY] = ForeignModel(ModelFolder(folder_of(LIBRARY, folder)), Compute.resolve("cpu"))
        rounded = None
        if "careful:bf16" in options.providers:
            rounded = AutoModelForCausalLM.from_pretrained(folder_of("careful:bf16", folder), dtype=torch.bfloat16)
        tokenizer = Tokenizer.load(folder_of("study", folder))
        own = partial(run_psykern, tokenizer=tokenizer, min_share=options.min_share)
        studies = load_studies(chosen(MIXES[options.mix], options), tokenizer)
        print(f"{sum(s.num_tokens for s in studies):,} tokens, {sum(s.num_responses for s in studies):,} responses")
        for study in studies:
            runs = {name: partial(run, oracle, study) for name, run in BASELINES.items()}
            runs |= {"careful:bf16": partial(run_careful_user, rounded, study)} if rounded else {}
            runs |= {name: partial(own, model, study) for name, model in models.items()}
            for measured in bench(study_providers(study, runs, options), CPU):
                spec = models.get(measured.name, models["psykern"]).spec
                rows.append(study_row(study, measured, spec, folder_of(measured.name, folder)))
                print_row(rows[-1])
    return rows


def computes_in(provider: str) -> torch.dtype:
    return torch.bfloat16 if provider in BF16 else torch.float32


def folder_of(provider: str, folder: Path) -> Path:
    """Of the checkpoint that a provider reads, in the folder of all."""
    return folder / str(CHECKPOINTS.get(provider, torch.float32))


def study_providers(study: Study, runs: Runs, options: argparse.Namespace) -> Iterator[Provider]:
    """As asked for; compared by the log-probabilities of whole responses."""
    lengths = np.concatenate([t.spans_tok[:, 1] - t.spans_tok[:, 0] for t in study.encoded])
    starts = np.concatenate(([0], np.cumsum(lengths[lengths > 0])[:-1]))

    def distance(got: np.ndarray, expected: np.ndarray) -> float:
        responses, right = (np.add.reduceat(scores.astype(np.float64), starts) for scores in (got, expected))
        return float(np.abs(responses - right).max())

    exact = Distance(distance, TOLERANCE, "{:.1e} nats")
    rounded = Distance(rms_of, RMS_TOLERANCE[torch.bfloat16], "{:.3f} RMS")
    comparison = Comparison(study.name)
    for name in options.providers:
        repeats = 1 if name == "study" else options.repeats
        verify = partial(comparison.check, name, rounded if name in BF16 else exact)
        yield Provider(name, runs[name], computes_in(name), repeats, verify)


def study_row(study: Study, measured: Measured, spec: DecoderSpec, folder: Path) -> dict[str, object]:
    """``folder``: of the checkpoint that was read."""
    gflops, share = measured.gflops(spec)
    is_exact = measured.name not in BF16
    return {
        "study": study.name,
        "provider": measured.name,
        "layers": spec.num_layers,
        "checkpoint": folder.name.removeprefix("torch."),
        "dtype": str(computes_in(measured.name)).removeprefix("torch."),
        **measured.columns(study),
        "max_difference_nats": f"{measured.difference:.1e}" if is_exact else "",
        "rms_of_differences": "" if is_exact else round(measured.difference, 5),
        "weights_mb": round(weight_bytes(folder) / 1e6),
        "gflops": gflops,
        "share_of_peak": share,
        **measured.rates.columns(),
    }


def bench_shape(options: argparse.Namespace) -> None:
    """One of the study's shapes on a device: exactness first, then every provider over all studies."""
    device, dtype = options.device, dtype_of(options)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        start = time.perf_counter()
        user = make_shape(folder, options, dtype)
        tokenizer = Tokenizer.load(folder)
        whole, short = load_whole_and_short(options, tokenizer)
        print(f"checkpoint and {whole.num_tokens:,} tokens in {time.perf_counter() - start:.1f} s")
        expected = run_careful_user(copy.deepcopy(user).float(), short)
        release(device)
        others = rms_of(run_careful_user(user, short).logprob, expected.logprob)
        print(f"RMS of differences of transformers in {dtype} from itself in fp32: {others:.5f} nats")
        model = Model(folder, Compute(device, dtype, resolve("auto", device)))
        suitable = budgets(model.spec, device, dtype)
        own = partial(run_psykern, tokenizer=tokenizer, min_share=options.min_share, budgets=suitable)
        rms = check_exact(own(model, short), expected, dtype)
        models = {"psykern": model}
        if "psykern:streamed" in options.providers:
            models["psykern:streamed"] = Model(folder, model.compute, num_slots=2)
        runs = {name: partial(run, user, whole) for name, run in BASELINES.items()}
        runs |= {name: partial(own, model, whole) for name, model in models.items()}
        runs |= {
            name: partial(with_other_blocks, name, runs["psykern"])
            for name in options.providers
            if has_other_blocks(name)
        }
        warm_ups = {name: partial(run, user, short) for name, run in BASELINES.items()}
        sustained = sustained_gflops(options, suitable.batch_tokens)
        rows, square = [], 64 if options.quick else 2048
        for measured in bench(shape_providers(whole.name, runs, warm_ups, options), device, square):
            row = shape_row(whole, measured, model.spec, rms, options)
            share = round(float(str(row["gflops"])) / sustained, 3) if sustained and row["gflops"] else ""
            row |= {"sustained_gflops": round(sustained, 1) if sustained else "", "share_of_sustained": share}
            rows.append(row | {"careful_rms_against_fp32": round(others, 6)})
            if device.type == "cuda" and (
                measured.name == "psykern" or has_other_blocks(measured.name)
            ):  # at once: what comes next may be cut
                rows[-1]["kernel_idle_share"] = profile_run(measured.name, runs[measured.name], options)
            print_row(rows[-1])
            save(rows, options)


def sustained_gflops(options: argparse.Namespace, num_rows: int) -> float:
    """Of the products of a layer; 0 on a CPU."""
    if options.device.type == "cpu":
        return 0.0
    work = layer_of(options.shape, num_rows, Place(options.device, dtype_of(options)), options.quick)
    return work.flops / repeated(work, 1.5, options.device)[0] / 1e9


def has_other_blocks(provider: str) -> bool:
    return provider.partition(":")[2][:1].isdigit()


def with_other_blocks(provider: str, run: Callable[[], Scored]) -> Scored:
    """``run`` with other blocks of attention than those of the table for GPUs: ``psykern:128x128x32x8x3``."""
    module = import_module("psykern.kernels.triton.prefix_attention")
    blocks = module.Blocks(*map(int, provider.partition(":")[2].split("x")))
    with patch.object(module, "blocks_of", lambda *_: blocks):
        return run()


def profile_run(provider: str, run: Callable[[], Scored], options: argparse.Namespace) -> float | str:
    """The share of the time in which no kernel ran, in one more run; what each kernel took goes to a file beside."""
    share, kernels = profile_kernels(run)
    for row in kernels[:12]:
        print_row(row)
    if options.name:
        write_csv(f"{options.name}_profile_{provider.rpartition(':')[2]}", kernels, options.folder, options.device)
    return "" if share is None else round(share, 4)


def save(rows: list[dict[str, object]], options: argparse.Namespace) -> None:
    if options.name:
        write_csv(options.name, rows, options.folder, options.device)


def load_whole_and_short(options: argparse.Namespace, tokenizer: Tokenizer) -> tuple[Study, Study]:
    """All studies of the mix as one, and their shortest transcripts, as far as the oracle can score them."""
    data, mix = options.data / "psych", MIXES[options.mix]
    if not data.is_dir():
        data, mix = demo.SAMPLE, MIXES["demo"]
    mix = chosen(mix, options)
    studies = load_studies(mix, tokenizer, data)
    short = together("short", [one for one in map(shortest_of, studies) if one.num_tokens <= ORACLE_TOKENS])
    if not short.encoded:
        raise SystemExit(f"expected a transcript of at most {ORACLE_TOKENS} tokens in {', '.join(mix)}")
    return together("all", studies), short


def check_exact(got: Scored, expected: Scored, dtype: torch.dtype) -> float:
    """The RMS of differences of log-probabilities; raises SystemExit where it is too large."""
    found = rms_of(got.logprob, expected.logprob)
    print(f"RMS of differences from transformers in fp32: {found:.5f} nats, {len(expected.logprob)} tokens", flush=True)
    if found > 3 * RMS_TOLERANCE[dtype]:  # what lies between is the summary's to tell
        raise SystemExit(f"RMS: expected at most {RMS_TOLERANCE[dtype]}, got {found:.5f}: refused")
    return found


def release(device: torch.device) -> None:
    """What is no longer used goes back to the device, whose free memory decides how many layers stay on it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def shape_providers(study: str, runs: Runs, warm_ups: Runs, options: argparse.Namespace) -> Iterator[Provider]:
    """As asked for, each after a run that compiles, allocates and reads: psykern's own, which must repeat itself, or
    what ``warm_ups`` has for the provider."""
    most = 2 * RMS_TOLERANCE[torch.bfloat16]  # both are rounded, and each may be that far from fp32
    comparison, distance = Comparison(study), Distance(rms_of, most, "{:.3f} RMS")
    for name in options.providers:
        release(options.device)
        first = warm_ups.get(name, runs[name])()
        before = None if name in warm_ups else first.logprob
        repeats = options.repeats if name == "psykern" or has_other_blocks(name) else 1
        verify = partial(comparison.check, name, distance, before=before)
        yield Provider(name, runs[name], dtype_of(options), repeats, verify)


def shape_row(
    study: Study, measured: Measured, spec: DecoderSpec, rms: float, options: argparse.Namespace
) -> dict[str, object]:
    """``rms``: from fp32, as the exactness check found it."""
    (gflops, share), idle = measured.gflops(spec), measured.scored.idle_share
    steps = measured.scored.seconds
    return {
        "shape": options.shape,
        "study": study.name,
        "provider": measured.name,
        "dtype": str(dtype_of(options)).removeprefix("torch."),
        **measured.columns(study),
        "rms_against_fp32": round(rms, 6),
        "matrix_gflops": round(measured.rates.peak, 1),
        "gflops": gflops,
        "share_of_matrix": share,
        **{f"{step}_seconds": round(steps.get(step, 0.0), 4) for step in ("encode", "plan", "engine")},
        "idle_share": "" if idle is None else round(idle, 4),
        "kernel_idle_share": "",
    }


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
    begin_unheld()
    main()
