"""A model that is loaded once: what it refuses, several runs with it, and another engine in its place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.toy import Toy, make_toy_data

import psykern
from psykern import Settings
from psykern.core.clock import Clock
from psykern.core.types import TargetScores
from psykern.data.dataset import Dataset
from psykern.runs.job import Options
from psykern.runs.run import score_with
from psykern.scoring.scorer import Scorer, load
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
