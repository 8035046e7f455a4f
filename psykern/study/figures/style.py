"""How the report's figures look, and the parts that several of them have.

Colours are Okabe and Ito's, which colour-blind readers tell apart, and a kind of post-training has its own marker
and line too, so that a figure survives a black-and-white print. Figures are narrow (column width) and their text
is large for it, because a phone shows them at two thirds of their size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from psykern.study.models import BASE
from psykern.study.results import Comparison, Interval, RunResult

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
    "text.parse_math": False,  # a dollar sign in a name is one
    "svg.hashsalt": "psykern",  # equal figures give equal bytes
    "svg.fonttype": "path",  # the page needs no font
    "savefig.facecolor": "white",
}

# Okabe & Ito (2008), "Color Universal Design"; black and grey are left to reference marks.
KINDS = {
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

OTHER = ("#666666", "h", ":")

GREY = "#666666"
INTERVALS = "Bars are 95 % intervals over participants (cluster bootstrap)."  # the captions' sentence


@dataclass(frozen=True, slots=True)
class Drawing:
    """A figure with what is written about it."""

    name: str  # of its files
    title: str
    caption: str
    figure: Figure


def look(kind: str) -> tuple[str, str, Any]:
    """Colour, marker and line of a kind of post-training (or of a condition)."""
    return KINDS.get(kind, OTHER)


def kind_order(kinds: Sequence[str]) -> list[str]:
    order = list(KINDS)
    return sorted(set(kinds), key=lambda kind: (order.index(kind) if kind in order else len(order), kind))


def legend(figure: Figure, kinds: Sequence[str], extra: Sequence[Line2D] = ()) -> None:
    handles = [
        Line2D([], [], color=color, marker=marker, linestyle=line, label=kind)
        for kind in kind_order(kinds)
        for color, marker, line in [look(kind)]
    ]
    figure.legend(handles=[*handles, *extra], loc="outside lower center", ncols=min(4, len(handles) + len(extra)))


def mark(label: str, marker: str = "o", color: str = "black", **more: Any) -> Line2D:
    """A legend's entry without a line."""
    return Line2D([], [], linestyle="none", marker=marker, color=color, label=label, **more)


def bars(axes: Axes, x: float, estimate: Interval, color: str, *, horizontal: bool = False) -> None:
    """The interval of ``estimate`` at ``x``, where it has one."""
    if math.isnan(estimate.low):
        return
    ends = [estimate.low, estimate.high]
    axes.plot(*((ends, [x, x]) if horizontal else ([x, x], ends)), color=color, linewidth=1.4, zorder=2)


def panels_of(count: int, height: float = 2.9, columns: int = 2) -> tuple[Figure, list[Axes]]:
    """A figure of ``count`` panels, row by row; ``height`` inches each."""
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(WIDTH if columns > 1 else WIDTH * 0.85, height * rows + 0.5))
    figure.set_layout_engine("constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    flat = list(axes.flat)
    for unused in flat[count:]:
        unused.remove()
    return figure, flat[:count]


def plain_runs(comparison: Comparison) -> list[RunResult]:
    """The runs in plain text: what the figures of models show."""
    return [result for result in comparison.runs if result.named.run.condition == "plain"]


def single(height: float, width: float = WIDTH) -> tuple[Figure, Axes]:
    """A figure of one panel; inches."""
    figure = Figure(figsize=(width, height))
    figure.set_layout_engine("constrained")
    return figure, figure.subplots()


def name_rows(axes: Axes, labels: Sequence[str], xlabel: str) -> None:
    """A panel of one row per label, the first at the top."""
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(xlabel)


def shorten(name: str, width: int = 26) -> str:
    return name if len(name) <= width else f"{name[: width - 1]}…"
