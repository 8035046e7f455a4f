"""A model that is loaded once: what it refuses, several runs with it, and another engine in its place."""

from __future__ import annotations

import asyncio
import re
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.toy import Toy, make_toy_data
from transformers import LlamaConfig, LlamaForCausalLM

import psykern
from psykern import Settings
from psykern.core.clock import Clock
from psykern.core.types import TargetScores, TokenTree
from psykern.data.dataset import Dataset
from psykern.runs.job import Options
from psykern.runs.run import score_with
from psykern.scoring.loading import load
from psykern.scoring.question import Question
from psykern.scoring.scorer import Scorer
from psykern.scoring.units import PlannedUnit

SETTINGS = Settings(device="cpu", unit_tokens=200)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return make_toy_data(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def scorer(toy: Toy) -> Scorer:
    return load(toy.model, device="cpu")


def parts(folder: Path) -> list[tuple[str, bytes]]:
    return [(path.name, path.read_bytes()) for path in sorted((folder / "responses").iterdir())]


def test_a_scorer_scores_as_often_as_wanted(toy: Toy, scorer: Scorer, tmp_path: Path) -> None:
    dataset = Dataset.find(toy.data)
    for name in ("one", "two"):
        score_with(scorer, dataset, tmp_path / name, SETTINGS, Options(), Clock())
    psykern.score(toy.model, toy.data, tmp_path / "alone", SETTINGS)
    assert parts(tmp_path / "one") == parts(tmp_path / "two") == parts(tmp_path / "alone")


class Counting:
    """An engine that computes nothing: the n-th target of a unit has the log-probability -n."""

    idle_share = None

    def pairs(
        self, items: Iterable[PlannedUnit], *, stop: Callable[[], bool] = lambda: False
    ) -> Iterator[tuple[PlannedUnit, TargetScores]]:
        for item in items:
            n = item.plan.num_targets
            yield item, TargetScores(-np.arange(n, dtype=np.float32), np.ones(n, np.bool_), np.zeros(n, np.float32))


def test_another_engine_can_stand_in(toy: Toy, scorer: Scorer, tmp_path: Path) -> None:
    stand_in = replace(scorer, engine=Counting())
    run = score_with(stand_in, Dataset.find(toy.data), tmp_path, replace(SETTINGS, options="none"), Options(), Clock())
    records = psykern.read_run(run.folder).to_pylist()
    assert len(records) == run.manifest.counts.responses > 50
    expected = 0.0
    for record in records:
        if record["participant"] == "0" and record["study"] == "bandit":
            tokens = np.arange(expected, expected + record["num_tokens"])
            assert record["logprob"] == -tokens.sum()
            expected += record["num_tokens"]
    assert expected > 5


def tree(tokens: list[int], *, scored_from: int = 1) -> TokenTree:
    """The tokens from ``scored_from`` on are scored; no branches."""
    none = np.empty(0, np.int32)
    spans = np.array([[scored_from, len(tokens)]], np.int32)
    return TokenTree(np.array(tokens, np.int32), spans, none, none, np.zeros(1, np.int64), none)


def sums(question: list[list[int]]) -> Question[list[float]]:
    """Of each sequence, the sum of its tokens but the first."""
    return Question([tree(tokens) for tokens in question], lambda scores: [float(s.logprob.sum()) for s in scores])


def test_threads_get_what_they_would_get_alone(scorer: Scorer) -> None:
    rng = np.random.default_rng(0)
    questions = [
        [rng.integers(1, 60, rng.integers(2, 40)).tolist() for _ in range(rng.integers(1, 4))] for _ in range(40)
    ]
    alone = [scorer._ask(sums(question)) for question in questions]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda question: scorer._ask(sums(question)), questions))

    async def tasks() -> list[list[float]]:
        return await asyncio.gather(*(scorer._aask(sums(question)) for question in questions))

    for got in (together, asyncio.run(tasks())):
        for one, other in zip(got, alone, strict=True):
            assert one == pytest.approx(other, abs=1e-4)


def test_a_closed_scorer_refuses_by_name_and_keeps_nothing(toy: Toy) -> None:
    with load(toy.model, device="cpu") as scorer:
        assert scorer._ask(sums([[1, 2, 3]]))[0] < 0
        model = weakref.ref(scorer.model)
    assert model() is None
    message = re.escape(f"the scorer of {toy.model} is closed; load the model again")
    with pytest.raises(psykern.PsykernError, match=message):
        scorer._ask(sums([[1, 2, 3]]))
    with pytest.raises(psykern.PsykernError, match=message):
        asyncio.run(scorer._aask(sums([[1, 2, 3]])))
    with pytest.raises(psykern.PsykernError, match=message):
        _ = scorer.hash
    scorer.close()  # once more does nothing
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = scorer.nothing  # type: ignore[attr-defined]


def test_a_model_in_memory_is_refused_with_what_to_do(toy: Toy) -> None:
    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=16)
    with pytest.raises(TypeError, match="got LlamaForCausalLM; save the model and its tokenizer to a folder"):
        load(LlamaForCausalLM(config))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model: expected a folder or a hub id, got NoneType"):
        load(None)  # type: ignore[arg-type]
