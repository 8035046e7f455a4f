"""lm-evaluation-harness with psykern and with its own backend ``hf``, on a CPU in float32: multiple choice behind five
examples, and one request for each response of real transcripts.

    python benchmarks/bench_lm_eval.py            # about four minutes on two idle cores
    python benchmarks/bench_lm_eval.py --quick    # few requests, to see that everything runs

Random weights at the shape of Qwen2.5-0.5B, with fewer layers. Both are given the harness's own requests, and what is
timed is the whole call that answers them, tokenizing included. ``hf`` has the best of some batch sizes, tried on a part
of the requests. Log-probabilities must agree to 1e-3 nats and accuracies be equal, or nothing is written.
"""

from __future__ import annotations

import argparse
import gzip
import json
import logging
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import lm_eval
import torch
from harness import RESULTS, Timing, available_bytes, print_row, write_csv
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from providers import SHARED, make_checkpoint

from psykern.integrations.lm_eval import PsykernLM

TOLERANCE = 1e-3  # nats, of a request
SIZES = (1, 4, 8, 16, 32)
WORDS = ("few", "some", "many", "most")
Row = dict[str, object]
Answers = Sequence[tuple[float, bool]]


def texts_of(study: str) -> Iterable[str]:
    with gzip.open(SHARED / "psych" / f"{study}.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]


def documents(**_: Any) -> dict[str, datasets.Dataset]:
    """300 questions that somebody answered in one of four words, and five others to stand in front of all. Each word is
    a token, so that ``hf``, too, reads a question once for its four options."""
    trial = re.compile(r"(You see .* circles are red\?) .*\nYour answer: <<(" + "|".join(WORDS) + ")>>")
    answers = dict(row for text in texts_of("vantiel2021probabilistic_pragmatics") for row in trial.findall(text))
    rows = [{"question": question, "answer": WORDS.index(word)} for question, word in islice(answers.items(), 305)]
    return {"examples": datasets.Dataset.from_list(rows[:5]), "test": datasets.Dataset.from_list(rows[5:])}


TASK = {
    "task": "circles",
    "custom_dataset": documents,
    "test_split": "test",
    "fewshot_split": "examples",
    "fewshot_config": {"sampler": "first_n"},
    "num_fewshot": 5,
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}\nYour answer:",
    "doc_to_choice": list(WORDS),
    "doc_to_target": "answer",
}


