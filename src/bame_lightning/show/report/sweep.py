"""The report on a sweep: its finished runs side by side."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from math import floor, log10
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from bame_lightning.show.compare.rows import BITS_PER_BYTE, Comparison, Row, compare_runs
from bame_lightning.show.compare.runs import Run, find_runs
from bame_lightning.show.compare.tables import WORDS, cells, explanation, tasks
from bame_lightning.show.find_runs import read_summary
from bame_lightning.show.numbers import amount
from bame_lightning.show.numbers import flops as in_words
from bame_lightning.show.report.figures import COLOURS, Figure, Trace, axis
from bame_lightning.show.report.page import Report, Section, Table

_SYMBOLS = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x", "star")
_FLOPS = "flops/train_total"


def sweep_report(folder: Path, baseline: str | None = None) -> Report:
    """Compare the runs below a folder.

    Args:
        folder: The sweep's folder.
        baseline: The method to which tables give differences; None for none.

    Returns:
        What to show.

    Raises:
        CompareError: If there is no finished run, or none of the baseline.
    """
    runs, missing = find_runs(folder)
    comparison = compare_runs(runs, baseline, missing)
    methods = {row.method: None for row in comparison.rows}
    patterns = {row.pattern or "dense": None for row in comparison.rows}
    colours = {method: COLOURS[index % len(COLOURS)] for index, method in enumerate(sorted(methods))}
    symbols = {pattern: _SYMBOLS[index % len(_SYMBOLS)] for index, pattern in enumerate(patterns)}
    sections = [
        Section(task, (_figure(f"task_{index}", rows, colours, symbols),), (_table(rows, comparison),))
        for index, (task, rows) in enumerate(tasks(comparison))
    ]
    count = len(runs)
    return Report(
        title=f"Sweep {folder.resolve().name}",
        headline=tuple(sentence for task in tasks(comparison) for sentence in _headline(*task)),
        facts=(
            ("finished runs", f"{count:,}"),
            ("methods", ", ".join(colours)),
            ("patterns", ", ".join(symbols)),
        ),
        notes=comparison.notes,
        sections=tuple(sections),
        explanation=explanation(comparison),
        made=tuple(_made(folder, runs)),
    )


def _headline(task: str, rows: list[Row]) -> Iterator[str]:
    """Say which row of a task has the best mean, and which is cheapest."""
    metric = rows[0].metric
    best = (min if metric is BITS_PER_BYTE else max)(rows, key=lambda row: row.value[0])
    value, spread = best.value
    shown = f"{metric.scale * value:.{metric.digits}f}"
    shown += "" if spread is None else f" ± {metric.scale * spread:.{metric.digits}f}"
    extreme = "fewest" if metric is BITS_PER_BYTE else "highest"
    yield f"{task}: {best.label} has the {extreme} {metric.title} in the test, {shown}{'%' * (metric.scale == 100)}."
    counted = [(cost, row) for row in rows if (cost := row.flops(_FLOPS))]
    if counted:
        cost, cheapest = min(counted, key=lambda pair: pair[0])
        yield f"{cheapest.label} costs least ({in_words(cost)} of training)."


def _made(folder: Path, runs: Sequence[Run]) -> Iterator[tuple[str, str]]:
    """Say how the sweep can be made again."""
    hydra = folder / "multirun.yaml"
    task = OmegaConf.select(OmegaConf.load(hydra), "hydra.overrides.task") if hydra.is_file() else None
    if task:
        yield "command", " ".join(["bame-train -m", *map(str, task)])
    yield "seeds", ", ".join(map(str, sorted({run.seed for run in runs})))
    provenance = [found for run in runs if (found := (read_summary(folder / run.folder) or {}).get("provenance"))]
    if provenance:
        yield "dates", " to ".join(sorted({min(p["date"] for p in provenance), max(p["date"] for p in provenance)}))
        told = {", ".join(f"{name} {version}" for name, version in p["versions"].items()) for p in provenance}
        yield "versions", "; ".join(sorted(told))


def _figure(name: str, rows: list[Row], colours: dict[str, str], symbols: dict[str, str]) -> Figure:
    metric = rows[0].metric
    counted = all(row.flops(_FLOPS) for row in rows)
    lines: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        lines[row.method, row.settings_text].append(row)
    traces = []
    for (method, settings), line in lines.items():
        if counted:
            line = sorted(line, key=lambda row: row.flops(_FLOPS) or 0.0)
        share = metric.scale == 100
        traces.append(
            {
                "type": "scatter",
                "name": f"{method} {settings}".strip(),
                "mode": "lines+markers" if counted else "markers",
                "x": [row.flops(_FLOPS) if counted else row.pattern or "dense" for row in line],
                "y": [row.value[0] for row in line],
                "error_y": {"type": "data", "array": [row.value[1] for row in line], "thickness": 1.5, "width": 5},
                "text": [f"{row.label}, {amount(len(row.runs), 'seed')}" for row in line],
                "hovertemplate": "%{text}: %{y:" + (".2%" if share else ".4f") + "}<extra></extra>",
                "line": {"color": colours[method], "width": 1},
                "marker": {"size": 10, "symbol": [symbols[row.pattern or "dense"] for row in line]},
            }
        )
    x: dict[str, Any] = axis("pattern (FLOPs were not counted)", type="category")
    traces += [_entry(pattern, symbols[pattern]) for pattern in dict.fromkeys(row.pattern or "dense" for row in rows)]
    note = "A colour is a method, a shape a pattern. Mean over seeds; bars are the sample standard deviation."
    if counted:
        x = _log_axis("training FLOPs (log scale)", [row.flops(_FLOPS) or 1.0 for row in rows])
    layout = {"xaxis": x, "yaxis": axis(f"test {metric.title}", share=metric.scale == 100), "height": 440, "tall": 90}
    layout["hovermode"] = "closest"
    layout["margin"] = {"l": 56, "r": 44, "t": 26, "b": 48}  # the last tick's label has room
    title = f"How much test {metric.title} for how much training?"
    return Figure(name, title, note, traces, layout, wide=True)


def _entry(pattern: str, symbol: str) -> Trace:
    """Make an entry of the legend without a point, because points have the colour of their method."""
    return {
        "type": "scatter",
        "name": pattern,
        "mode": "markers",
        "x": [None],
        "y": [None],
        "hoverinfo": "skip",
        "marker": {"size": 10, "symbol": symbol, "color": "#777777"},
    }


def _log_axis(title: str, values: Sequence[float]) -> dict[str, Any]:
    """Describe a logarithmic axis with enough labelled ticks; plotly's own show digits without their power."""
    low, high = min(values), max(values)
    digits = (1, 2, 3, 4, 6) if high / low < 10 else (1, 2, 5) if high / low < 1000 else (1,)
    exponents = range(floor(log10(low)) - 1, floor(log10(high)) + 2)
    margin = max(0.06 * log10(high / low), 0.08)
    ends = [log10(low) - margin, log10(high) + margin]
    ticks = [(digit, power) for power in exponents for digit in digits]
    ticks = [tick for tick in ticks if ends[0] <= log10(tick[0]) + tick[1] <= ends[1]]
    values, labels = (
        [digit * 10.0**power for digit, power in ticks],
        [in_words(digit * 10.0**power) for digit, power in ticks],
    )
    return axis(title, type="log", range=ends, tickvals=values, ticktext=labels)


def _table(rows: list[Row], comparison: Comparison) -> Table:
    names, table = cells(rows, comparison.baseline)
    return Table(tuple(names), tuple(tuple(row) for row in table), tuple(name not in WORDS for name in names))
