"""Scoring in memory against ``transformers``: a closed loop trial by trial, many participants at once, logprobs of
(context, continuation) pairs, and how soon a loaded scorer computes.

    python benchmarks/bench_embedded.py            # a random llama of SmolLM2-135M's shape, and the demo's model
    python benchmarks/bench_embedded.py --quick    # small numbers, to see that everything runs

The baseline is a careful user: float32, ``past_key_values`` and only the last token's logits in the loop; batches of
pairs sorted by length, and only the rows that predict a continuation through the head. Both are given the same texts
and both tokenize them. Scores are compared before anything is timed; they must agree to 1e-4 nats.
"""

from __future__ import annotations

import argparse
import gc
import gzip
import json
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from harness import RESULTS, print_row, write_csv
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

import psykern
from psykern import demo
from psykern.data.tokenizer import Tokenizer

OPTIONS = ("A", "B")
INSTRUCTIONS = "There are two machines, A and B. On each trial you choose one of them.\n"
# What is told behind a choice: in words, as transcripts do, and as a table. How much is new decides what a step costs.
TOLD, TERSE = ">>. You get {won} points.\nYou press <<", ">> {won}\n<<"
TOLERANCE = 1e-4  # nats


@dataclass(slots=True, eq=False)
class Participant:
    """A two-armed bandit's player, whose choices are drawn from what it is told of the options."""

    rng: np.random.Generator
    trial: str = TOLD  # what stands behind a choice, up to the next one
    text: str = INSTRUCTIONS + "You press <<"  # that the model has not been given yet
    given: list[list[float]] = field(default_factory=list)  # log-softmax over OPTIONS, of each trial

    @classmethod
    def number(cls, seed: int, trial: str = TOLD) -> Participant:
        return cls(np.random.default_rng(seed), trial)

    def press(self, log_softmax: Sequence[float]) -> None:
        self.given.append([float(value) for value in log_softmax])
        # Rounded, so that two providers that differ in the last bits play the same game.
        pressed = int(self.rng.random() > round(float(np.exp(log_softmax[0])), 2))
        won = int(self.rng.random() < (0.7, 0.3)[pressed])
        self.text = OPTIONS[pressed] + self.trial.format(won=won)


class CachedLoop:
    """What a careful user of ``transformers`` writes for one participant."""

    def __init__(self, model: PreTrainedModel, tokenizer: Tokenizer) -> None:
        self._model, self._tokenizer = model, tokenizer.backend
        self._cache = DynamicCache()
        self._ids: list[int] = []
        self._text = ""
        self._options = [self._tokenizer.encode(option).ids[0] for option in OPTIONS]

    def choose(self, text: str) -> list[float]:
        self._text += text
        ids = self._tokenizer.encode(self._text).ids
        if ids[: len(self._ids)] != self._ids:
            raise ValueError("the text that was appended changes the tokens before it")
        new, self._ids = ids[len(self._ids) :], ids
        with torch.inference_mode():
            logits = self._model(
                torch.tensor([new]), past_key_values=self._cache, use_cache=True, logits_to_keep=1
            ).logits[0, -1]
            return torch.log_softmax(logits[self._options].float(), dim=0).tolist()


def loop_of_transformers(sides: Sides, people: Sequence[Participant], trials: int) -> None:
    for person in people:
        loop = CachedLoop(sides.model, sides.tokenizer)
        for _ in range(trials):
            person.press(loop.choose(person.text))


def loop_of_sessions(scorer: psykern.Scorer, people: Sequence[Participant], trials: int) -> None:
    for person in people:
        session = scorer.session()
        for _ in range(trials):
            session.append(person.text)
            person.press(session.choose(OPTIONS).log_softmax)


def sessions_together(scorer: psykern.Scorer, people: Sequence[Participant], trials: int) -> None:
    sessions = [scorer.session() for _ in people]
    for _ in range(trials):
        choices = psykern.step(sessions, [person.text for person in people], options=OPTIONS)
        for person, choice in zip(people, choices, strict=True):
            person.press(choice.log_softmax)


