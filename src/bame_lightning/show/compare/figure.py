"""A comparison as a figure: the metric against training FLOPs, or against the pattern where FLOPs were not counted."""

from __future__ import annotations

from collections import defaultdict
from math import inf
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogFormatterSciNotation, LogLocator, NullFormatter

from bame_lightning.show.compare.rows import Comparison, Row
from bame_lightning.show.compare.tables import tasks

# Okabe and Ito's colours, told apart with any colour vision; in this order neighbours differ in lightness, too.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D1F")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
_SIZES = {"D": 6.5, "^": 8.5, "v": 8.5, "*": 11.0}  # sizes with which all markers look equally large
_INK, _MUTED, _GRID = "#222222", "#555555", "#E3E3E3"
_PANELS_A_ROW = 3
_FLOPS = "flops/train_total"


def draw(comparison: Comparison, path: Path) -> None:
    """Draw a panel for each data set, model and recipe; a colour is a method, a marker a pattern.

    Args:
        comparison: What to draw.
        path: The PNG file to write.
    """
    panels = tasks(comparison)
    colours = _assign([row.method for row in comparison.rows], _COLOURS)
    markers = _assign([row.pattern or "dense" for row in comparison.rows], _MARKERS)
    columns = min(len(panels), _PANELS_A_ROW)
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(1.9 + 5.2 * columns, 4.3 * lines), dpi=150, layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flat
    for axis, (title, rows) in zip(axes, panels, strict=False):
        counted = all(row.flops(_FLOPS) for row in rows)
        (_against_flops if counted else _by_pattern)(axis, rows, colours, markers)
        axis.set_title(title, fontsize=11, color=_INK, loc="left")
        axis.set_ylabel(f"test {rows[0].metric.title}{rows[0].metric.unit},\nmean ± std over seeds", color=_MUTED)
        _calm(axis)
    for axis in list(axes)[len(panels) :]:
        axis.remove()
    _legends(figure, colours, markers)
    figure.savefig(path)


def _against_flops(axis: Axes, rows: list[Row], colours: dict[str, str], markers: dict[str, str]) -> None:
    lines: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        flops = row.flops(_FLOPS) or 1.0
        _point(axis, flops, row, colours, markers)
        lines[row.method, row.settings_text].append((flops, row.metric.scale * row.value[0]))
    for (method, _), points in lines.items():  # the patterns of a method
        axis.plot(*zip(*sorted(points), strict=True), color=colours[method], alpha=0.35, linewidth=1.5, zorder=1)
    axis.set_xscale("log")
    low, high = axis.get_xlim()
    if high / low < 1000:  # powers of ten alone would be too few ticks
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(LogFormatterSciNotation(labelOnlyBase=False, minor_thresholds=(inf, inf)))
        axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel("training FLOPs (counted, not executed; log scale)", color=_MUTED)


def _by_pattern(axis: Axes, rows: list[Row], colours: dict[str, str], markers: dict[str, str]) -> None:
    patterns = list(dict.fromkeys(row.pattern or "dense" for row in rows))
    for index, pattern in enumerate(patterns):
        here = [row for row in rows if (row.pattern or "dense") == pattern]
        for place, row in enumerate(here):
            _point(axis, index + 0.14 * (place - (len(here) - 1) / 2), row, colours, markers)
    axis.set_xticks(range(len(patterns)), patterns)
    axis.set_xlim(-0.6, len(patterns) - 0.4)
    axis.set_xlabel("pattern (FLOPs were not counted)", color=_MUTED)


def _point(axis: Axes, x: float, row: Row, colours: dict[str, str], markers: dict[str, str]) -> None:
    mean, deviation = row.value
    scale = row.metric.scale
    axis.errorbar(
        x,
        scale * mean,
        yerr=None if deviation is None else scale * deviation,
        color=colours[row.method],
        marker=markers[row.pattern or "dense"],
        markersize=_SIZES.get(markers[row.pattern or "dense"], 7.5),
        markeredgecolor="white",
        markeredgewidth=0.7,
        elinewidth=1.5,
        capsize=4,
    )


def _calm(axis: Axes) -> None:
    axis.grid(color=_GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.margins(0.08)
    axis.tick_params(colors=_MUTED, which="both")
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(_GRID)


def _legends(figure: Figure, colours: dict[str, str], markers: dict[str, str]) -> None:
    methods = [Line2D([], [], color=colour, marker="o", linestyle="", label=name) for name, colour in colours.items()]
    patterns = [
        Line2D([], [], color=_MUTED, marker=marker, linestyle="", label=name) for name, marker in markers.items()
    ]
    figure.legend(handles=methods, title="method", loc="outside right upper", frameon=False, alignment="left")
    figure.legend(handles=patterns, title="pattern", loc="outside right lower", frameon=False, alignment="left")


def _assign(names: list[str], values: tuple[str, ...]) -> dict[str, str]:
    return {name: values[index % len(values)] for index, name in enumerate(dict.fromkeys(names))}
