"""Two runs set against each other, over the responses that both scored.

A statistic is a function of sums over responses (``_SUMS``), so a bootstrap draw of participants is a draw of sums.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from psykern.study import metrics
from psykern.study.bootstrap import aggregate, draw, ends, inflate
from psykern.study.finished import Responses, StudyResponses, by_study
from psykern.study.pairing import Pair
from psykern.study.results import Interval, PairResult, PairStudy

# Columns of a participant's sums in a pair; the last eight are over responses with options under both models.
_SUMS = ("n", "base", "base2", "post", "post2", "hits", "entropy", "m", "option", "rescaled")


def compare_pair(
    pair: Pair, base: Responses, post: Responses, temperatures: tuple[float, float], draws: int
) -> PairResult:
    """What ``pair`` comes to over its responses, which :func:`~psykern.study.pairing.check_rows` found to be the same
    ones. ``temperatures`` are the two models' best."""
    studies, all_draws = [], []
    for one, two in zip(by_study(base), by_study(post), strict=True):
        row, drawn = _pair_study(one, two, temperatures, draws)
        studies.append(row)
        all_draws.append(drawn)
    differences = np.array([row.difference.value for row in studies])
    return PairResult(
        pair=pair,
        studies=tuple(studies),
        aggregate=_mean_study(studies, all_draws),
        studies_base_wins=metrics.base_wins(differences),
        sign_test=metrics.sign_test(differences),
        d_draws=np.array([drawn["d"] for drawn in all_draws]).reshape(len(studies), draws),
    )


def _mean_study(studies: Sequence[PairStudy], draws: Sequence[dict[str, np.ndarray]]) -> PairStudy:
    """Unweighted means over the studies that have the value; counts are summed, participants are counted alike."""
    means = {
        name: aggregate([getattr(row, name).value for row in studies], [drawn[name] for drawn in draws])
        for name in _STATISTICS
    }
    return PairStudy(
        study="mean over studies",
        participants=sum(row.participants for row in studies),
        responses=sum(row.responses for row in studies),
        base_nll=metrics.mean(np.array([row.base_nll for row in studies])),
        post_nll=metrics.mean(np.array([row.post_nll for row in studies])),
        participants_base_wins=_weighted(
            [row.participants_base_wins for row in studies], [row.participants for row in studies]
        ),
        **means,
    )


def _pair_study(
    base: StudyResponses, post: StudyResponses, temperatures: tuple[float, float], draws: int
) -> tuple[PairStudy, dict[str, np.ndarray]]:
    sums, centre = _pair_sums(base, post, temperatures)
    totals = sums.sum(axis=0)
    point = _statistics(totals)
    drawn = _statistics(draw(sums, base.name, draws))
    estimates, widened = {}, {}
    for name in _STATISTICS:
        counted = sums[:, _SUMS.index("m" if name in _OF_OPTIONS else "n")] > 0
        widened[name] = inflate(float(point[name]), drawn[name], int(counted.sum()))
        estimates[name] = Interval(float(point[name]), *ends(widened[name]))
    counts = sums[:, 0]
    per_participant = metrics.ratio(sums[:, 3] - sums[:, 1], counts)
    row = PairStudy(
        study=base.name,
        participants=int((counts > 0).sum()),
        responses=int(counts.sum()),
        base_nll=centre + float(metrics.ratio(totals[1], totals[0])),
        post_nll=centre + float(metrics.ratio(totals[3], totals[0])),
        participants_base_wins=metrics.base_wins(per_participant),
        **estimates,
    )
    return row, widened


def _pair_sums(
    base: StudyResponses, post: StudyResponses, temperatures: tuple[float, float]
) -> tuple[np.ndarray, float]:
    """[P, K] sums over each participant's responses, columns as in _SUMS, and what was taken off every NLL first."""
    both = ~np.isnan(base.nll) & ~np.isnan(post.nll)
    centre = metrics.mean(base.nll[both])
    one, two = (np.where(both, study.nll - centre, 0.0) for study in (base, post))
    known = base.known & post.known
    option, rescaled = np.zeros(len(both)), np.zeros(len(both))
    if known.any():
        for study, temperature, sign in ((base, temperatures[0], -1), (post, temperatures[1], 1)):
            shared = known[study.known]
            option[known] += sign * metrics.option_nll(*study.options)[shared]
            rescaled[known] += sign * metrics.rescaled_option_nll(*study.options, temperature)[shared]
    change = [np.where(both, getattr(post, name) - getattr(base, name), 0.0) for name in ("hits", "entropy")]
    columns = [both, one, one * one, two, two * two, *change, known, option, rescaled]
    return np.stack([metrics.segment_sums(column, base.offsets) for column in columns], axis=1), centre


_STATISTICS = (
    "d",
    "difference",
    "option_difference",
    "rescaled_difference",
    "accuracy_difference",
    "entropy_difference",
)
_OF_OPTIONS = ("option_difference", "rescaled_difference")


def _statistics(sums: np.ndarray) -> dict[str, np.ndarray]:
    """The statistics of sums [..., K]."""
    n, base, base2, post, post2, hits, entropy, m, option, rescaled = np.moveaxis(sums, -1, 0)
    return {
        "d": metrics.cohens_d_of_sums(n, base, base2, post, post2),
        "difference": metrics.ratio(post - base, n),
        "option_difference": metrics.ratio(option, m),
        "rescaled_difference": metrics.ratio(rescaled, m),
        "accuracy_difference": metrics.ratio(hits, n),
        "entropy_difference": metrics.ratio(entropy, n),
    }


def _weighted(values: Sequence[float], weights: Sequence[int]) -> float:
    known = [(value, weight) for value, weight in zip(values, weights, strict=True) if not math.isnan(value)]
    total = sum(weight for _, weight in known)
    return sum(value * weight for value, weight in known) / total if total else math.nan
