"""Effects of post-training: the mean of Cohen's d over the pairs of one kind, with the published number beside it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from psykern.study import metrics
from psykern.study.bootstrap import ends
from psykern.study.models import PUBLISHED
from psykern.study.results import Effect, Interval, PairResult


def effects_of(pairs: Sequence[PairResult], domains: Mapping[str, str]) -> Iterable[Effect]:
    """Mean d by kind; by generation and kind; by domain and kind."""
    for kind in sorted({result.pair.kind for result in pairs}):
        of_kind = [result for result in pairs if result.pair.kind == kind]
        yield _effect("kind", kind, kind, of_kind, None)
        for generation in dict.fromkeys(result.pair.post.model.generation for result in of_kind):
            of_both = [result for result in of_kind if result.pair.post.model.generation == generation]
            yield _effect("generation", generation, kind, of_both, None)
        for domain in sorted({domains.get(row.study, "") for result in of_kind for row in result.studies} - {""}):
            chosen = {study for study, of in domains.items() if of == domain}
            yield _effect("domain", domain, kind, of_kind, chosen)


def _effect(group_by: str, group: str, kind: str, pairs: Sequence[PairResult], studies: set[str] | None) -> Effect:
    values, draws = [], []
    for result in pairs:
        kept = [i for i, row in enumerate(result.studies) if studies is None or row.study in studies]
        points = np.array([result.studies[i].d.value for i in kept])
        drawn = np.where(np.isnan(result.d_draws[kept]), points[:, None], result.d_draws[kept])
        known = ~np.isnan(points)
        if known.any():
            values.append(float(points[known].mean()))
            draws.append(drawn[known].mean(axis=0))
    published = any(result.pair.post.model.published for result in pairs)
    reference = [p.d for p in PUBLISHED if (p.group_by, p.group.lower()) == (group_by, group.lower()) and published]
    spread = bool(draws) and float(np.ptp(np.mean(draws, axis=0))) > 0
    low, high = ends(np.mean(draws, axis=0)) if spread else (math.nan, math.nan)
    return Effect(
        group_by=group_by,
        group=group,
        kind=kind,
        pairs=len(values),
        d=Interval(metrics.mean(np.array(values)), low, high),
        values=tuple(values),
        published=reference[0] if reference else math.nan,
    )
