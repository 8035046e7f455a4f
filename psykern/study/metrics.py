"""How well a model foretells responses, as functions on arrays.

With p(r) the model's probability of response r (its tokens' product) and q(o | r) the softmax over r's options:

    NLL          mean over r of −log p(r)                               nats
    accuracy     share of r whose tokens are all the vocabulary's argmax
    option NLL   mean over r of −log q(r | r), over r that is one of its options
    uniform NLL  mean over the same r of log(number of options): the option NLL of guessing evenly

The aggregate over studies is their unweighted mean, as in the published study. What is NaN is left out of every mean,
and the mean of nothing is NaN. :mod:`psykern.runs.summary` has the same means for a run's summary.

Arrays of options are CSR: ``log_softmax`` [offsets[-1]] holds log q of every response's options, ``offsets`` [R+1] int
where each response's begin (at least one each), ``option_index`` [R] int the option that is the response.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from psykern.core import csr


def nll(logprob: np.ndarray) -> float:
    """Mean of −logprob in nats. ``logprob`` [R] float; NaN: not scored."""
    return mean(-np.asarray(logprob, dtype=np.float64))


def accuracy(is_argmax: np.ndarray) -> float:
    """Mean of ``is_argmax`` [R], bool or float; NaN: not scored."""
    return mean(np.asarray(is_argmax, dtype=np.float64))


def bits(nats: float) -> float:
    """Nats in bits: nats / log 2."""
    return nats / math.log(2)


def segment_sums(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Σ over each segment ``values[offsets[i]:offsets[i + 1]]``, 0 where it is empty: [len(offsets) − 1] float64."""
    return csr.reduce(np.add, values, offsets, np.float64)


