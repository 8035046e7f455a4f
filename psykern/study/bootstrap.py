"""Intervals by the cluster bootstrap: participants of a study are drawn with replacement, studies stay.

    draw ─► sums of each draw ─ any statistic of them ─ inflate ─► draws of the statistic ─ ends, aggregate ─► Interval

A study's draws depend on its name alone, so that runs and pairs over the same data share them: intervals of means over
pairs keep what the pairs have in common.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import numpy as np

from psykern.study.results import Interval

_DRAW_CELLS = 2**22  # draws × clusters at a time


def bootstrap_sums(columns: np.ndarray, draws: int, rng: np.random.Generator) -> np.ndarray:
    """Sums over clusters drawn with replacement: [draws, K] float64.

    ``columns`` [C, K] float64 holds each cluster's (participant's) sums: of whatever the statistic is made of. Each
    draw takes C clusters; a ratio of a draw's sums is the statistic on it (the cluster bootstrap).
    """
    num_clusters, width = columns.shape
    sums = np.zeros((draws, width))
    if num_clusters == 0:
        return sums
    step = max(1, _DRAW_CELLS // num_clusters)
    for start in range(0, draws, step):
        size = min(step, draws - start)
        drawn = rng.integers(0, num_clusters, (size, num_clusters))
        drawn += np.arange(size)[:, None] * num_clusters
        times = np.bincount(drawn.ravel(), minlength=size * num_clusters).reshape(size, num_clusters)
        sums[start : start + size] = times.astype(np.float64) @ columns
    return sums


def inflate(point: float, draws: np.ndarray, num_clusters: int) -> np.ndarray:
    """Draws about ``point`` times √(C / (C − 1)): the bootstrap's variance is too small by that factor squared.

    NaN with fewer than two clusters, which say nothing about the spread between them.
    """
    if num_clusters < 2:
        return np.full_like(draws, np.nan)
    return point + (draws - point) * math.sqrt(num_clusters / (num_clusters - 1))


def ends(draws: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """The quantiles (1 − level) / 2 and (1 + level) / 2 of bootstrap draws [B]; NaN where a draw is."""
    if len(draws) == 0 or np.isnan(draws).any():
        return math.nan, math.nan
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def draw(sums: np.ndarray, study: str, draws: int) -> np.ndarray:
    """Bootstrap sums of one study's participants, the same draws whatever the run."""
    return bootstrap_sums(sums, draws, np.random.default_rng(zlib.crc32(study.encode())))


def aggregate(points: Sequence[float], draws: Sequence[np.ndarray]) -> Interval:
    """Mean over the studies that have a value, with its interval.

    A study of one participant has a value but no spread: it enters each draw with its value.
    """
    kept = [(point, drawn) for point, drawn in zip(points, draws, strict=True) if not math.isnan(point)]
    if not kept:
        return Interval()
    filled = [np.where(np.isnan(drawn), point, drawn) for point, drawn in kept]
    value = float(np.mean([point for point, _ in kept]))
    if all(np.isnan(drawn).all() for _, drawn in kept):
        return Interval(value)
    return Interval(value, *ends(np.mean(filled, axis=0)))
