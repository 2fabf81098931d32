"""Draw what the study measured: README's overview, quality against training FLOPs, and longer runs."""

from __future__ import annotations

import math
import statistics

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from benchmarks.accuracy.groups import METHODS, PATTERNS, TASKS, by_method, lengths, spent, unit
from benchmarks.accuracy.study import CSV, LONGER, Row, decimals, quality

RESULTS, LONGER_RUNS, OVERVIEW = (CSV.with_name(f"{name}.png") for name in ("results", "longer", "overview"))
COLOURS = dict(zip(METHODS, ("#0072B2", "#8CBEDD", "#D55E00", "#009E73", "#CC79A7", "#000000"), strict=True))
MARKERS = {"1:16": "o", "1:8": "s", "1:4": "^", "2:4": "D", "": "*"}


def draw(rows: list[Row]) -> None:
    """A panel for each task: quality against training FLOPs, with the standard deviation over seeds."""
    tasks = [task for task in TASKS if any(row["recipe"] == task and row["method"] == "bame" for row in rows)]
    figure, axes = _panels(tasks)
    for axis, task in zip(axes, tasks, strict=True):
        for (pattern, method), group in by_method([row for row in rows if row["recipe"] == task]).items():
            _curve(axis, [group], COLOURS[method], MARKERS[pattern])
    for pattern in PATTERNS:
        axes[0].plot([], [], MARKERS[pattern], color="#888888", label=pattern, linestyle="")
    figure.legend(loc="outside lower center", ncols=len(METHODS) + len(PATTERNS), fontsize=10, frameon=False)
    figure.savefig(RESULTS)


def draw_longer(rows: list[Row]) -> None:
    """A panel for each task: quality of ever longer runs at 1:16 against their training FLOPs."""
    tasks = [task for task in TASKS if any(row["recipe"] == task and row["variant"] in LONGER for row in rows)]
    figure, axes = _panels(tasks)
    for axis, task in zip(axes, tasks, strict=True):
        runs = [row for row in rows if row["recipe"] == task and row["pattern"] in ("1:16", "")]
        for method, colour in COLOURS.items():
            marker = MARKERS["" if method == "dense" else "1:16"]
            _curve(axis, list(lengths(runs, method).values()), colour, marker)
    figure.legend(loc="outside lower center", ncols=len(METHODS), fontsize=10, frameon=False)
    figure.savefig(LONGER_RUNS)


def draw_overview(rows: list[Row]) -> None:
    """For people who see this for the first time: at 1:16, what training costs, as bars, and how good it gets, in numbers."""
    tasks = {"fashion_mnist_mlp": "MLP on Fashion-MNIST", "fashion_mnist_cnn": "CNN on Fashion-MNIST"}
    tasks |= {"python_source_gpt": "GPT on Python code"}
    names = {"bame": "BAME", "static": "static mask", "rigl": "RigL", "sr_ste": "SR-STE", "dense": "dense"}
    figure = Figure(figsize=(9.4, 2.9), dpi=150, layout="constrained")
    figure.suptitle("Training with one weight in sixteen: bars are the cost, numbers the result", fontsize=11)
    axes = figure.subplots(1, len(tasks), sharey=True)
    for axis, (task, title) in zip(axes, tasks.items(), strict=True):
        groups = by_method([row for row in rows if row["recipe"] == task and not row["variant"]])
        for place, method in enumerate(names):
            group = groups["" if method == "dense" else "1:16", method]
            cost = 100 * statistics.mean(float(row["train_vs_dense"]) for row in group)
            axis.barh(place, cost, color=COLOURS[method], height=0.62)
            result = f"{statistics.mean(quality(row) for row in group):.{decimals(group[0])}f}"
            axis.text(cost + 3, place, result if task.startswith("python") else f"{result} %", va="center")
        axis.set_yticks(range(len(names)), list(names.values()))
        axis.set_xlim(0, 145)
        axis.set_xticks([0, 50, 100], ["0", "50", "100"])
        axis.set_xlabel("training operations, % of dense", fontsize=9)
        axis.set_title(f"{title}\n{unit(task)}", fontsize=10, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    figure.savefig(OVERVIEW)


def _panels(tasks: list[str]) -> tuple[Figure, list[Axes]]:
    """An empty panel for each task, and the methods' colours as entries of a legend."""
    columns = min(3, len(tasks))
    lines = math.ceil(len(tasks) / columns)
    figure = Figure(figsize=(4.2 * columns, 3.4 * lines + 0.5), dpi=120, layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis in axes[len(tasks) :]:
        axis.set_axis_off()
    for axis, task in zip(axes, tasks, strict=False):
        axis.set_xscale("log")
        axis.set_xlim(0.05, 1.8)
        axis.set_xticks([0.1, 0.2, 0.5, 1.0], ["0.1", "0.2", "0.5", "1"])
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel("training FLOPs / those of dense training (counted)")
        axis.set_ylabel(unit(task))
        axis.set_title(TASKS[task][1], fontsize=10, loc="left")
        axis.grid(color="#E3E3E3")
        axis.set_axisbelow(True)
    for method, colour in COLOURS.items():
        marker = MARKERS[""] if method == "dense" else "o"
        axes[0].plot([], [], marker, color=colour, label=METHODS[method], linestyle="")
    return figure, list(axes[: len(tasks)])


def _curve(axis: Axes, groups: list[list[Row]], colour: str, marker: str) -> None:
    """A point for each group of runs, with the standard deviation over seeds, joined by a line."""
    values = [[quality(row) for row in group] for group in groups]
    axis.errorbar(
        [spent(group) for group in groups],
        [statistics.mean(qualities) for qualities in values],
        yerr=[statistics.stdev(qualities) if len(qualities) > 1 else 0 for qualities in values],
        marker=marker,
        color=colour,
        markersize=9,
        capsize=3,
    )