def response_requests(people: int) -> list[Instance]:
    """One for each response: all before it, its opening mark included, and the response."""
    pairs = [
        (text[: match.start(1)], match[1])
        for text in islice(texts_of("thoma2025riskychoice"), people)
        for match in re.finditer(r"<<(.+?)>>", text)
    ]
    return [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def evaluate(model: TemplateLM, limit: int | None) -> tuple[list[Instance], float, Answers, float]:
    """The requests that the harness makes of TASK, the seconds of the call that answers them, the answers, accuracy."""
    calls: list[tuple[list[Instance], float, Answers]] = []
    own = model.loglikelihood

    def loglikelihood(requests: list[Instance], **how: Any) -> Answers:
        seconds, answers = timed(lambda: own(requests, **how))
        calls.append((requests, seconds, answers))
        return answers

    model.loglikelihood = loglikelihood  # type: ignore[method-assign]
    try:
        manager = TaskManager(include_defaults=False)
        results = lm_eval.simple_evaluate(model, tasks=[TASK], task_manager=manager, limit=limit, bootstrap_iters=0)
    finally:
        model.loglikelihood = own  # type: ignore[method-assign]
    (call,) = calls
    return (*call, results["results"]["circles"]["acc,none"])


def best_batch_size(model: HFLM, requests: Sequence[Instance], per_row: int, sizes: Sequence[int]) -> int:
    """``per_row``: requests that ``hf`` computes as one row, as they differ in the last token alone."""
    seconds = {}
    for size in sizes:
        own = requests[: per_row * max(8, size)]
        longest = max(len(model.tok_encode(request.args[0])) for request in own)
        if 3 * size * longest * model.model.config.vocab_size * 4 > available_bytes():  # logits and their log-softmax
            print(f"not tried: hf in batches of {size}, whose logits are too large here", flush=True)
            continue
        model.batch_size_per_gpu = size
        seconds[size] = timed(lambda: model.loglikelihood(own, disable_tqdm=True))[0] / len(own)  # noqa: B023
        print(f"hf in batches of {size}: {1 / seconds[size]:.3g} requests/s", flush=True)
    return min(seconds, key=lambda size: seconds[size])


def difference(ours: Answers, theirs: Answers) -> float:
    """The largest of two lists of answers, in nats. Raises AssertionError where it is too large."""
    largest = max(abs(a - b) for (a, _), (b, _) in zip(ours, theirs, strict=True))
    assert largest <= TOLERANCE, f"log-probabilities differ by {largest} nats"
    return largest


def rows_of(case: str, sides: Mapping[str, tuple[int, Sequence[float]]], **columns: object) -> list[Row]:
    """A row a side, of its requests and its seconds; the last one is the baseline."""
    rates = {name: count / Timing.of(seconds).median for name, (count, seconds) in sides.items()}
    rows = []
    for name, (count, seconds) in sides.items():
        row: Row = {"case": case, "provider": name, "requests": count, "repeats": len(seconds)}
        row |= Timing.of(seconds).columns() | {"requests_per_s": float(f"{rates[name]:.4g}")}
        row |= {"times_hf": float(f"{rates[name] / [*rates.values()][-1]:.3g}"), **columns}
        row |= {"lm_eval": version("lm_eval")}
        print_row(row)
        rows.append(row)
    return rows


def bench_choices(ours: PsykernLM, theirs: HFLM, options: argparse.Namespace) -> list[Row]:
    """300 documents of four options."""
    limit = 8 if options.quick else None
    requests, first, answers, accuracy = evaluate(ours, limit)
    size = theirs.batch_size_per_gpu = best_batch_size(
        theirs, requests, len(WORDS), SIZES[:2] if options.quick else SIZES
    )
    own = [first, *(timed(lambda: ours.loglikelihood(requests, disable_tqdm=True))[0] for _ in range(options.repeats))]
    _, seconds, others, their_accuracy = evaluate(theirs, limit)
    assert accuracy == their_accuracy, f"accuracies differ: {accuracy} and {their_accuracy}"
    case = f"multiple choice, {len(requests) // len(WORDS)} documents, 5-shot"
    more = {"max_difference_nats": float(f"{difference(answers, others):.2g}"), "accuracy": round(accuracy, 4)}
    sides = {"psykern": (len(requests), own[1:]), f"hf, batches of {size}": (len(requests), [seconds])}
    return rows_of(case, sides, **more)


def bench_responses(ours: PsykernLM, theirs: HFLM, options: argparse.Namespace) -> list[Row]:
    """Every response of 16 transcripts, nine of each. ``hf`` answers every 8th request, so that each of the nine places
    in a transcript comes as often: 18 requests with contexts of 400 tokens in the mean, as all have."""
    people, step = 2 if options.quick else 16, 8
    requests = response_requests(people)
    part = requests[::step]
    size = theirs.batch_size_per_gpu = best_batch_size(theirs, part[::2], 1, SIZES[:1] if options.quick else (1, 4))
    answers = ours.loglikelihood(requests, disable_tqdm=True)
    own = [timed(lambda: ours.loglikelihood(requests, disable_tqdm=True))[0] for _ in range(options.repeats)]
    seconds, others = timed(lambda: theirs.loglikelihood(part, disable_tqdm=True))
    largest = difference([answers[request.idx] for request in part], others)
    case = f"a request a response, {people} transcripts"
    sides = {"psykern": (len(requests), own), f"hf, batches of {size}, every {step}th": (len(part), [seconds])}
    return rows_of(case, sides, max_difference_nats=float(f"{largest:.2g}"), accuracy="")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few requests, to see that everything runs")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3, help="of psykern's calls")
    parser.add_argument("--only", choices=("choices", "responses"), help="one case alone")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where the rows go")
    options = parser.parse_args(arguments)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    cases = {"choices": bench_choices, "responses": bench_responses}
    with TemporaryDirectory() as folder:
        make_checkpoint(Path(folder), options.layers)
        model = Path(folder) / str(torch.float32)
        ours = PsykernLM(str(model), device="cpu", dtype="float32")
        theirs = HFLM(str(model), device="cpu", dtype="float32")
        rows = [
            row for name, case in cases.items() if options.only in (None, name) for row in case(ours, theirs, options)
        ]
    print(f"written: {write_csv('lm_eval_cpu', rows, options.folder)}")


if __name__ == "__main__":
    main()
