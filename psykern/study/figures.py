"""The report's figures, each a matplotlib figure made from a :class:`~psykern.study.compare.Comparison`.

Colours are Okabe and Ito's, which colour-blind readers tell apart, and a kind of post-training has its own marker
and line too, so that a figure survives a black-and-white print. Figures are narrow (column width) and their text
is large for it, because a phone shows them at two thirds of their size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from psykern.study.compare import Comparison, Effect, Estimate, PairResult, PairStudy, RunResult
from psykern.study.models import BASE, PUBLISHED_NLL

WIDTH = 6.2  # inches
STYLE: Any = {  # keys of matplotlib.rcParams
    "font.size": 10.5,
    "font.family": "sans-serif",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.labelsize": 10.5,
    "legend.fontsize": 9.5,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.6,
    "lines.markersize": 6.5,
    "figure.constrained_layout.use": True,
    "svg.hashsalt": "psykern",  # equal figures give equal bytes
    "svg.fonttype": "path",  # the page needs no font
    "savefig.facecolor": "white",
}

# Okabe & Ito (2008), "Color Universal Design"; black and grey are left to reference marks.
_KINDS = {
    BASE: ("#0072B2", "o", "-"),
    "instruction": ("#D55E00", "s", "--"),
    "reasoning": ("#009E73", "^", "-."),
    "vision": ("#CC79A7", "D", ":"),
    "code": ("#E69F00", "v", "--"),
    "math": ("#56B4E9", "P", "-."),
    "human": ("#7F6000", "X", ":"),
    "chat": ("#56B4E9", "v", "--"),
    "persona": ("#E69F00", "P", "-."),
}
_OTHER = ("#666666", "h", ":")
_GREY = "#666666"


@dataclass(frozen=True, slots=True)
class Drawing:
    """A figure with what is written about it."""

    name: str  # of its files
    title: str
    caption: str
    figure: Figure


def draw(comparison: Comparison) -> Iterator[Drawing]:
    """Every figure that the comparison has data for."""
    with matplotlib.rc_context(STYLE):
        for make in _FIGURES:
            yield from make(comparison)


def _look(kind: str) -> tuple[str, str, Any]:
    """Colour, marker and line of a kind of post-training (or of a condition)."""
    return _KINDS.get(kind, _OTHER)


def _kind_order(kinds: Sequence[str]) -> list[str]:
    order = list(_KINDS)
    return sorted(set(kinds), key=lambda kind: (order.index(kind) if kind in order else len(order), kind))


def _legend(figure: Figure, kinds: Sequence[str], extra: Sequence[Line2D] = ()) -> None:
    handles = [
        Line2D([], [], color=color, marker=marker, linestyle=line, label=kind)
        for kind in _kind_order(kinds)
        for color, marker, line in [_look(kind)]
    ]
    figure.legend(handles=[*handles, *extra], loc="outside lower center", ncols=min(4, len(handles) + len(extra)))


def _bars(axes: Axes, x: float, estimate: Estimate, color: str, *, horizontal: bool = False) -> None:
    """The interval of ``estimate`` at ``x``, where it has one."""
    if math.isnan(estimate.low):
        return
    ends = [estimate.low, estimate.high]
    axes.plot(*((ends, [x, x]) if horizontal else ([x, x], ends)), color=color, linewidth=1.4, zorder=2)


def _panels(count: int, height: float = 2.9, columns: int = 2) -> tuple[Figure, list[Axes]]:
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(WIDTH if columns > 1 else WIDTH * 0.85, height * rows + 0.5))
    figure.set_layout_engine("constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    flat = list(axes.flat)
    for unused in flat[count:]:
        unused.remove()
    return figure, flat[:count]


def _plain_runs(comparison: Comparison) -> list[RunResult]:
    return [result for result in comparison.runs if result.named.run.condition == "plain"]


def _over_sizes(
    comparison: Comparison, of: Callable[[RunResult], Estimate], label: str, published: bool
) -> Figure | None:
    """A panel per family, a line per kind of post-training, over billions of weights on a log axis."""
    results = [result for result in _plain_runs(comparison) if result.named.model.size is not None]
    results = [result for result in results if not math.isnan(of(result).value)]
    if not results:
        return None
    families = list(dict.fromkeys(result.named.model.family for result in results))
    figure, panels = _panels(len(families))
    shown = False
    for family, axes in zip(families, panels, strict=True):
        of_family = [result for result in results if result.named.model.family == family]
        for number, (kind, line) in enumerate(_lines(of_family)):
            color, marker, style = _look(kind)
            dodge = 1.04 ** (number % 4)  # models of one size stand beside each other
            sizes = [(result.named.model.size or 0.0) * dodge for result in line]
            values = [of(result) for result in line]
            axes.plot(sizes, [value.value for value in values], color=color, marker=marker, linestyle=style)
            for size, value in zip(sizes, values, strict=True):
                _bars(axes, size, value, color)
        known = [result for result in of_family if published and result.named.model.name in PUBLISHED_NLL]
        if known:
            shown = True
            x = [result.named.model.size or 0.0 for result in known]
            y = [PUBLISHED_NLL[result.named.model.name] for result in known]
            axes.plot(x, y, linestyle="none", marker="o", markersize=11, markerfacecolor="none", color=_GREY)
        _size_axis(axes, [result.named.model.size or 0.0 for result in of_family])
        axes.set_title(family)
    for axes in panels[:: min(2, len(panels))]:
        axes.set_ylabel(label)
    ring = Line2D([], [], linestyle="none", marker="o", markersize=10, markerfacecolor="none", color=_GREY)
    ring.set_label("published")
    _legend(figure, [result.named.model.kind for result in results], [ring] if shown else [])
    return figure


def _lines(results: Sequence[RunResult]) -> list[tuple[str, list[RunResult]]]:
    """A family's models by kind, and by generation too where one kind has several of one size; sizes ascend."""
    by_kind: dict[str, list[RunResult]] = {}
    for result in sorted(results, key=lambda result: result.named.model.size or 0.0):
        by_kind.setdefault(result.named.model.kind, []).append(result)
    lines = []
    for kind in _kind_order(list(by_kind)):
        of_kind = by_kind[kind]
        repeat = len({result.named.model.size for result in of_kind}) < len(of_kind)
        generations = dict.fromkeys(result.named.model.generation if repeat else "" for result in of_kind)
        lines += [(kind, [r for r in of_kind if g in ("", r.named.model.generation)]) for g in generations]
    return lines


