"""The functions of metrics.py that a comparison uses: against SciPy, NumPy, plain loops and numbers by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from psykern.runs.summary import option_hits
from psykern.study import metrics
from psykern.study.bootstrap import bootstrap_sums

scipy_stats = pytest.importorskip("scipy.stats")
scipy_optimize = pytest.importorskip("scipy.optimize")

Lists = tuple[np.ndarray, np.ndarray, np.ndarray]  # log_softmax, offsets, option_index


def csr(lists: Sequence[Sequence[float]], chosen: Sequence[int]) -> Lists:
    """Probabilities by response as log-softmax, and which option each response is."""
    values = np.log([p for of in lists for p in of])
    return values, np.cumsum([0, *map(len, lists)]), np.array(chosen)


def random_lists(seed: int, count: int = 300) -> Lists:
    """Responses of two to five options; the chosen one is drawn from the square root of the model's probabilities."""
    rng = np.random.default_rng(seed)
    lists = [rng.dirichlet(np.full(rng.integers(2, 6), 0.7)) + 1e-6 for _ in range(count)]
    lists = [p / p.sum() for p in lists]
    flat = [np.sqrt(p) / np.sqrt(p).sum() for p in lists]
    return csr([p.tolist() for p in lists], [int(rng.choice(len(p), p=p)) for p in flat])


def loop(lists: Lists) -> list[tuple[np.ndarray, int]]:
    """Each response's probabilities and choice."""
    values, offsets, index = lists
    return [(np.exp(values[a:b]), int(i)) for a, b, i in zip(offsets[:-1], offsets[1:], index, strict=True)]


BY_HAND = csr([[0.5, 0.25, 0.25], [0.9, 0.1]], [0, 1])


def test_options_by_hand() -> None:
    assert metrics.option_nll(*BY_HAND) == pytest.approx([math.log(2), math.log(10)])
    assert metrics.option_confidence(*BY_HAND[:2]) == pytest.approx([0.5, 0.9])
    assert metrics.brier(*BY_HAND) == pytest.approx([0.25 + 2 / 16, 2 * 0.81])
    assert metrics.option_entropy(*BY_HAND[:2])[0] == pytest.approx(1.5 * math.log(2))


def test_options_against_loops_and_scipy() -> None:
    lists = random_lists(1)
    known = loop(lists)
    assert metrics.option_nll(*lists) == pytest.approx([-math.log(p[i]) for p, i in known])
    assert metrics.option_confidence(*lists[:2]) == pytest.approx([p.max() for p, _ in known])
    assert metrics.option_entropy(*lists[:2]) == pytest.approx([scipy_stats.entropy(p) for p, _ in known])
    assert metrics.brier(*lists) == pytest.approx([((p - np.eye(len(p))[i]) ** 2).sum() for p, i in known])


def test_no_responses() -> None:
    empty = np.empty(0), np.zeros(1, np.int64), np.empty(0, np.int64)
    for values in (metrics.option_nll(*empty), metrics.brier(*empty), metrics.option_entropy(*empty[:2])):
        assert values.shape == (0,)
    assert metrics.rescaled_option_nll(*empty, 1.0).shape == (0,)
    assert metrics.fit_temperature(*empty, np.empty(0)) == 1.0
    assert math.isnan(metrics.calibration(np.empty(0), np.empty(0)).error)
    assert bootstrap_sums(np.empty((0, 2)), 5, np.random.default_rng(0)).tolist() == [[0.0, 0.0]] * 5


def test_bits_and_pseudo_r2_by_hand() -> None:
    assert metrics.bits(3 * math.log(2)) == pytest.approx(3)
    assert metrics.pseudo_r2(math.log(2), math.log(4)) == pytest.approx(0.5)
    assert metrics.pseudo_r2(math.log(4), math.log(4)) == 0
    assert metrics.pseudo_r2(2 * math.log(4), math.log(4)) == -1
    assert math.isnan(metrics.pseudo_r2(0.0, 0.0))  # one option only


def test_segments_with_empty_ones_and_nulls() -> None:
    values, offsets = np.array([1.0, 3.0, np.nan, np.nan, 5.0]), np.array([0, 2, 2, 3, 5, 5])
    assert metrics.segment_sums(np.array([1, 2, 3, 4, 5]), offsets).tolist() == [3, 0, 3, 9, 0]
    np.testing.assert_array_equal(metrics.segment_means(values, offsets), [2, np.nan, np.nan, 5, np.nan])
    assert metrics.study_aggregate(values, offsets) == 3.5
    assert metrics.segment_sums(np.empty(0), np.array([0])).tolist() == []


