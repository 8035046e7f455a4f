"""Psych-201 rehearsed: everything of a run but the model, on a data set of its size and statistics.

The data are real: transcripts of the shared studies, drawn with the weights of largest entropy that give the published
means of tokens and responses per transcript, in studies of unequal size, each participant's option letters renamed.
They are made in pieces, and each piece goes twice through ``psykern.score``, with a model that answers at once: first
from the text, which fills the token cache, then from the cache, as the next checkpoint would. Records are checked to
be all there. Reported are tokens per second without loading the model, and the process's peak memory after each piece,
which must not grow.

``--fraction 1`` is the whole of Psych-201: 208,021 transcripts, about 26 million responses and a billion tokens.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import re
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from harness import RESULTS, print_row, write_csv
from instant import make_tiny, score_instantly
from providers import SHARED
from scipy.optimize import root

from psykern import Settings
from psykern.core.types import TargetScores
from psykern.engine.plan import Plan
from psykern.runs import folder as records
from psykern.runs.manifest import peak_memory_bytes

TRANSCRIPTS, RESPONSES, TOKENS = 208_021, 25_906_599, 1.0e9  # of Psych-201
CHARS_PER_TOKEN = 4.2  # of these studies under Qwen3's tokenizer
STUDIES = 200
SAMPLE = 60  # transcripts of each shared study that are drawn from
MOST_MEMORY = 4e9  # bytes
PHASES = ("scan", "read", "encode", "plan", "write")  # they overlap
_LETTER = re.compile(r"(?<![A-Za-z])[A-Z](?![A-Za-z])")


@dataclass(frozen=True, slots=True)
class Source:
    """A shared study."""

    name: str
    texts: list[str]
    chars: float  # mean of a transcript
    responses: float


def load_sources(folder: Path) -> list[Source]:
    sources = []
    for path in sorted(folder.glob("*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            texts = [json.loads(line)["text"] for line in file]
        texts = texts[:: max(1, len(texts) // SAMPLE)][:SAMPLE]
        chars, responses = (float(np.mean([f(t) for t in texts])) for f in (len, lambda t: t.count("<<")))
        sources.append(Source(path.name.removesuffix(".jsonl.gz"), texts, chars, responses))
    return sources


def weights_of(sources: Sequence[Source]) -> np.ndarray:
    """[sources] shares of the transcripts: those of largest entropy that have Psych-201's mean number of characters and
    of responses per transcript."""
    means = np.array([[s.chars, s.responses] for s in sources])
    wanted = np.array([TOKENS * CHARS_PER_TOKEN, RESPONSES]) / TRANSCRIPTS
    scaled = means / wanted

    def shares(slopes: np.ndarray) -> np.ndarray:
        odds = scaled @ slopes
        e = np.exp(odds - odds.max())
        return np.asarray(e / e.sum())

    found = root(lambda slopes: shares(slopes) @ scaled - 1, np.zeros(2))
    assert found.success, f"no weights give the means: {found.message}"
    return shares(found.x)


def renamed(text: str, rng: np.random.Generator) -> str:
    """The text with its single capital letters permuted, as experiments draw option names anew."""
    letters = [chr(ord("A") + i) for i in range(26)]
    new = dict(zip(letters, rng.permutation(letters).tolist(), strict=True))
    return _LETTER.sub(lambda match: str(new[match[0]]), text)


def write_piece(folder: Path, sources: Sequence[Source], counts: Sequence[int], first: int, seed: int) -> None:
    """A file for each study ``first + i`` with ``counts[i]`` participants."""
    folder.mkdir()
    shares = weights_of(sources)
    for i, count in enumerate(counts):
        rng = np.random.default_rng([seed, first + i])
        source = sources[rng.choice(len(sources), p=shares)]
        with gzip.open(folder / f"study{first + i:03d}-{source.name}.jsonl.gz", "wt", 1, encoding="utf-8") as file:
            for participant in range(count):
                text = renamed(source.texts[rng.integers(len(source.texts))], rng)
                file.write(json.dumps({"participant": participant, "text": text}, ensure_ascii=False) + "\n")


def drawn_scores(rng: np.random.Generator, plan: Plan) -> TargetScores:
    """Every wave is laid out as for a model; scores are drawn, so that records pack as badly as real ones."""
    for _ in plan.waves():
        pass
    logprob = -rng.exponential(size=plan.num_targets).astype(np.float32)
    return TargetScores(logprob, logprob > -0.5, rng.random(plan.num_targets, np.float32))


def run(model: Path, data: Path, out: Path, cache: Path, unit_tokens: int) -> dict[str, float]:
    """Seconds of everything but loading, and what went through."""
    settings = Settings(device="cpu", unit_tokens=unit_tokens)
    start = time.perf_counter()
    made = score_instantly(model, data, out, settings, cache, partial(drawn_scores, np.random.default_rng(0)))
    seconds = time.perf_counter() - start - made.manifest.seconds["load"]
    counts = made.manifest.counts
    rows = sum(batch.num_rows for batch in records.iter_run(out, ["response_index"]))
    assert rows == counts.responses == counts.scored_responses + _empty(out), "records are missing"
    return {
        "seconds": seconds,
        "transcripts": counts.transcripts,
        "responses": counts.responses,
        "tokens": counts.tokens,
        **{f"seconds_{name}": made.manifest.seconds.get(name, 0.0) for name in PHASES},
    }


def _empty(out: Path) -> int:
    return sum(batch.column(0).null_count for batch in records.iter_run(out, ["logprob"]))


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def rehearse(fraction: float, pieces: int, seed: int, unit_tokens: int, folder: Path) -> list[dict[str, Any]]:
    """A row for each piece and way."""
    sources = load_sources(SHARED / "psych")
    model = make_tiny(folder / "model")
    rng = np.random.default_rng(seed)
    sizes = rng.lognormal(0, 1, STUDIES)
    counts = np.maximum(1, np.round(sizes / sizes.sum() * TRANSCRIPTS * fraction)).astype(int)
    rows: list[dict[str, Any]] = []
    for piece, studies in enumerate(np.array_split(np.arange(STUDIES), pieces)):
        data, cache = folder / "data", folder / "cache"
        write_piece(data, sources, counts[studies].tolist(), int(studies[0]), seed)
        for way in ("text", "cache"):
            out = folder / f"run-{way}"
            row = {"piece": piece, "way": way} | run(model, data, out, cache, unit_tokens)
            row |= {
                "tokens_per_second": round(row["tokens"] / row["seconds"]),
                "peak_mb": round(peak_memory_bytes() / 2**20),
                "data_mb": round(folder_bytes(data) / 2**20, 1),
                "records_mb": round(folder_bytes(out) / 2**20, 1),
                "cache_mb": round(folder_bytes(cache) / 2**20, 1),
            }
            print_row(row)
            rows.append(row)
        for path in (data, cache, folder / "run-text", folder / "run-cache"):
            shutil.rmtree(path)
    assert rows[-1]["peak_mb"] * 2**20 < MOST_MEMORY, "memory is beyond 4 GB"
    return rows


def predicted_hours(device: str, model: str) -> float:
    """Of the whole data set on one device, from the roofline."""
    with (RESULTS / "roofline.csv").open() as file:
        return next(
            float(row["predicted_hours"])
            for row in csv.DictReader(file)
            if (row["device"], row["model"]) == (device, model) and row["predicted_hours"]
        )


def total(rows: Sequence[dict[str, Any]], fraction: float, way: str) -> dict[str, Any]:
    """All pieces of one way, and what they say of the whole data set, an extrapolation unless the fraction is 1."""
    own = [row for row in rows if row["way"] == way]
    sums = {name: sum(row[name] for row in own) for name in own[0] if name not in ("piece", "way", "peak_mb")}
    rate = sums["tokens"] / sums["seconds"]
    return {
        "fraction": fraction,
        "way": way,
        **{name: round(value, 1) for name, value in sums.items() if name != "tokens_per_second"},
        "tokens_per_second": round(rate),
        "hours_of_all": round(TOKENS / rate / 3600, 2),  # of the driver alone
        "h100_hours_predicted": predicted_hours("H100 SXM 80GB", "Qwen3-8B"),
        "first_peak_mb": own[0]["peak_mb"],
        "peak_mb": own[-1]["peak_mb"],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fraction", type=float, default=0.02, help="of Psych-201's transcripts")
    parser.add_argument("--pieces", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--unit-tokens", type=int, default=2**21, help="as on a GPU")
    parser.add_argument("--name", help="CSV file in results/; default: no file")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="psykern-scale-") as folder:
        rows = rehearse(options.fraction, options.pieces, options.seed, options.unit_tokens, Path(folder))
    totals = [total(rows, options.fraction, way) for way in ("text", "cache")]
    for row in totals:
        print_row(row)
    if options.name:
        print(f"written: {write_csv(options.name, totals)}")


if __name__ == "__main__":
    main()