def _size_axis(axes: Axes, sizes: Sequence[float]) -> None:
    """A log axis with ticks at round numbers; one size alone would have no range."""
    axes.set_xscale("log")
    low, high = min(sizes) / 1.6, max(sizes) * 1.6
    axes.set_xlim(low, high)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [t for t in (m * 10.0**e for e in decades for m in (1, 3)) if low <= t <= high]
    axes.set_xticks(ticks if len(ticks) > 1 else sorted(set(sizes)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("parameters (billions)")


_INTERVALS = "Bars are 95 % intervals over participants (cluster bootstrap)."


def _nll_over_sizes(comparison: Comparison) -> Iterator[Drawing]:
    figure = _over_sizes(comparison, lambda result: result.nll, "NLL (nats per response) ↓", True)
    if figure is not None:
        yield Drawing(
            "nll_by_size",
            "Fit by model size",
            "Negative log-likelihood of human responses (mean over responses of a study, then over studies) against "
            f"the number of weights; lower is better. A line per kind of post-training. {_INTERVALS}",
            figure,
        )


def _accuracy_over_sizes(comparison: Comparison) -> Iterator[Drawing]:
    figure = _over_sizes(comparison, lambda result: result.accuracy, "accuracy ↑", False)
    if figure is not None:
        yield Drawing(
            "accuracy_by_size",
            "Accuracy by model size",
            "Share of responses whose every token is the likeliest of the whole vocabulary, averaged over studies; "
            f"higher is better. {_INTERVALS}",
            figure,
        )


def _effect_groups(comparison: Comparison, group_by: str) -> Iterator[Drawing]:
    """Mean d per group, a dot per pair; groups of a kind side by side."""
    effects = [e for e in comparison.effects if e.group_by == group_by and not math.isnan(e.d.value)]
    if not effects:
        return
    groups = list(dict.fromkeys(effect.group for effect in effects))
    if group_by == "domain":
        means = {g: [e.d.value for e in effects if e.group == g] for g in groups}
        groups.sort(key=lambda group: sum(means[group]) / len(means[group]))
    kinds = _kind_order([effect.kind for effect in effects])
    of_group = {g: [k for k in kinds if any((e.group, e.kind) == (g, k) for e in effects)] for g in groups}
    height = sum(0.22 + 0.2 * len(of_group[group]) for group in groups)
    figure = Figure(figsize=(WIDTH * 0.9, 1.2 + max(height, 0.8)))
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
    for effect in effects:
        beside = of_group[effect.group]
        shift = (beside.index(effect.kind) - (len(beside) - 1) / 2) * 0.8 / max(map(len, of_group.values()))
        _effect_row(axes, groups.index(effect.group) + shift, effect)
    axes.axvline(0, color="black", linewidth=1)
    axes.set_yticks(range(len(groups)), groups)
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("Cohen's d  (above 0: base fits better)")
    if any(not math.isnan(effect.published) for effect in effects):
        mark = Line2D([], [], linestyle="none", marker="|", markersize=16, markeredgewidth=2, color="black")
        mark.set_label("published")
        _legend(figure, kinds, [mark])
    else:
        _legend(figure, kinds)
    yield Drawing(
        f"d_by_{group_by}",
        f"Effect of post-training by {_GROUP_TITLES[group_by]}",
        "Cohen's d of the NLL, post-trained against base, computed per study and averaged as in the published study: "
        "large marks are means over pairs with 95 % intervals over participants, small dots single pairs.",
        figure,
    )


_GROUP_TITLES = {"kind": "kind of post-training", "generation": "model generation", "domain": "domain"}


def _heatmap(comparison: Comparison) -> Iterator[Drawing]:
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
    labels = [*(_short(comparison.pairs[i].pair.post.label, 30) for i in rows), "mean over pairs"]
    figure = Figure(figsize=(WIDTH, 1.9 + 0.27 * len(labels)))
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
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
    color, marker, _ = _look(effect.kind)
    if effect.pairs > 1:
        axes.plot(
            effect.values, [place] * effect.pairs, linestyle="none", marker="o", markersize=3.5, color=color, alpha=0.5
        )
    _bars(axes, place, effect.d, color, horizontal=True)
    axes.plot(effect.d.value, place, marker=marker, markersize=9, color=color, zorder=3)
    if not math.isnan(effect.published):
        axes.plot(effect.published, place, marker="|", markersize=18, markeredgewidth=2, color="black", zorder=4)


def _forest(comparison: Comparison) -> Iterator[Drawing]:
    """Per pair: every study's d and NLL difference with intervals, and their mean."""
    for number, result in enumerate(comparison.pairs):
        rows = sorted(result.studies, key=lambda row: (math.isnan(row.d.value), row.d.value))
        everything = [*rows, result.aggregate]
        figure = Figure(figsize=(WIDTH, 1.3 + 0.3 * len(everything)))
        figure.set_layout_engine("constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for axes, of, label in (
            (panels[0], lambda row: row.d, "Cohen's d"),
            (panels[1], lambda row: row.difference, "NLL difference (nats)"),
        ):
            _forest_panel(axes, everything, of, result.pair.kind)
            axes.set_xlabel(label)
        panels[0].set_yticks(range(len(everything)), [_short(row.study) for row in everything])
        panels[0].set_ylim(len(everything) - 0.4, -0.6)
        panels[0].get_yticklabels()[-1].set_fontweight("bold")
        yield Drawing(
            "forest" if len(comparison.pairs) == 1 else f"forest_{number + 1:02d}",
            f"Study by study: {result.pair.post.label} against {result.pair.base.label}",
            "Left: Cohen's d of each study; right: the paired difference of the mean NLL. Right of zero the base "
            "model fits better. Lines are 95 % intervals over participants; a study of few participants has an "
            "interval that is too narrow to trust, and one of a single participant none. "
            "The diamond is the unweighted mean over studies.",
            figure,
        )


def _forest_panel(axes: Axes, rows: Sequence[PairStudy], of: Callable[[PairStudy], Estimate], kind: str) -> None:
    color = _look(kind)[0]
    values = [of(row) for row in rows]
    for place, value in enumerate(values[:-1]):
        _bars(axes, place, value, color, horizontal=True)
        axes.plot(value.value, place, marker="o", markersize=5.5, color=color, zorder=3)
    _bars(axes, len(values) - 1, values[-1], "black", horizontal=True)
    axes.plot(values[-1].value, len(values) - 1, marker="D", markersize=7.5, color="black", zorder=3)
    axes.axvline(0, color="black", linewidth=1)
    axes.axhline(len(values) - 1.5, color=_GREY, linewidth=0.8)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.grid(axis="y", visible=False)


def _short(name: str, width: int = 26) -> str:
    return name if len(name) <= width else f"{name[: width - 1]}…"


def _scatter(comparison: Comparison) -> Iterator[Drawing]:
    """Base against post-trained NLL, a point per study, a panel per kind."""
    if not comparison.pairs:
        return
    kinds = _kind_order([result.pair.kind for result in comparison.pairs])
    figure, panels = _panels(len(kinds), height=3.1)
    for kind, axes in zip(kinds, panels, strict=True):
        color, marker, _ = _look(kind)
        rows = [row for result in comparison.pairs if result.pair.kind == kind for row in result.studies]
        rows = [row for row in rows if row.base_nll > 0 and row.post_nll > 0]
        axes.plot(
            [row.base_nll for row in rows],
            [row.post_nll for row in rows],
            linestyle="none",
            marker=marker,
            color=color,
            alpha=0.75,
            markeredgecolor="white",
            markeredgewidth=0.5,
        )
        _square_log(axes, [value for row in rows for value in (row.base_nll, row.post_nll)])
        axes.set_xlabel("base NLL (nats)")
        axes.set_title(kind)
    for axes in panels[:: min(2, len(panels))]:
        axes.set_ylabel("post-trained NLL (nats)")
    yield Drawing(
        "scatter",
        "Base against post-trained, per study",
        "A point per study and pair, both axes logarithmic. Above the diagonal post-training made the fit worse.",
        figure,
    )


def _square_log(axes: Axes, values: Sequence[float]) -> None:
    """Equal log axes with their diagonal."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    if not values:
        return
    low, high = min(values) / 1.3, max(values) * 1.3
    axes.plot([low, high], [low, high], color="black", linewidth=1, zorder=1)
    ticks = [t for t in (m * 10.0**e for e in range(-4, 4) for m in (1, 2, 5)) if low <= t <= high]
    for axis, limit in ((axes.xaxis, axes.set_xlim), (axes.yaxis, axes.set_ylim)):
        limit(low, high)
        axis.set_ticks(ticks)
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.set_aspect("equal")


def _calibration(comparison: Comparison) -> Iterator[Drawing]:
    """Reliability of the likeliest option, a panel per family, a line per model."""
    results = [result for result in _plain_runs(comparison) if result.calibration.counts.sum()]
    if not results:
        return
    families = list(dict.fromkeys(result.named.model.family for result in results))
    figure, panels = _panels(len(families), height=3.1)
    for family, axes in zip(families, panels, strict=True):
        axes.plot([0, 1], [0, 1], color="black", linewidth=1)
        for result in (r for r in results if r.named.model.family == family):
            bins = result.calibration
            kept = bins.counts >= max(10, 0.002 * bins.counts.sum())
            color, marker, line = _look(result.named.model.kind)
            axes.plot(
                bins.confidence[kept] / bins.counts[kept],
                bins.hits[kept] / bins.counts[kept],
                color=color,
                marker=marker,
                linestyle=line,
                markersize=5.5,
                alpha=0.9,
            )
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        axes.set_aspect("equal")
        axes.set_title(family)
        axes.set_xlabel("probability of likeliest option")
    for axes in panels[:: min(2, len(panels))]:
        axes.set_ylabel("share of responses that are it")
    _legend(figure, [result.named.model.kind for result in results])
    yield Drawing(
        "calibration",
        "Calibration",
        "Responses with known options, in ten bins by the probability of the likeliest option, against how often "
        "people chose it. Below the diagonal a model is surer than it is right. Bins of fewer than 10 responses, or "
        "of less than 0.2 %, are left out.",
        figure,
    )


def _determinism(comparison: Comparison) -> Iterator[Drawing]:
    """Per pair: the difference of the option NLL as it is and with both models at their best temperature."""
    pairs = [r for r in comparison.pairs if not math.isnan(r.aggregate.option_difference.value)]
    if not pairs:
        return
    figure = Figure(figsize=(WIDTH, 1.6 + (0.55 if len(pairs) < 8 else 0.36) * len(pairs)))
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
    for place, result in enumerate(pairs):
        color, marker, _ = _look(result.pair.kind)
        for shift, value, filled in (
            (-0.15, result.aggregate.option_difference, True),
            (0.15, result.aggregate.rescaled_difference, False),
        ):
            _bars(axes, place + shift, value, color, horizontal=True)
            face = color if filled else "white"
            axes.plot(
                value.value, place + shift, marker=marker, markersize=8, color=color, markerfacecolor=face, zorder=3
            )
    axes.axvline(0, color="black", linewidth=1)
    axes.set_yticks(range(len(pairs)), [_short(result.pair.post.label, 30) for result in pairs])
    axes.set_ylim(len(pairs) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("difference of option NLL, post-trained − base (nats)")
    handles = [
        Line2D([], [], linestyle="none", marker="o", color="black", label="as it is"),
        Line2D(
            [],
            [],
            linestyle="none",
            marker="o",
            color="black",
            markerfacecolor="white",
            label="each at its best temperature",
        ),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    yield Drawing(
        "determinism",
        "Is it mere overconfidence?",
        "The loss of fit on responses with options, as it is (filled), and after each model got the one temperature "
        "that suits it best (open). What remains right of zero after rescaling is not overconfidence: the model "
        f"ranks and weighs the options less like people do. {_INTERVALS}",
        figure,
    )


def _conditions(comparison: Comparison) -> Iterator[Drawing]:
    """NLL of one model in plain text and under another condition."""
    if not comparison.conditions:
        return
    results: Sequence[PairResult] = comparison.conditions
    figure = Figure(figsize=(WIDTH, 1.6 + 0.45 * len(results)))
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
    for place, result in enumerate(results):
        color, marker, _ = _look(result.pair.kind)
        plain, other = result.aggregate.base_nll, result.aggregate.post_nll
        axes.plot([plain, other], [place, place], color=_GREY, linewidth=1.4, zorder=1)
        axes.plot(plain, place, marker="o", color=_look(BASE)[0], markersize=8)
        axes.plot(other, place, marker=marker, color=color, markersize=8)
    axes.set_yticks(range(len(results)), [_short(result.pair.base.label, 30) for result in results])
    axes.set_ylim(len(results) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("NLL (nats per response) ↓")
    handles = [Line2D([], [], linestyle="none", marker="o", color=_look(BASE)[0], label="plain text")]
    for kind in _kind_order([result.pair.kind for result in results]):
        color, marker, _ = _look(kind)
        handles.append(Line2D([], [], linestyle="none", marker=marker, color=color, label=kind))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    yield Drawing(
        "conditions",
        "Plain text against " + ", ".join(_kind_order([result.pair.kind for result in results])),
        "The same model and responses in plain text and under another condition (mean over responses of a study, then "
        "over studies); lower is better.",
        figure,
    )


_FIGURES: tuple[Callable[[Comparison], Iterator[Drawing]], ...] = (
    _nll_over_sizes,
    lambda comparison: _effect_groups(comparison, "kind"),
    lambda comparison: _effect_groups(comparison, "generation"),
    lambda comparison: _effect_groups(comparison, "domain"),
    _heatmap,
    _forest,
    _scatter,
    _accuracy_over_sizes,
    _calibration,
    _determinism,
    _conditions,
)
