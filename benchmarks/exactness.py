"""How far scores are from the model in fp64, and from those under other budgets.

    python benchmarks/exactness.py [--model FOLDER --data FILE… [--bfloat16]] [--name exactness_cpu.csv]

Without a model: small random checkpoints of every family, random tokens. With one: the first transcript of at least
400 tokens of each file, cut at 900. Beside psykern stands transformers in fp32, which rounds too. ``sum_30`` and
``sum_300`` are of so many tokens that follow each other, as of a long response. What is off by more than rounding is
refused.

With ``--bfloat16`` psykern and transformers in bf16 stand beside each other, as far as they are from transformers in
fp32 with the same weights, rounded to bf16: the root of the mean square, and the mean with its standard error, over the
first 4,096 tokens of the file's first transcripts, of 2,000 tokens together at least.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import tokenizers
import torch
from harness import print_row, write_csv
from transformers import AutoModelForCausalLM, PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from support.checkpoints import LAYERS, make_model
from support.exactness import in_fp64, token_logprobs, worst_sum
from support.groups import encoded

from psykern.core.types import Transcript
from psykern.data.dataset import Dataset
from psykern.data.read import read
from psykern.engine.engine import Engine
from psykern.engine.plan import plan
from psykern.kernels.compute import Compute
from psykern.models.model import Model

BUDGETS = ((4096, 512), (300, 100), (1000, 17))  # tokens of a wave and of a batch
WRONG = 1e-2  # nats; no rounding is that large


def measured(
    name: str, folder: Path, model: PreTrainedModel, texts: Sequence[np.ndarray]
) -> Iterator[dict[str, object]]:
    """A row for psykern's kernels, for plain torch in psykern, and for transformers in fp32. ``texts``: token ids."""
    truth = np.concatenate([token_logprobs(in_fp64(model), ids) for ids in texts])
    for provider in ("cpu", "reference"):
        scorer = Engine(Model(folder, Compute.resolve("cpu", backend=provider)))
        group = [encoded(ids.tolist(), [(1, len(ids))]) for ids in texts]
        scores = [
            scorer.run(plan(group, wave_tokens=wave, batch_tokens=batch)).logprob.astype(np.float64)
            for wave, batch in BUDGETS
        ]
        between = max(np.abs(other - scores[0]).max() for other in scores)
        yield row(name, f"psykern:{provider}", scores[0] - truth, between)
    yield row(name, "transformers", np.concatenate([token_logprobs(model, ids) for ids in texts]) - truth, None)


def row(name: str, provider: str, error: np.ndarray, between: float | None) -> dict[str, object]:
    """``error`` in nats of each token; ``between``: the worst between budgets. Raises SystemExit for a wrong result."""
    if np.abs(error).max() > WRONG:
        raise SystemExit(f"{name}: {provider} is {np.abs(error).max():.1e} nats from fp64: refused")
    numbers = {"token_worst": np.abs(error).max(), "token_rms": np.sqrt(np.mean(error**2))}
    numbers |= {f"sum_{n}_worst": worst_sum(error, n) for n in (30, 300)}
    cells = {key: f"{value:.1e}" for key, value in numbers.items()}
    return {"model": name, "provider": provider, "tokens": len(error), **cells} | {
        "budgets_worst": "" if between is None else f"{between:.1e}"
    }


def random_cases() -> Iterator[tuple[str, Path, PreTrainedModel, list[np.ndarray]]]:
    """Two checkpoints of each entry of LAYERS, with 2,001 tokens."""
    rng = np.random.default_rng(0)
    for name, config in LAYERS.items():
        for seed in (0, 1):
            with tempfile.TemporaryDirectory() as folder:
                model = make_model(Path(folder), seed, **config)
                yield f"{name}, seed {seed}", Path(folder), model, [rng.integers(320, size=n) for n in (700, 400, 901)]


def real_cases(folder: Path, data: Sequence[Path]) -> Iterator[tuple[str, Path, PreTrainedModel, list[np.ndarray]]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for path in data:
        rows = (found for found in read(Dataset.find([path], hashed=False)) if isinstance(found, Transcript))
        texts = (np.array(tokenizer.encode(transcript.text).ids[:900]) for transcript in rows)
        ids = next((ids for ids in texts if len(ids) >= 400), None)
        if ids is not None:
            yield f"{folder.name}, {path.name.partition('.')[0]}", folder, model, [ids]


def rounded_cases(folder: Path, data: Sequence[Path]) -> Iterator[dict[str, object]]:
    """A row for each file and each that computes in bf16."""
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    with tempfile.TemporaryDirectory() as temporary:
        rounded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        rounded.save_pretrained(temporary)
        exact = AutoModelForCausalLM.from_pretrained(temporary, dtype=torch.float32).eval()
        engine = Engine(Model(Path(temporary), Compute.resolve("cpu", dtype="bfloat16")))
        for path in data:
            texts = list(first_tokens(tokenizer, path))
            truth = np.concatenate([token_logprobs(exact, ids) for ids in texts])
            group = [encoded(ids.tolist(), [(1, len(ids))]) for ids in texts]
            wave, batch = BUDGETS[0]
            logprobs = {
                "psykern": engine.run(plan(group, wave_tokens=wave, batch_tokens=batch)).logprob,
                "transformers": np.concatenate([token_logprobs(rounded, ids) for ids in texts]),
            }
            for provider, got in logprobs.items():
                error = got.astype(np.float64) - truth
                numbers = {"rms": np.sqrt(np.mean(error**2)), "bias": error.mean()}
                numbers["bias_error"] = error.std() / np.sqrt(len(error))
                cells = {key: f"{value:.2e}" for key, value in numbers.items()}
                yield {"study": path.name.partition(".")[0], "provider": provider, "tokens": len(error), **cells}


def first_tokens(
    tokenizer: tokenizers.Tokenizer, path: Path, enough: int = 2000, most: int = 4096
) -> Iterator[np.ndarray]:
    """Token ids of the file's first transcripts, cut, until there are enough."""
    count = 0
    for found in read(Dataset.find([path], hashed=False)):
        if isinstance(found, Transcript) and count < enough:
            ids = np.array(tokenizer.encode(found.text).ids[:most])
            count += len(ids)
            yield ids


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path, nargs="+", default=[])
    parser.add_argument("--bfloat16", action="store_true", help="what bf16 costs")
    parser.add_argument("--name", default="exactness_cpu.csv")
    options = parser.parse_args(arguments)
    if options.bfloat16:
        lines = rounded_cases(options.model, options.data)
    else:
        cases = real_cases(options.model, options.data) if options.model else random_cases()
        lines = (line for case in cases for line in measured(*case))
    rows = []
    for line in lines:
        print_row(line)
        rows.append(line)
    write_csv(options.name, rows)


if __name__ == "__main__":
    main()
