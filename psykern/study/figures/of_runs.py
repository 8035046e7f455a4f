"""Figures of single runs: NLL and accuracy over model size, and calibration."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from psykern.study.figures.style import (
    GREY,
    INTERVALS,
    Drawing,
    bars,
    kind_order,
    legend,
    look,
    mark,
    panels_of,
    plain_runs,
)
from psykern.study.models import PUBLISHED_NLL
from psykern.study.results import Comparison, Interval, RunResult


def _over_sizes(
    comparison: Comparison, of: Callable[[RunResult], Interval], label: str, published: bool
) -> Figure | None:
    """A panel per family, a line per kind of post-training, over billions of weights on a log axis."""
    results = [result for result in plain_runs(comparison) if result.named.model.size is not None]
    results = [result for result in results if not math.isnan(of(result).value)]
    if not results:
        return None
    families = list(dict.fromkeys(result.named.model.family for result in results))
    figure, panels = panels_of(len(families))
    shown = False
    for family, axes in zip(families, panels, strict=True):
        of_family = [result for result in results if result.named.model.family == family]
        for number, (kind, line) in enumerate(_lines(of_family)):
            color, marker, style = look(kind)
            dodge = 1.04 ** (number % 4)  # models of one size stand beside each other
            sizes = [(result.named.model.size or 0.0) * dodge for result in line]
            values = [of(result) for result in line]
            axes.plot(sizes, [value.value for value in values], color=color, marker=marker, linestyle=style)
            for size, value in zip(sizes, values, strict=True):
                bars(axes, size, value, color)
        known = [result for result in of_family if published and result.named.model.name in PUBLISHED_NLL]
        if known:
            shown = True
            x = [result.named.model.size or 0.0 for result in known]
            y = [PUBLISHED_NLL[result.named.model.name] for result in known]
            axes.plot(x, y, linestyle="none", marker="o", markersize=11, markerfacecolor="none", color=GREY)
        _size_axis(axes, [result.named.model.size or 0.0 for result in of_family])
        axes.set_title(family)
    for axes in panels[:: min(2, len(panels))]:
        axes.set_ylabel(label)
    ring = mark("published", color=GREY, markersize=10, markerfacecolor="none")
    legend(figure, [result.named.model.kind for result in results], [ring] if shown else [])
    return figure


def _lines(results: Sequence[RunResult]) -> list[tuple[str, list[RunResult]]]:
    """A family's models by kind, and by generation too where one kind has several of one size; sizes ascend."""
    by_kind: dict[str, list[RunResult]] = {}
    for result in sorted(results, key=lambda result: result.named.model.size or 0.0):
        by_kind.setdefault(result.named.model.kind, []).append(result)
    lines = []
    for kind in kind_order(list(by_kind)):
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


def nll_over_sizes(comparison: Comparison) -> Iterator[Drawing]:
    figure = _over_sizes(comparison, lambda result: result.nll, "NLL (nats per response) ↓", True)
    if figure is not None:
        yield Drawing(
            "nll_by_size",
            "Fit by model size",
            "Negative log-likelihood of human responses (mean over responses of a study, then over studies) against "
            f"the number of weights; lower is better. A line per kind of post-training. {INTERVALS}",
            figure,
        )


def accuracy_over_sizes(comparison: Comparison) -> Iterator[Drawing]:
    figure = _over_sizes(comparison, lambda result: result.accuracy, "accuracy ↑", False)
    if figure is not None:
        yield Drawing(
            "accuracy_by_size",
            "Accuracy by model size",
            "Share of responses whose every token is the likeliest of the whole vocabulary, averaged over studies; "
            f"higher is better. {INTERVALS}",
            figure,
        )


def calibration(comparison: Comparison) -> Iterator[Drawing]:
    """Reliability of the likeliest option, a panel per family, a line per model."""
    results = [result for result in plain_runs(comparison) if result.calibration.counts.sum()]
    if not results:
        return
    families = list(dict.fromkeys(result.named.model.family for result in results))
    figure, panels = panels_of(len(families), height=3.1)
    for family, axes in zip(families, panels, strict=True):
        axes.plot([0, 1], [0, 1], color="black", linewidth=1)
        for result in (r for r in results if r.named.model.family == family):
            bins = result.calibration
            kept = bins.counts >= max(10, 0.002 * bins.counts.sum())
            color, marker, line = look(result.named.model.kind)
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
    legend(figure, [result.named.model.kind for result in results])
    yield Drawing(
        "calibration",
        "Calibration",
        "Responses with known options, in ten bins by the probability of the likeliest option, against how often "
        "people chose it. Below the diagonal a model is surer than it is right. Bins of fewer than 10 responses, or "
        "of less than 0.2 %, are left out.",
        figure,
    )