def pairs_of(count: int, chars: int) -> tuple[list[str], list[list[str]]]:
    """``count`` contexts of about ``chars`` characters from the sample's transcripts, each with four continuations."""
    texts = []
    for file in sorted(demo.SAMPLE.glob("*.jsonl.gz")):
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            texts += [json.loads(line)["text"].replace("<<", "").replace(">>", "") for line in lines]
    rng = np.random.default_rng(0)
    contexts, continuations = [], []
    words = [" " + word for word in " ".join(texts).split() if word.isalpha()]
    while len(contexts) < count:
        text = texts[rng.integers(len(texts))]
        length = int(chars * rng.uniform(0.6, 1.4))
        if len(text) <= length:
            continue
        start = int(rng.integers(len(text) - length))
        contexts.append(text[start : start + length].strip())
        continuations.append(["".join(rng.choice(words, rng.integers(1, 4))) for _ in range(4)])
    return contexts, continuations


@torch.inference_mode()
def pairs_of_transformers(
    model: PreTrainedModel, tokenizer: Tokenizer, contexts: list[str], continuations: list[list[str]], batch: int
) -> list[float]:
    pairs = [(context, context + after) for context, own in zip(contexts, continuations, strict=True) for after in own]
    before = [len(e.ids) for e in tokenizer.backend.encode_batch([context for context, _ in pairs])]
    ids = [e.ids for e in tokenizer.backend.encode_batch([text for _, text in pairs])]
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    sums = [0.0] * len(ids)
    for first in range(0, len(order), batch):
        own = order[first : first + batch]
        padded = torch.zeros(len(own), len(ids[own[0]]), dtype=torch.int64)
        mask = torch.zeros_like(padded)
        for row, i in enumerate(own):
            padded[row, : len(ids[i])] = torch.tensor(ids[i])
            mask[row, : len(ids[i])] = 1
        hidden = model.model(padded, attention_mask=mask, use_cache=False).last_hidden_state
        places = [(row, t) for row, i in enumerate(own) for t in range(before[i], len(ids[i]))]
        rows, targets = (torch.tensor(column) for column in zip(*places, strict=True))
        logprobs = torch.log_softmax(model.lm_head(hidden[rows, targets - 1]).float(), dim=-1)
        for (row, _), value in zip(
            places, logprobs.gather(1, padded[rows, targets][:, None])[:, 0].tolist(), strict=True
        ):
            sums[own[row]] += value
    return sums


def make_llama(folder: Path, *, layers: int = 30) -> Path:
    """Random float32 weights at the shape of SmolLM2-135M, with the demo's tokenizer."""
    config = AutoConfig.for_model(
        "llama",
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=8192,
        rope_theta=100_000.0,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo.MODEL / name, folder / name)
    return folder