def test_calibration_by_hand_and_against_a_loop() -> None:
    confidence, hits = np.array([0.05, 0.55, 0.58, 1.0]), np.array([0, 1, 0, 1])
    found = metrics.calibration(confidence, hits)
    assert found.counts.tolist() == [1, 0, 0, 0, 0, 2, 0, 0, 0, 1]
    assert found.error == pytest.approx((0.05 + abs(1 - 0.55 - 0.58) + 0) / 4)
    assert found.overconfidence == pytest.approx((0.05 + 0.55 + 0.58 + 1 - 2) / 4)

    lists = random_lists(2, 1000)
    confidence, hits = metrics.option_confidence(*lists[:2]), option_hits(*lists)
    bins = np.minimum(np.digitize(confidence, np.linspace(0, 1, 11)) - 1, 9)
    expected = sum(abs(hits[bins == b].mean() - confidence[bins == b].mean()) * (bins == b).sum() for b in set(bins))
    assert metrics.calibration(confidence, hits).error == pytest.approx(expected / 1000)
    halves = metrics.calibration(confidence[:400], hits[:400]) + metrics.calibration(confidence[400:], hits[400:])
    assert halves.error == pytest.approx(expected / 1000)


@pytest.mark.parametrize("seed", range(3))
def test_temperature_against_scipy(seed: int) -> None:
    lists = random_lists(seed)
    weights = np.random.default_rng(seed).random(len(lists[2]))

    def objective(log_t: float) -> float:
        total = 0.0
        for weight, (p, i) in zip(weights, loop(lists), strict=True):
            scaled = np.log(p) / math.exp(log_t)
            total += weight * (np.logaddexp.reduce(scaled) - scaled[i])
        return total

    best = scipy_optimize.minimize_scalar(objective, bounds=(-3, 3), method="bounded", options={"xatol": 1e-9})
    found = metrics.fit_temperature(*lists, weights)
    assert found == pytest.approx(math.exp(best.x), rel=1e-5)
    assert found > 1.3  # responses were drawn at temperature 2
    assert weights @ metrics.rescaled_option_nll(*lists, found) == pytest.approx(best.fun, rel=1e-9)
    assert metrics.rescaled_option_nll(*lists, 1.0) == pytest.approx(metrics.option_nll(*lists))


def test_temperature_in_chunks_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    lists, weights = random_lists(4), np.ones(300)
    whole = metrics.fit_temperature(*lists, weights)
    monkeypatch.setattr(metrics, "_FIT_CHUNK", 7)
    assert metrics.fit_temperature(*lists, weights) == pytest.approx(whole, rel=1e-9)


def test_temperature_without_an_optimum_stays_in_its_bounds() -> None:
    right, wrong = csr([[0.6, 0.4]] * 5, [0] * 5), csr([[0.6, 0.4]] * 5, [1] * 5)
    assert 0.01 <= metrics.fit_temperature(*right, np.ones(5)) < 0.05
    assert 50 < metrics.fit_temperature(*wrong, np.ones(5)) <= 100
    even = csr([[0.5, 0.5]] * 5, [0, 1, 1, 1, 1])
    assert metrics.fit_temperature(*even, np.ones(5)) == 1.0


def test_cohens_d_by_hand_and_from_sums() -> None:
    base, post = np.array([1.0, 2.0, 3.0, np.nan]), np.array([2.0, 4.0, 6.0])
    assert metrics.cohens_d(base, post) == pytest.approx(2 / math.sqrt((1 + 4) / 2))  # sds 1 and 2, n - 1
    rng = np.random.default_rng(0)
    base, post = rng.normal(2, 1, 50), rng.normal(2.3, 2, 50)
    sums = [50, base.sum(), (base**2).sum(), post.sum(), (post**2).sum()]
    assert metrics.cohens_d_of_sums(*map(np.array, sums)) == pytest.approx(metrics.cohens_d(base, post))
    assert math.isnan(metrics.cohens_d(np.ones(5), np.full(5, 2.0)))
    assert math.isnan(metrics.cohens_d(np.ones(1), np.ones(5)))
    assert np.isnan(metrics.cohens_d_of_sums(*map(np.array, [[1, 0], [1, 0], [1, 0], [2, 0], [4, 0]]))).all()


@pytest.mark.parametrize("above", [0, 1, 7, 15, 28, 30])
def test_sign_test_against_scipy(above: int) -> None:
    differences = np.array([0.5] * above + [-2.0] * (30 - above) + [0.0, np.nan])
    assert metrics.sign_test(differences) == pytest.approx(scipy_stats.binomtest(above, 30).pvalue)
    assert metrics.base_wins(differences) == pytest.approx(above / 31)  # a tie is no win


def test_sign_test_of_nothing() -> None:
    assert math.isnan(metrics.sign_test(np.zeros(3)))
    assert math.isnan(metrics.base_wins(np.full(3, np.nan)))
