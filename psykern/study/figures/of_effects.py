"""Figures of effects: Cohen's d by kind of post-training, by generation and by domain."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from matplotlib.axes import Axes

from psykern.study.figures.style import WIDTH, Drawing, bars, kind_order, legend, look, mark, name_rows, shorten, single
from psykern.study.results import Comparison, Effect

_GROUP_TITLES = {"kind": "kind of post-training", "generation": "model generation", "domain": "domain"}


def effects_by(comparison: Comparison, group_by: str) -> Iterator[Drawing]:
    """Mean d per group, a dot per pair; groups of a kind side by side."""
    effects = [e for e in comparison.effects if e.group_by == group_by and not math.isnan(e.d.value)]
    if not effects:
        return
    groups = list(dict.fromkeys(effect.group for effect in effects))
    if group_by == "domain":
        means = {g: [e.d.value for e in effects if e.group == g] for g in groups}
        groups.sort(key=lambda group: sum(means[group]) / len(means[group]))
    kinds = kind_order([effect.kind for effect in effects])
    of_group = {g: [k for k in kinds if any((e.group, e.kind) == (g, k) for e in effects)] for g in groups}
    height = sum(0.22 + 0.2 * len(of_group[group]) for group in groups)
    figure, axes = single(1.2 + max(height, 0.8), WIDTH * 0.9)
    for effect in effects:
        beside = of_group[effect.group]
        shift = (beside.index(effect.kind) - (len(beside) - 1) / 2) * 0.8 / max(map(len, of_group.values()))
        _effect_row(axes, groups.index(effect.group) + shift, effect)
    axes.axvline(0, color="black", linewidth=1)
    name_rows(axes, groups, "Cohen's d  (above 0: base fits better)")
    if any(not math.isnan(effect.published) for effect in effects):
        legend(figure, kinds, [mark("published", "|", markersize=16, markeredgewidth=2)])
    else:
        legend(figure, kinds)
    yield Drawing(
        f"d_by_{group_by}",
        f"Effect of post-training by {_GROUP_TITLES[group_by]}",
        "Cohen's d of the NLL, post-trained against base, computed per study and averaged as in the published study: "
        "large marks are means over pairs with 95 % intervals over participants, small dots single pairs.",
        figure,
    )


def heatmap(comparison: Comparison) -> Iterator[Drawing]:
    """d of every pair in every domain, as the paper's figure: pairs and domains in order of their means."""
    domains = sorted({comparison.domains.get(row.study, "") for result in comparison.pairs for row in result.studies})
    domains = [domain for domain in domains if domain]
    if len(comparison.pairs) < 2 or len(domains) < 2:
        return
    cells = np.full((len(comparison.pairs), len(domains)), np.nan)
    for i, result in enumerate(comparison.pairs):
        for j, domain in enumerate(domains):
            values = [row.d.value for row in result.studies if comparison.domains.get(row.study) == domain]
            values = [value for value in values if not math.isnan(value)]
            if values:
                cells[i, j] = sum(values) / len(values)
    means = np.ma.masked_invalid(cells)
    rows, columns = np.argsort(means.mean(axis=1)), np.argsort(means.mean(axis=0))
    shown = np.vstack([cells[rows][:, columns], np.asarray(means.mean(axis=0).filled(np.nan))[columns]])
    labels = [*(shorten(comparison.pairs[i].pair.post.label, 30) for i in rows), "mean over pairs"]
    figure, axes = single(1.9 + 0.27 * len(labels))
    largest = float(np.nanpercentile(np.abs(cells), 95)) or 1.0
    axes.imshow(shown, aspect="auto", cmap="RdBu_r", vmin=-largest, vmax=largest)
    for (i, j), value in np.ndenumerate(shown):
        if not math.isnan(value):
            dark = abs(value) > 0.65 * largest
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8, color="white" if dark else "black")
    axes.axhline(len(labels) - 1.5, color="black", linewidth=1.2)
    axes.set_xticks(range(len(domains)), [domains[j] for j in columns], rotation=35, ha="right")
    axes.set_yticks(range(len(labels)), labels)
    axes.grid(visible=False)
    yield Drawing(
        "d_pairs_by_domain",
        "Effect of post-training by pair and domain",
        "Cohen's d of each pair in each domain, averaged over the domain's studies. Red: the base model fits better.",
        figure,
    )


def _effect_row(axes: Axes, place: float, effect: Effect) -> None:
    color, marker, _ = look(effect.kind)
    if effect.pairs > 1:
        axes.plot(
            effect.values, [place] * effect.pairs, linestyle="none", marker="o", markersize=3.5, color=color, alpha=0.5
        )
    bars(axes, place, effect.d, color, horizontal=True)
    axes.plot(effect.d.value, place, marker=marker, markersize=9, color=color, zorder=3)
    if not math.isnan(effect.published):
        axes.plot(effect.published, place, marker="|", markersize=18, markeredgewidth=2, color="black", zorder=4)
