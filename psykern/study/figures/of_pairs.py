"""Figures of pairs: study by study, base against post-trained, at the best temperature, and between conditions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from psykern.study.figures.style import (
    GREY,
    INTERVALS,
    WIDTH,
    Drawing,
    bars,
    kind_order,
    look,
    mark,
    name_rows,
    panels_of,
    shorten,
    single,
)
from psykern.study.models import BASE
from psykern.study.results import Comparison, Interval, PairStudy


def forests(comparison: Comparison) -> Iterator[Drawing]:
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
        panels[0].set_yticks(range(len(everything)), [shorten(row.study) for row in everything])
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


def _forest_panel(axes: Axes, rows: Sequence[PairStudy], of: Callable[[PairStudy], Interval], kind: str) -> None:
    color = look(kind)[0]
    values = [of(row) for row in rows]
    for place, value in enumerate(values[:-1]):
        bars(axes, place, value, color, horizontal=True)
        axes.plot(value.value, place, marker="o", markersize=5.5, color=color, zorder=3)
    bars(axes, len(values) - 1, values[-1], "black", horizontal=True)
    axes.plot(values[-1].value, len(values) - 1, marker="D", markersize=7.5, color="black", zorder=3)
    axes.axvline(0, color="black", linewidth=1)
    axes.axhline(len(values) - 1.5, color=GREY, linewidth=0.8)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.grid(axis="y", visible=False)


def scatter(comparison: Comparison) -> Iterator[Drawing]:
    """Base against post-trained NLL, a point per study, a panel per kind."""
    if not comparison.pairs:
        return
    kinds = kind_order([result.pair.kind for result in comparison.pairs])
    figure, panels = panels_of(len(kinds), height=3.1)
    for kind, axes in zip(kinds, panels, strict=True):
        color, marker, _ = look(kind)
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


def determinism(comparison: Comparison) -> Iterator[Drawing]:
    """Per pair: the difference of the option NLL as it is and with both models at their best temperature."""
    pairs = [r for r in comparison.pairs if not math.isnan(r.aggregate.option_difference.value)]
    if not pairs:
        return
    figure, axes = single(1.6 + (0.55 if len(pairs) < 8 else 0.36) * len(pairs))
    for place, result in enumerate(pairs):
        color, marker, _ = look(result.pair.kind)
        for shift, value, filled in (
            (-0.15, result.aggregate.option_difference, True),
            (0.15, result.aggregate.rescaled_difference, False),
        ):
            bars(axes, place + shift, value, color, horizontal=True)
            face = color if filled else "white"
            axes.plot(
                value.value, place + shift, marker=marker, markersize=8, color=color, markerfacecolor=face, zorder=3
            )
    axes.axvline(0, color="black", linewidth=1)
    labels = [shorten(result.pair.post.label, 30) for result in pairs]
    name_rows(axes, labels, "difference of option NLL, post-trained − base (nats)")
    handles = [mark("as it is"), mark("each at its best temperature", markerfacecolor="white")]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    yield Drawing(
        "determinism",
        "Is it mere overconfidence?",
        "The loss of fit on responses with options, as it is (filled), and after each model got the one temperature "
        "that suits it best (open). What remains right of zero after rescaling is not overconfidence: the model "
        f"ranks and weighs the options less like people do. {INTERVALS}",
        figure,
    )


def conditions(comparison: Comparison) -> Iterator[Drawing]:
    """NLL of one model in plain text and under another condition."""
    if not comparison.conditions:
        return
    results = comparison.conditions
    figure, axes = single(1.6 + 0.45 * len(results))
    for place, result in enumerate(results):
        color, marker, _ = look(result.pair.kind)
        plain, other = result.aggregate.base_nll, result.aggregate.post_nll
        axes.plot([plain, other], [place, place], color=GREY, linewidth=1.4, zorder=1)
        axes.plot(plain, place, marker="o", color=look(BASE)[0], markersize=8)
        axes.plot(other, place, marker=marker, color=color, markersize=8)
    name_rows(axes, [shorten(result.pair.base.label, 30) for result in results], "NLL (nats per response) ↓")
    kinds = kind_order([result.pair.kind for result in results])
    handles = [mark("plain text", color=look(BASE)[0])]
    for kind in kinds:
        color, marker, _ = look(kind)
        handles.append(mark(kind, marker, color))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    yield Drawing(
        "conditions",
        "Plain text against " + ", ".join(kinds),
        "The same model and responses in plain text and under another condition (mean over responses of a study, then "
        "over studies); lower is better.",
        figure,
    )