def segment_means(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Mean of each segment of ``values`` over what is not NaN; NaN where nothing is. Studies, or participants."""
    known = ~np.isnan(values)
    counts = segment_sums(known, offsets)
    means = np.full(len(counts), np.nan)
    np.divide(segment_sums(np.where(known, values, 0.0), offsets), counts, out=means, where=counts > 0)
    return means


def study_aggregate(values: np.ndarray, study_offsets: np.ndarray) -> float:
    """The published study's aggregate: (1/S) Σ_s (1/n_s) Σ_{r in s} x_r, studies weighing the same.

    ``values`` [R] float, one per response, NaN: not scored; ``study_offsets`` [S+1] int. Studies without any value are
    left out.
    """
    return mean(segment_means(values, study_offsets))


def option_nll(log_softmax: np.ndarray, offsets: np.ndarray, option_index: np.ndarray) -> np.ndarray:
    """−log q(r | r) in nats: [R]. Its mean is the option NLL."""
    return -log_softmax[offsets[:-1] + option_index]


def option_confidence(log_softmax: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """max_o q(o | r), the probability of the likeliest option: [R]."""
    return np.exp(csr.reduce(np.maximum, log_softmax, offsets))


def option_entropy(log_softmax: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """−Σ_o q(o | r) log q(o | r) in nats: [R]. 0: the model is certain; log(number of options): it guesses evenly."""
    return csr.reduce(np.add, -np.exp(log_softmax) * log_softmax, offsets)


def brier(log_softmax: np.ndarray, offsets: np.ndarray, option_index: np.ndarray) -> np.ndarray:
    """Σ_o (q(o | r) − 1[o = r])², from 0 to 2: [R]. Its mean is the Brier score (Brier 1950, several classes)."""
    squares = csr.reduce(np.add, np.exp(2 * log_softmax), offsets)  # Σ q² − 2 q(r) + 1
    return np.asarray(squares - 2 * np.exp(log_softmax[offsets[:-1] + option_index]) + 1)


def pseudo_r2(model_nll: float, uniform_nll: float) -> float:
    """McFadden's pseudo-R² against guessing evenly among the options: 1 − log L(model) / log L(uniform).

    Both are means (or sums) over the same responses, in nats: the option NLL and that of log(number of options).
    """
    return 1 - model_nll / uniform_nll if uniform_nll > 0 else math.nan


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """Responses by the probability of their likeliest option, in bins of equal width over [0, 1]."""

    counts: np.ndarray  # [bins] float64
    confidence: np.ndarray  # [bins] float64, sum over the bin's responses
    hits: np.ndarray  # [bins] float64, likewise: how often that option was the response

    def __add__(self, other: Calibration) -> Calibration:
        return Calibration(self.counts + other.counts, self.confidence + other.confidence, self.hits + other.hits)

    @property
    def error(self) -> float:
        """Expected calibration error, Σ_b (n_b / n) |hits_b / n_b − confidence_b / n_b| (Guo et al. 2017)."""
        total = self.counts.sum()
        return float(np.abs(self.hits - self.confidence).sum() / total) if total else math.nan

    @property
    def overconfidence(self) -> float:
        """Mean confidence − share of hits: above 0 the model is surer than it is right."""
        total = self.counts.sum()
        return float((self.confidence - self.hits).sum() / total) if total else math.nan


def calibration(confidence: np.ndarray, hits: np.ndarray, bins: int = 10) -> Calibration:
    """``confidence`` [R] from :func:`option_confidence` and ``hits`` [R] from :func:`option_hits`, in bins."""
    bin_of = np.minimum((confidence * bins).astype(np.int64), bins - 1)
    return Calibration(
        np.bincount(bin_of, minlength=bins).astype(np.float64),
        np.bincount(bin_of, confidence, bins),
        np.bincount(bin_of, hits, bins),
    )


def rescaled_option_nll(
    log_softmax: np.ndarray, offsets: np.ndarray, option_index: np.ndarray, temperature: float
) -> np.ndarray:
    """−log softmax(log q / T)(r) in nats: [R], the option NLL of a model whose options are drawn at temperature T."""
    scaled = log_softmax.astype(np.float64) / temperature
    top = csr.reduce(np.maximum, scaled, offsets)
    total = csr.reduce(np.add, np.exp(scaled - np.repeat(top, np.diff(offsets))), offsets)
    return np.asarray(top + np.log(total) - scaled[offsets[:-1] + option_index])


TEMPERATURES = (0.01, 100.0)  # the fit stays between them; data that every option's rank foretells has no optimum
_FIT_CHUNK = 2**20  # responses at a time, which bounds the fit's temporaries


def fit_temperature(
    log_softmax: np.ndarray, offsets: np.ndarray, option_index: np.ndarray, weights: np.ndarray
) -> float:
    """The temperature T that minimises Σ_r w_r · rescaled option NLL(r, T) (Guo et al. 2017).

    ``weights`` [R], not negative. The sum is convex in β = 1/T, with derivative Σ w (E_β[log q] − log q(r)) and second
    derivative Σ w Var_β[log q], so Newton's steps inside a shrinking bracket find it. 1.0 where β has no effect (no
    response, or all options even); never beyond :data:`TEMPERATURES`.
    """
    low, high = 1 / TEMPERATURES[1], 1 / TEMPERATURES[0]
    beta = 1.0
    for _ in range(60):
        slope, curvature = _fit_derivatives(log_softmax, offsets, option_index, weights, beta)
        if slope == 0:  # at an optimum; or so steep or even that no temperature near this one matters
            return 1 / beta
        low, high = (low, beta) if slope > 0 else (beta, high)
        step = beta - slope / curvature if curvature > 0 else math.nan
        if not low < step < high:
            step = math.sqrt(low * high)
        if abs(step - beta) <= 1e-7 * beta:
            return 1 / step
        beta = step
    return 1 / beta


def _fit_derivatives(
    log_softmax: np.ndarray, offsets: np.ndarray, option_index: np.ndarray, weights: np.ndarray, beta: float
) -> tuple[float, float]:
    slope = curvature = 0.0
    for start in range(0, len(option_index), _FIT_CHUNK):
        rows = slice(start, start + _FIT_CHUNK)
        bounds = offsets[start : start + _FIT_CHUNK + 1]
        values = log_softmax[bounds[0] : bounds[-1]].astype(np.float64)
        bounds = bounds - bounds[0]
        counts = np.diff(bounds)
        scaled = values * beta
        weight = np.exp(scaled - np.repeat(csr.reduce(np.maximum, scaled, bounds), counts))
        total = csr.reduce(np.add, weight, bounds)
        weighted = weight * values
        mean = csr.reduce(np.add, weighted, bounds) / total
        square = csr.reduce(np.add, weighted * values, bounds) / total
        slope += float(weights[rows] @ (mean - values[bounds[:-1] + option_index[rows]]))
        curvature += float(weights[rows] @ np.maximum(square - mean * mean, 0.0))
    return slope, curvature


def cohens_d(base: np.ndarray, post: np.ndarray) -> float:
    """d = (mean_post − mean_base) / √((sd_base² + sd_post²) / 2), the published study's effect of post-training.

    ``base``, ``post`` [R] float: one study's NLLs under both models, NaN: not scored. sd has n − 1 in the denominator,
    as the study's scripts have it (pandas). NaN with fewer than two values or without any spread. The study's mean
    effect is the unweighted mean of its studies' d. Above 0: post-training made the fit worse.
    """
    base, post = (values[~np.isnan(values)] for values in (base, post))
    if min(len(base), len(post)) < 2:
        return math.nan
    spread = (base.var(ddof=1) + post.var(ddof=1)) / 2
    return float((post.mean() - base.mean()) / math.sqrt(spread)) if spread > 0 else math.nan


def cohens_d_of_sums(
    count: np.ndarray, base: np.ndarray, base2: np.ndarray, post: np.ndarray, post2: np.ndarray
) -> np.ndarray:
    """:func:`cohens_d` from sums over the same responses: their number, Σ base, Σ base², Σ post, Σ post². Any shape.

    The sums may be of values minus one constant, which loses fewer digits.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        spread = ((base2 - base * base / count) + (post2 - post * post / count)) / (count - 1) / 2
        d = (post - base) / count / np.sqrt(spread)
        return np.where((count > 1) & (spread > 0), d, np.nan)


def sign_test(differences: np.ndarray) -> float:
    """Two-sided exact sign test: the p-value of the number of values above 0 under Binomial(n, 1/2).

    n counts the values that are neither 0 nor NaN; NaN when there is none.
    """
    above, below = int((differences > 0).sum()), int((differences < 0).sum())
    n = above + below
    if n == 0:
        return math.nan
    tail = sum(math.comb(n, k) for k in range(min(above, below) + 1))
    return min(1.0, 2 * tail / 2**n)  # big integers: exact until the division


def base_wins(differences: np.ndarray) -> float:
    """Share of the differences post − base (studies' or participants') above 0, where the base model fits better."""
    known = differences[~np.isnan(differences)]
    return float((known > 0).mean()) if len(known) else math.nan


def ratio(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    """total / count, NaN where count is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.where(np.asarray(count) > 0, total / np.asarray(count), np.nan))


def mean(values: np.ndarray) -> float:
    """Mean over what is not NaN, in float64; NaN where nothing is."""
    values = np.asarray(values, np.float64)
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else math.nan
