"""bootstrap.py: draws by hand, intervals beside the normal ones, and their coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest

from psykern.study import bootstrap
from psykern.study.bootstrap import bootstrap_sums, ends, inflate

scipy_stats = pytest.importorskip("scipy.stats")


def test_bootstrap_draws_clusters_with_replacement(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = np.stack([np.ones(4), 10.0 ** np.arange(4)], axis=1)
    monkeypatch.setattr(bootstrap, "_DRAW_CELLS", 40)  # several chunks
    drawn = bootstrap_sums(columns, 4000, np.random.default_rng(0))
    assert (drawn[:, 0] == 4).all()
    times = np.stack([drawn[:, 1] // 10**i % 10 for i in range(4)], axis=1)  # how often each was drawn
    assert (times.sum(axis=1) == 4).all()
    np.testing.assert_allclose(times.mean(axis=0), 1, atol=0.06)
    np.testing.assert_allclose(times.var(axis=0), 0.75, atol=0.08)  # Binomial(4, 1/4)


def test_interval_of_a_mean_is_near_the_normal_one() -> None:
    values = np.random.default_rng(1).normal(3, 2, 400)
    drawn = bootstrap_sums(np.stack([values, np.ones(400)], axis=1), 4000, np.random.default_rng(2))
    low, high = ends(inflate(values.mean(), drawn[:, 0] / drawn[:, 1], 400))
    expected = scipy_stats.norm.interval(0.95, values.mean(), scipy_stats.sem(values))
    assert (low, high) == pytest.approx(expected, abs=0.02)


def test_interval_of_one_cluster_or_nothing_is_nan() -> None:
    assert np.isnan(ends(inflate(1.0, np.ones(5), 1))).all()
    assert np.isnan(ends(np.empty(0))).all()
    assert inflate(1.0, np.array([3.0]), 2)[0] == pytest.approx(1 + 2 * math.sqrt(2))


def test_null_intervals_cover_zero() -> None:
    """1,000 comparisons of equal models; responses of a participant share an offset, and participants differ in
    length, so an interval that took responses for independent would cover far less."""
    rng = np.random.default_rng(20)
    simulations, studies, participants, draws = 1000, 5, 30, 400
    covered = naive = 0
    for _ in range(simulations):
        means, widened = [], []
        pooled = []
        for _ in range(studies):
            counts = rng.integers(5, 40, participants).astype(float)
            offsets = rng.standard_t(5, participants)
            sums = counts * offsets + np.sqrt(counts) * rng.standard_normal(participants)
            mean = sums.sum() / counts.sum()
            drawn = bootstrap_sums(np.stack([sums, counts], axis=1), draws, rng)
            means.append(mean)
            widened.append(inflate(mean, drawn[:, 0] / drawn[:, 1], participants))
            pooled.append((1 + 5 / 3) / counts.sum())  # variance of a mean of independent responses
        low, high = ends(np.mean(widened, axis=0))
        covered += low <= 0 <= high
        naive += abs(np.mean(means)) <= 1.96 * math.sqrt(sum(pooled)) / studies
    assert 920 <= covered <= 980
    assert naive < 700
