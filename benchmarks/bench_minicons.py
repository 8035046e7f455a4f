"""Sentences through minicons' own scorer of autoregressive models and through psykern's in its place.

    python benchmarks/bench_minicons.py            # about 3 minutes on two cores
    python benchmarks/bench_minicons.py --quick    # few sentences and a small model, to see that everything runs

1,000 different sentences of real transcripts, the same number of every study, in random order; of some of them the
scores of tokens; and minimal pairs, a sentence and the same with one word replaced. Random weights at the shape of
Qwen2.5-0.5B with 4 layers, float32. minicons is given batches of the size that is fastest on some of the sentences, in
their order as in its examples, psykern all of them at once. Scores of all texts are compared; a row is written only
where they agree to 1e-4 nats a token. ``tokens`` are read, ``distinct`` of them are left when equal beginnings are one.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from harness import RESULTS, print_row, time_side_by_side, write_csv
from minicons.scorer import IncrementalLMScorer
from providers import SHARED, make_checkpoint
from transformers import AutoTokenizer

from psykern import demo
from psykern.integrations.minicons import PsykernScorer

SIZES = (1, 4, 16)  # of minicons' batches
WORDS = (4, 60)  # of a sentence
TOLERANCE = 1e-4  # nats of a token


@dataclass(frozen=True)
class Case:
    name: str
    texts: list[str]
    score: Callable[[Any, list[str]], list[Any]]  # a method of both scorers, for some texts


def sequence_scores(lm: Any, texts: list[str]) -> list[Any]:
    scores: list[Any] = lm.sequence_score(texts)  # nats a token
    return scores


def token_scores(lm: Any, texts: list[str]) -> list[Any]:
    scores: list[Any] = lm.token_score(texts)
    return scores


def token_ranks(lm: Any, texts: list[str]) -> list[Any]:
    scores: list[Any] = lm.token_score(texts, rank=True)
    return scores


def sentences_of(folder: Path, count: int) -> list[str]:
    """Different sentences, as many of each study, in random order."""
    rng = np.random.default_rng(0)
    each = []
    for file in sorted(folder.glob("*.jsonl.gz")):
        found: dict[str, None] = {}
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            for line in lines:
                text = re.sub("<<|>>", "", json.loads(line)["text"])
                cut = (piece.strip() for piece in re.split(r"(?<=[.!?])\s+|\n+", text))
                found.update((piece, None) for piece in cut if WORDS[0] <= len(piece.split()) <= WORDS[1])
                if len(found) >= 4 * count:
                    break
        each.append([list(found)[i] for i in rng.permutation(len(found))])
    taken = sorted((place, number) for number, of in enumerate(each) for place in range(len(of)))[:count]
    return [each[taken[i][1]][taken[i][0]] for i in rng.permutation(len(taken))]


def pairs_of(sentences: Sequence[str]) -> list[str]:
    """Each sentence, and behind it the same with one word of its second half replaced."""
    rng = np.random.default_rng(1)
    words = [word for sentence in sentences for word in sentence.split() if word.isalpha()]
    texts = []
    for sentence in sentences:
        own = sentence.split(" ")
        own[rng.integers(len(own) // 2, len(own))] = str(rng.choice(words))
        texts += [sentence, " ".join(own)]
    return texts


def in_batches(case: Case, lm: Any, texts: list[str], size: int) -> list[Any]:
    return [score for first in range(0, len(texts), size) for score in case.score(lm, texts[first : first + size])]


def check_equal(got: list[Any], expected: list[Any]) -> float:
    """The largest difference, in nats. Raises AssertionError where one is too large, or tokens are not the same."""
    differences = []
    for one, other in zip(got, expected, strict=True):
        if isinstance(one, list):  # of (token, score) or (token, score, rank)
            assert [of[0] for of in one] == [of[0] for of in other]
            differences += [abs(a[1] - b[1]) for a, b in zip(one, other, strict=True)]
        else:
            differences.append(abs(one - other))
    worst: float = max(differences)
    assert worst <= TOLERANCE, worst
    return worst


def distinct_tokens(lm: PsykernScorer, texts: list[str]) -> dict[str, object]:
    """Tokens that are read, but for each text's last one, and how many when equal beginnings are one."""
    read = [tuple(ids[:-1]) for ids in lm.tokenizer(texts)["input_ids"]]
    return {
        "tokens": sum(map(len, read)),
        "distinct": len({ids[: end + 1] for ids in read for end in range(len(ids))}),
    }


def best_size(theirs: IncrementalLMScorer, texts: list[str]) -> int:
    """Of the batches with which minicons is fastest."""
    case = Case("", texts[: 2 * max(SIZES)], sequence_scores)
    runs = {str(size): partial(in_batches, case, theirs, case.texts, size) for size in SIZES}
    times = time_side_by_side(runs, 1, warmup=0)
    print({size: round(timing.best, 2) for size, timing in times.items()}, "s by the size of minicons' batches")
    return int(min(times, key=lambda size: times[size].best))


def bench(
    case: Case, theirs: IncrementalLMScorer, ours: PsykernScorer, size: int, repeats: int
) -> list[dict[str, object]]:
    got: dict[str, list[Any]] = {}

    def own() -> None:
        got["minicons"] = in_batches(case, theirs, case.texts, size)

    def psykern() -> None:
        got["psykern"] = case.score(ours, case.texts)

    timings = time_side_by_side({f"minicons, batches of {size}": own, "psykern": psykern}, repeats, warmup=0)
    worst = check_equal(got["psykern"], got["minicons"])
    baseline = next(iter(timings.values())).median
    rows = [
        {
            "case": case.name,
            "provider": name,
            "texts": len(case.texts),
            **distinct_tokens(ours, case.texts),
            "repeats": repeats,
            **timing.columns(),
            "times_minicons": float(f"{baseline / timing.median:.3g}"),
            "worst_difference": float(f"{worst:.2g}"),
        }
        for name, timing in timings.items()
    ]
    for row in rows:
        print_row(row)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few sentences of the demo's sample, under its model")
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--only", choices=("sequence", "tokens", "ranks", "pairs"), help="one case alone")
    parser.add_argument("--data", type=Path, default=SHARED / "psych")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where the rows go")
    options = parser.parse_args(arguments)
    texts = sentences_of(demo.SAMPLE if options.quick else options.data, 20 if options.quick else options.texts)
    cases = {
        "sequence": Case("sequence_score of sentences", texts, sequence_scores),
        "tokens": Case("token_score of sentences", texts[: len(texts) // 10], token_scores),
        "ranks": Case("token_score of sentences, with ranks", texts[: max(len(texts) // 100, 4)], token_ranks),
        "pairs": Case("sequence_score of minimal pairs", pairs_of(texts[: len(texts) // 20]), sequence_scores),
    }
    rows: list[dict[str, object]] = []
    with TemporaryDirectory() as folder:
        model: Any = str(demo.MODEL) if options.quick else make_checkpoint(Path(folder), 4)
        path = demo.MODEL if options.quick else Path(folder) / "torch.float32"
        how = {"dtype": torch.float32} if options.quick else {"tokenizer": AutoTokenizer.from_pretrained(path)}
        theirs, ours = IncrementalLMScorer(model, **how), PsykernScorer(path)
        size = best_size(theirs, texts)
        for name, case in cases.items():
            if options.only in (None, name):
                rows += bench(case, theirs, ours, size, options.repeats)
    print(f"written: {write_csv('minicons_cpu', rows, options.folder)}")


if __name__ == "__main__":
    main()
