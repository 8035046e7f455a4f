"""The report's figures, each a matplotlib figure made from a :class:`~psykern.study.results.Comparison`."""

from __future__ import annotations

from collections.abc import Iterator

import matplotlib

from psykern.study.figures import of_effects, of_pairs, of_runs
from psykern.study.figures.style import STYLE, Drawing
from psykern.study.results import Comparison


def draw(comparison: Comparison) -> Iterator[Drawing]:
    """Every figure that the comparison has data for, in the page's order."""
    with matplotlib.rc_context(STYLE):
        yield from of_runs.nll_over_sizes(comparison)
        for group_by in ("kind", "generation", "domain"):
            yield from of_effects.effects_by(comparison, group_by)
        yield from of_effects.heatmap(comparison)
        yield from of_pairs.forests(comparison)
        yield from of_pairs.scatter(comparison)
        yield from of_runs.accuracy_over_sizes(comparison)
        yield from of_runs.calibration(comparison)
        yield from of_pairs.determinism(comparison)
        yield from of_pairs.conditions(comparison)