class Sides:
    """One checkpoint, loaded by both."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.scorer = psykern.load(folder, device="cpu")
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = Tokenizer.load(folder)
        self.rows: list[dict[str, object]] = []

    def add(self, case: str, provider: str, seconds: Sequence[float], per: int, baseline: float | None = None) -> float:
        """A row: the median time for one of ``per``; ``baseline``: that of transformers."""
        median = statistics.median(seconds) / per
        row: dict[str, object] = {"model": self.name, "case": case, "provider": provider, "repeats": len(seconds)}
        row |= {"ms": float(f"{median * 1e3:.4g}"), "times_transformers": ""}
        if baseline is not None:
            row["times_transformers"] = float(f"{baseline / median:.3g}")
        print_row(row)
        self.rows.append(row)
        return median


def timed(run: Callable[[], object]) -> float:
    gc.collect()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def check_equal(one: Sequence[Participant], other: Sequence[Participant]) -> None:
    """Raises AssertionError where two games were not the same, or not equally expected."""
    for first, second in zip(one, other, strict=True):
        np.testing.assert_allclose(first.given, second.given, atol=TOLERANCE, rtol=0)
        assert first.text == second.text


def bench_loop(sides: Sides, options: argparse.Namespace) -> None:
    """Three participants, one after the other."""
    people, trials = 3, 4 if options.quick else 30
    times: dict[str, list[float]] = {"transformers": [], "sessions": []}
    for turn in range(1 + options.repeats):
        played = {name: [Participant.number(i) for i in range(people)] for name in times}
        own = timed(lambda: loop_of_transformers(sides, played["transformers"], trials))  # noqa: B023
        ours = timed(lambda: loop_of_sessions(sides.scorer, played["sessions"], trials))  # noqa: B023
        check_equal(played["transformers"], played["sessions"])
        if turn:
            times["transformers"].append(own)
            times["sessions"].append(ours)
    case = f"one by one: {people} participants, {trials} trials; per trial"
    baseline = sides.add(case, "transformers", times["transformers"], people * trials)
    sides.add(case, "psykern", times["sessions"], people * trials, baseline)


def bench_together(sides: Sides, options: argparse.Namespace) -> None:
    """All participants advance together; transformers plays some of them, one after the other."""
    people, trials = (6, 4) if options.quick else (50, 100)
    few = 2 if options.quick else 3
    for trial in (TOLD, TERSE):
        one = [Participant.number(i, trial) for i in range(few)]
        every = [Participant.number(i, trial) for i in range(people)]
        ours = timed(lambda: sessions_together(sides.scorer, every, trials))  # noqa: B023
        own = timed(lambda: loop_of_transformers(sides, one, trials))  # noqa: B023
        check_equal(one, every[:few])
        new = len(sides.tokenizer.backend.encode(OPTIONS[0] + trial.format(won=1)).ids)
        case = f"together: {people} participants, {trials} trials of {new} tokens; per trial of a participant"
        baseline = sides.add(case, "transformers", [own], few * trials)
        sides.add(case, "psykern", [ours], people * trials, baseline)


def bench_pairs(sides: Sides, options: argparse.Namespace) -> None:
    """2,000 pairs, four continuations of a context; transformers at the best of three sizes of batches."""
    contexts, continuations = pairs_of(20 if options.quick else 500, 250)
    few = 10 if options.quick else 50
    sizes = {
        size: timed(lambda: pairs_of_transformers(*_of(sides), contexts[:few], continuations[:few], size))  # noqa: B023
        for size in (8, 16, 32)
    }
    best = min(sizes, key=lambda size: sizes[size])
    got: dict[str, list[float]] = {}

    def own() -> None:
        got["transformers"] = pairs_of_transformers(*_of(sides), contexts, continuations, best)

    def ours() -> None:
        answers = sides.scorer.logprobs(contexts, continuations)
        got["psykern"] = [answer.logprob for of in answers for answer in of]

    times = timed(own), timed(ours)
    np.testing.assert_allclose(got["psykern"], got["transformers"], atol=5 * TOLERANCE, rtol=0)  # sums of some tokens
    case = f"logprobs: {4 * len(contexts)} pairs, 4 of a context; per pair"
    baseline = sides.add(case, f"transformers, batches of {best}", times[:1], 4 * len(contexts))
    sides.add(case, "psykern", times[1:], 4 * len(contexts), baseline)


def _of(sides: Sides) -> tuple[PreTrainedModel, Tokenizer]:
    return sides.model, sides.tokenizer


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small numbers, to see that everything runs")
    parser.add_argument("--repeats", type=int, default=3, help="of the short case")
    parser.add_argument("--only", choices=("loop", "together", "pairs"), help="one case alone")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where the rows go")
    options = parser.parse_args(arguments)
    cases = {"loop": bench_loop, "together": bench_together, "pairs": bench_pairs}
    rows: list[dict[str, object]] = []
    with TemporaryDirectory() as folder:
        models = {"demo": demo.MODEL}
        models["random llama, SmolLM2-135M's shape"] = make_llama(Path(folder), layers=2 if options.quick else 30)
        for name, path in models.items():
            sides = Sides(name, path)
            for case, bench in cases.items():
                if options.only in (None, case):
                    bench(sides, options)
            rows += sides.rows
            sides.scorer.close()
    print(f"written: {write_csv('embedded_cpu', rows, options.folder)}")


if __name__ == "__main__":
    main()
