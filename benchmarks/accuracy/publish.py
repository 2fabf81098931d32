"""Write measured results where people read them: docs/results.md, recipes/README.md and the header of each recipe.

    python -m benchmarks.accuracy.publish

Everything comes from `study.csv` and `predictor.csv`; nothing is typed in by hand.
"""

from __future__ import annotations

import csv
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from scipy.stats import t as student  # type: ignore[import-untyped]

from bame_lightning import Evidence, Schedule
from bame_lightning.blocks.pattern import NMPattern
from bame_lightning.ledger.cost import SR_STE, Shares
from bame_lightning.methods.bame import BAME
from bame_lightning.methods.masked import Masked
from benchmarks.accuracy.predictor import CSV as PREDICTOR
from benchmarks.accuracy.study import (
    AS_COSTLY,
    BOTH_WAYS,
    CSV,
    LONGER,
    TABLE,
    Row,
    decimals,
    gain,
    quality,
    quality_spread,
    read_rows,
    recipe_epochs,
    same_seeds,
    spread,
    table,
)
from benchmarks.documents import fill

ROOT = Path(__file__).parents[2]
FIGURE, LONGER_FIGURE = CSV.with_name("results.png"), CSV.with_name("longer.png")
OVERVIEW = CSV.with_name("overview.png")
TASKS = {
    "fashion_mnist_mlp": "784-512-512-10 on Fashion-MNIST, 6 epochs",
    "fashion_mnist_cnn": "three convolutions on Fashion-MNIST, 5 epochs",
    "fashion_mnist_resnet20": "ResNet-20 on Fashion-MNIST, 3 epochs",
    "python_source_gpt": "GPT on Python's standard library, 1,500 steps",
    "digits_cnn": "three convolutions on scikit-learn's digits",
}
METHODS = {
    "bame": "BAME",
    "bame_blocks": "BAME, first version",
    "sr_ste": "SR-STE",
    "static": "static mask",
    "rigl": "RigL in blocks",
    "dense": "dense",
}
MLP = "fashion_mnist_mlp"
LITERAL = "one batch, the literal criterion"
MATTER = {
    LITERAL: "one batch, the criterion as the abstract reads",
    "none designated": "nothing is read between two readings of everything",
    "designated at random": "what is read in between is chosen at random",
    "evidence of designated blocks only": "only what is read in between gathers evidence",
    "evidence from zero": "evidence starts at zero, not at the dense weights",
    "no margin": "the stronger weight swaps at once, without a margin",
    "not rescaled": "the first weights are not rescaled",
    "constant step": "evidence moves as far at the end as at the start",
    "half-life of a quarter": "evidence is forgotten sooner",
    "stopped at half": "masks stop to change at half of the run",
    "frozen after 1": "a block freezes at its second oscillation",
    "all designated": "everything is read in every step",
    "contenders at random": "contenders are chosen at random",
    "2 % contend": "2 % of positions contend, not 5 %",
    "30 % contend": "30 % of positions contend, not 5 %",
    "read everywhere each 40th step": "everything is read at each 40th step only",
}
"""Changes of which docs/results.md shows those that cost most, in plain words; all others are in study.csv."""
SHOWN = 12
COLOURS = dict(zip(METHODS, ("#0072B2", "#8CBEDD", "#D55E00", "#009E73", "#CC79A7", "#000000"), strict=True))
MARKERS = {"1:16": "o", "1:8": "s", "1:4": "^", "2:4": "D", "": "*"}


def main() -> None:
    rows = read_rows()
    TABLE.write_text(table(rows))
    draw([row for row in rows if not row["variant"] and row["method"] in METHODS])
    draw_longer(rows)
    draw_overview(rows)
    hardware = "; ".join(sorted({f"{row['hardware']}, torch {row['torch']}" for row in rows}))
    results = ROOT / "docs" / "results.md"
    fill(results, "findings", "\n".join(findings(rows)))
    fill(results, "equal", "\n".join(equal(rows)))
    fill(results, "headline", "\n".join([f"Measured on {hardware}.", "", *headline(rows), "", *over_sparse_layers()]))
    fill(results, "both ways", "\n".join(both_ways(rows)))
    # On the digits the seeds tell no difference between lengths.
    fill(results, "longer", "\n".join(longer([row for row in rows if row["recipe"] != "digits_cnn"])))
    fill(results, "ablation", "\n".join(ablation(rows)))
    fill(results, "predictor", "\n".join(predictor()))
    _recipes(rows, hardware)


def findings(rows: list[Row]) -> list[str]:
    """What the tables say, in sentences: the default at 1:16 on each task, at equal FLOPs, and what its parts give."""
    lines = []
    for task in TASKS:
        runs = [row for row in rows if row["recipe"] == task]
        groups = _groups([row for row in runs if not row["variant"]])
        own, base = groups.get(("1:16", "bame"), []), groups.get(("1:16", "sr_ste"), [])
        if not own or not base:
            continue
        cost = 1 / statistics.mean(float(row["train_vs_sr_ste"]) for row in own)
        rivals = {method: groups.get(("1:16", method), []) for method in ("sr_ste", "rigl", "static")}
        title = f"{TASKS[task][0].upper()}{TASKS[task][1:]}"
        lines.append(
            f"- **{title}.** BAME reaches {quality_spread(own)} ({_unit(task)}), SR-STE {quality_spread(base)} at {cost:.2f} "
            f"times the training FLOPs. BAME is {_verdicts(own, rivals)}."
        )
        costly = _groups([row for row in runs if row["variant"] == AS_COSTLY])
        if beside := {method: group for (pattern, method), group in costly.items() if pattern == "1:16"}:
            lines[-1] += f" At equal FLOPs it is {_verdicts(own, beside)}."
    changes = _changes(rows, MLP)
    if changes:
        name, ahead = min(changes.items(), key=lambda item: statistics.mean(item[1]))
        of = "" if _version(rows, name) == "bame" else ", of the first version"
        lines.append(
            f"- **What costs most to change** on the MLP{of}: {MATTER[name]}. Accuracy is then {-statistics.mean(ahead):.2f} "
            "points lower ([table](#what-each-part-gives))."
        )
    return lines


def _verdicts(own: list[Row], rivals: Mapping[str, list[Row]]) -> str:
    """Against whom the seeds tell a difference, and how large it is."""
    places = decimals(own[0])
    found: dict[str, list[str]] = {"ahead of": [], "behind": [], "not told apart from": []}
    for method, group in rivals.items():
        gains = [gain(row, rival) for row, rival in same_seeds(own, group)]
        if len(gains) < 2:
            continue
        mean, half = statistics.mean(gains), _half(gains)
        name = METHODS[method] if method.isupper() or method in ("sr_ste", "rigl") else f"the {METHODS[method]}"
        if abs(mean) <= half:
            found["not told apart from"].append(name)
        else:
            found["ahead of" if mean > 0 else "behind"].append(f"{name} by {abs(mean):.{places}f} ± {half:.{places}f}")
    told = [
        f"{verdict} {', '.join(names[:-1])}{' and ' * (len(names) > 1)}{names[-1]}"
        for verdict, names in found.items()
        if names
    ]
    return "; it is ".join(told)


def _unit(task: str) -> str:
    return "bits per byte, less is better" if task.startswith("python") else "test accuracy, %"


def headline(rows: list[Row]) -> list[str]:
    """A row for each task, pattern and method: quality, by how much it is ahead of SR-STE, loss, FLOPs."""
    lines = [
        "| task | N:M | method | seeds | quality | ahead of SR-STE | training loss | FLOPs / dense |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for task in TASKS:
        groups = _groups([row for row in rows if row["recipe"] == task and not row["variant"]])
        patterns = [pattern for pattern in MARKERS if groups.get((pattern, "bame"))]
        # The first version stands in where the default has not been measured at all.
        own = "bame" if patterns else "bame_blocks"
        for pattern in patterns or [pattern for pattern in MARKERS if groups.get((pattern, own))][:1]:
            base = groups.get((pattern, "sr_ste"), [])
            kinds = (own, "sr_ste", "rigl", "static")
            lines += [_result(task, pattern, groups.get((pattern, kind), []), base) for kind in kinds]
        lines.append(_result(task, "", groups.get(("", "dense"), []), []))
    return [line for line in lines if line]


def _result(task: str, pattern: str, group: list[Row], base: list[Row]) -> str:
    if not group:
        return ""
    cells = [
        *(task, pattern, METHODS[group[0]["method"]], str(len(group)), quality_spread(group)),
        _ahead(group, base) if group is not base else "",
        spread([float(row["train_loss"]) for row in group], 4),
        f"{statistics.mean(float(row['train_vs_dense']) for row in group):.3f}",
    ]
    return f"| {' | '.join(cells)} |"


def equal(rows: list[Row]) -> list[str]:
    """BAME beside rivals that trained as long as makes their FLOPs of the whole network the same."""
    lines = [
        "| task | N:M | method | steps | seeds | quality | BAME is ahead by | training loss | FLOPs / dense, 1x |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for task, pattern in [(task, pattern) for task in TASKS for pattern in MARKERS if pattern]:
        runs = [row for row in rows if row["recipe"] == task and row["pattern"] == pattern]
        own = [row for row in runs if row["method"] == "bame" and not row["variant"]]
        rivals = _groups([row for row in runs if row["variant"] == AS_COSTLY])
        for group in [own, *rivals.values()] if own and rivals else []:
            times = int(group[0]["steps"]) / int(own[0]["steps"])
            cells = [
                *(task, pattern, METHODS[group[0]["method"]], f"{times:.2f}x", str(len(group)), quality_spread(group)),
                _ahead(own, group) if group is not own else "",
                spread([float(row["train_loss"]) for row in group], 4),
                f"{times * statistics.mean(float(row['train_vs_dense']) for row in group):.3f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines if len(lines) > 2 else ["Not measured yet: `python -m benchmarks.accuracy.study equal`."]


def both_ways(rows: list[Row]) -> list[str]:
    """BAME with masks that are 2:4 along the output dimension, too, and transposable masks, each beside plain BAME."""
    lines = [
        "| task | N:M | method | seeds | quality | ahead of BAME | training loss | swaps a block |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    kinds = {("bame", ""): "BAME", ("bame", BOTH_WAYS): "BAME, both ways", ("transposable", ""): "transposable"}
    for task, pattern in [(task, pattern) for task in TASKS for pattern in MARKERS if pattern]:
        runs = [row for row in rows if row["recipe"] == task and row["pattern"] == pattern]
        groups = {kind: [row for row in runs if (row["method"], row["variant"]) == kind] for kind in kinds}
        for kind, group in groups.items() if groups["bame", BOTH_WAYS] else ():
            if group:
                cells = [
                    *(task, pattern, kinds[kind], str(len(group)), quality_spread(group)),
                    _ahead(group, groups["bame", ""]) if kind != ("bame", "") else "",
                    spread([float(row["train_loss"]) for row in group], 4),
                    spread([float(row["flips_per_block"]) for row in group], 2) if group[0]["flips_per_block"] else "",
                ]
                lines.append(f"| {' | '.join(cells)} |")
    return lines if len(lines) > 2 else ["Not measured yet: `python -m benchmarks.accuracy.study both_ways`."]


def _ahead(own: list[Row], rivals: list[Row]) -> str:
    """Mean gain in quality over rivals of the same seeds ± half its 95 % interval; bold if that leaves out 0."""
    gains = [gain(row, rival) for row, rival in same_seeds(own, rivals)]
    if not gains:
        return ""
    mean, places = statistics.mean(gains), decimals(own[0])
    if len(gains) == 1:
        return f"{mean:+.{places}f}"
    half = _half(gains)
    text = f"{mean:+.{places}f} ± {half:.{places}f}"
    return f"**{text}**" if abs(mean) > half else text


def _half(gains: list[float]) -> float:
    """Half the 95 % interval of the mean, by Student's t."""
    return float(student.ppf(0.975, len(gains) - 1) * statistics.stdev(gains) / math.sqrt(len(gains)))


def longer(rows: list[Row]) -> list[str]:
    """Runs of several lengths, each against SR-STE's of the recipe's length under the same seeds; the cheapest first."""
    lines = [
        "| task | N:M | method | epochs | seeds | quality | ahead of SR-STE, 1x | training loss | FLOPs / dense, 1x "
        "| SR-STE, 1x, costs |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for task, pattern in [(task, pattern) for task in TASKS for pattern in MARKERS if pattern]:
        runs = [row for row in rows if row["recipe"] == task and row["pattern"] == pattern]
        if not any(row["variant"] in LONGER for row in runs):
            continue
        base = [row for row in runs if row["method"] == "sr_ste" and not row["variant"]]
        lengths = [(method, *length) for method in METHODS for length in _lengths(runs, method).items()]
        # Of rivals beside SR-STE the longest runs: the shorter ones are in study.csv.
        shown = {"static": {4}, "rigl": {4}, "bame_blocks": {1.4, 1.5, 2, 4}}
        lengths = [length for length in lengths if length[1] in shown.get(length[0], {length[1]})]
        for method, times, group in sorted(lengths, key=lambda length: _spent(length[-1])):
            cells = [
                *(task, pattern, METHODS[method], f"{times:g}x", str(len(group)), quality_spread(group)),
                _ahead(group, base) if (method, times) != ("sr_ste", 1) else "",
                spread([float(row["train_loss"]) for row in group], 4),
                f"{_spent(group):.3f}",
                f"{_spent(base) / _spent(group):.2f}x",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _lengths(rows: list[Row], method: str) -> dict[float, list[Row]]:
    """Runs of a method by length, in times the recipe's epochs."""
    groups: dict[float, list[Row]] = defaultdict(list)
    for row in rows:
        if row["method"] == method and row["variant"] in ("", *LONGER):
            groups[_times(row)].append(row)
    return dict(sorted(groups.items()))


def _times(row: Row) -> float:
    return int(row["epochs"]) / recipe_epochs(row["recipe"]) if row["variant"] in LONGER else 1


def _spent(group: list[Row]) -> float:
    """Mean training FLOPs of runs, as a multiple of dense training for the recipe's epochs."""
    return statistics.mean(_times(row) * float(row["train_vs_dense"]) for row in group)


def over_sparse_layers() -> list[str]:
    """How many times SR-STE's training FLOPs exceed BAME's and a static mask's, over the N:M layers alone, by the defaults."""
    default, schedule = Evidence(), Schedule()
    assert isinstance(schedule.stop, float)
    read = schedule.stop * (1 / default.read_every + (1 - 1 / default.read_every) * default.contenders)
    lines = ["| over the N:M layers alone, SR-STE costs | 1:16 | 1:8 | 1:4 | 2:4 |", "|---|---:|---:|---:|---:|"]
    for name, shares in (
        ("BAME", lambda density: BAME.cost.shares(density, read)),
        ("a static mask, the bound", Masked.cost.shares),
    ):
        ratios = []
        for pattern in filter(None, MARKERS):
            density = NMPattern.parse(pattern).density
            ratios.append(_all(SR_STE.shares(density)) / _all(shares(density)))
        lines.append(f"| times the FLOPs of {name} | {' | '.join(f'{ratio:.2f}x' for ratio in ratios)} |")
    return lines


def _all(shares: Shares) -> float:
    return shares.forward + shares.input_gradient + shares.weight_gradient


def ablation(rows: list[Row]) -> list[str]:
    """What BAME loses when a part of it is changed, under the same seeds: those of `MATTER` that cost most.

    Of the default as far as it was measured, else of the first version.
    """
    tasks = (MLP, "fashion_mnist_cnn")
    lines = [
        "| changed | version | ahead of unchanged, MLP | CNN | training loss rises by, MLP | CNN |",
        "|---|---|---:|---:|---:|---:|",
    ]
    found = {task: _changes(rows, task) for task in tasks}
    ranked = sorted(found[MLP], key=lambda name: statistics.mean(found[MLP][name]))[:SHOWN]
    for name in ranked:
        version = _version(rows, name)
        cells = [MATTER[name], "default" if version == "bame" else "first"]
        groups = [_changed(rows, task, name) for task in tasks]
        cells += [_ahead(changed, default) if changed else "" for changed, default in groups]
        cells += [f"{_loss(changed) - _loss(default):+.4f}" if changed else "" for changed, default in groups]
        lines.append(f"| {' | '.join(cells)} |")
    return lines if len(lines) > 2 else ["Not measured yet: `python -m benchmarks.accuracy.study ablation`."]


def _changes(rows: list[Row], task: str) -> dict[str, list[float]]:
    """Gains over the unchanged method by change, of those that matter."""
    found = {}
    for name in MATTER:
        gains = [gain(row, rival) for row, rival in same_seeds(*_changed(rows, task, name))]
        if gains:
            found[name] = gains
    return found


def _version(rows: list[Row], name: str) -> str:
    measured = any(row["method"] == "bame" and row["variant"] == name for row in rows)
    return "bame" if measured or name == LITERAL else "bame_blocks"


def _changed(rows: list[Row], task: str, name: str) -> tuple[list[Row], list[Row]]:
    """Runs with a change, and those of the same method without it."""
    version = _version(rows, name)
    here = [row for row in rows if row["recipe"] == task and row["pattern"] == "1:16"]
    method, variant = ("bame_one_batch", "") if name == LITERAL else (version, name)
    changed = [row for row in here if row["method"] == method and row["variant"] == variant]
    return changed, [row for row in here if row["method"] == version and not row["variant"]]


def _loss(group: list[Row]) -> float:
    return statistics.mean(float(row["train_loss"]) for row in group)


def predictor() -> list[str]:
    """Of the runs of `predictor.py` that change masks as the default does, how well the logged prediction ranks."""
    with PREDICTOR.open() as file:
        rows = [row for row in csv.DictReader(file) if row["one_per_row"] == "True" and row["predicted"] == "logged"]
    lines = [
        "| adapted every | half of the run | realised on | adaptations | rank correlation |",
        "|---|---|---|---:|---:|",
    ]
    names = ("every", "half_of_run", "realised_on", "adaptations", "rank_correlation")
    return lines + [f"| {' | '.join(row[name].replace('_', ' ') for name in names)} |" for row in rows]


def draw(rows: list[Row]) -> None:
    """A panel for each task: quality against training FLOPs, with the standard deviation over seeds."""
    tasks = [task for task in TASKS if any(row["recipe"] == task and row["method"] == "bame" for row in rows)]
    figure, axes = _panels(tasks)
    for axis, task in zip(axes, tasks, strict=True):
        for (pattern, method), group in _groups([row for row in rows if row["recipe"] == task]).items():
            _curve(axis, [group], COLOURS[method], MARKERS[pattern])
    for pattern, marker in MARKERS.items():
        axes[0].plot([], [], marker, color="#888888", label=pattern or "dense", linestyle="")
    figure.legend(loc="outside lower center", ncols=len(METHODS) + len(MARKERS), fontsize=10, frameon=False)
    figure.savefig(FIGURE)


def draw_longer(rows: list[Row]) -> None:
    """A panel for each task: quality of ever longer runs at 1:16 against their training FLOPs."""
    tasks = [task for task in TASKS if any(row["recipe"] == task and row["variant"] in LONGER for row in rows)]
    figure, axes = _panels(tasks)
    for axis, task in zip(axes, tasks, strict=True):
        runs = [row for row in rows if row["recipe"] == task and row["pattern"] in ("1:16", "")]
        for method, colour in COLOURS.items():
            marker = MARKERS["" if method == "dense" else "1:16"]
            _curve(axis, list(_lengths(runs, method).values()), colour, marker)
    figure.legend(loc="outside lower center", ncols=len(METHODS), fontsize=10, frameon=False)
    figure.savefig(LONGER_FIGURE)


def draw_overview(rows: list[Row]) -> None:
    """For people who see this for the first time: at 1:16, what training costs, as bars, and how good it gets, in numbers."""
    found = {task: _groups([row for row in rows if row["recipe"] == task and not row["variant"]]) for task in TASKS}
    tasks = [task for task in TASKS if found[task].get(("1:16", "bame")) and found[task].get(("", "dense"))]
    figure = Figure(figsize=(4.3 * len(tasks), 2.9), dpi=120, layout="constrained")
    for axis, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        every = {method: found[task].get(("" if method == "dense" else "1:16", method), []) for method in METHODS}
        methods = [method for method in ("bame", "static", "rigl", "sr_ste", "dense") if every[method]]
        groups = [every[method] for method in methods]
        costs = [100 * statistics.mean(float(row["train_vs_dense"]) for row in group) for group in groups]
        axis.barh(range(len(methods)), costs, color=[COLOURS[method] for method in methods], height=0.62)
        for place, (cost, group) in enumerate(zip(costs, groups, strict=True)):
            value = statistics.mean(quality(row) for row in group)
            unit = "bits per byte (less is better)" if task.startswith("python") and not place else "bits per byte"
            unit = unit if task.startswith("python") else "% right"
            axis.text(cost + 2, place, f"{value:.{decimals(group[0])}f} {unit}", va="center", fontsize=10)
        axis.set_yticks(range(len(methods)), [METHODS[method] for method in methods])
        axis.invert_yaxis()
        axis.set_xlim(0, 170)
        axis.set_xticks([0, 50, 100], ["0", "50 %", "100 %"])
        axis.set_xlabel("training FLOPs (dense = 100 %)")
        axis.set_title(TASKS[task].split(",")[0], fontsize=10, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(OVERVIEW)


def _panels(tasks: list[str]) -> tuple[Figure, list[Axes]]:
    """An empty panel for each task, and the methods' colours as entries of a legend."""
    columns = min(3, len(tasks))
    lines = math.ceil(len(tasks) / columns)
    figure = Figure(figsize=(5.2 * columns, 4 * lines + 0.4), dpi=120, layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis in axes[len(tasks) :]:
        axis.set_axis_off()
    for axis, task in zip(axes, tasks, strict=False):
        axis.set_xscale("log")
        axis.set_xlim(0.05, 1.5)
        axis.set_xticks([0.1, 0.2, 0.5, 1.0], ["0.1", "0.2", "0.5", "1"])
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel("training FLOPs, of dense training (counted)")
        axis.set_ylabel("bits per byte (less is better)" if task.startswith("python") else "test accuracy, %")
        axis.set_title(TASKS[task], fontsize=10, loc="left")
        axis.grid(color="#E3E3E3")
        axis.set_axisbelow(True)
    for method, colour in COLOURS.items():
        axes[0].plot([], [], "o", color=colour, label=METHODS[method])
    return figure, list(axes[: len(tasks)])


def _curve(axis: Axes, groups: list[list[Row]], colour: str, marker: str) -> None:
    """A point for each group of runs, with the standard deviation over seeds, joined by a line."""
    values = [[quality(row) for row in group] for group in groups]
    axis.errorbar(
        [_spent(group) for group in groups],
        [statistics.mean(qualities) for qualities in values],
        yerr=[statistics.stdev(qualities) if len(qualities) > 1 else 0 for qualities in values],
        marker=marker,
        color=colour,
        markersize=9,
        capsize=3,
    )


def _recipes(rows: list[Row], hardware: str) -> None:
    lines = [
        "| recipe | pattern | method | test accuracy, % (GPT: bits per byte) | seeds | minutes |",
        "|---|---|---|---|---|---|",
    ]
    for path in sorted((ROOT / "recipes").glob("*.yaml")):
        groups = _groups([row for row in rows if row["recipe"] == path.stem and not row["variant"]])
        group = groups.get(("1:16", "bame"))
        measured = "not measured"
        if group:
            language = bool(group[0]["test_bits_per_byte"])
            value = quality_spread(group)
            # Runs shared the machine, and some were stopped for a while.
            minutes = f"{min(float(row['wall_seconds']) for row in group) / 60:.1f}"
            lines.append(f"| {path.stem} | 1:16 | bame | {value} | {len(group)} | {minutes} |")
            value = f"{value} bits per byte" if language else f"test accuracy {value} %"
            measured = f"{value}, {len(group)} seeds, {minutes} minutes on {group[0]['hardware']}"
        else:
            lines.append(f"| {path.stem} | | | not measured | | |")
        text = re.sub(r"^# Measured: .*$", f"# Measured: {measured}", path.read_text(), flags=re.MULTILINE)
        path.write_text(text)
    source = "`python -m benchmarks.accuracy.study headline` ([script](../benchmarks/accuracy/study.py))"
    note = f"Mean ± standard deviation over seeds, measured by {source}; minutes of the quickest run."
    fill(ROOT / "recipes/README.md", "recipes", "\n".join([*lines, "", note, f"Hardware: {hardware}."]))


def _groups(rows: list[Row]) -> dict[tuple[str, str], list[Row]]:
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["pattern"], row["method"]].append(row)
    return dict(groups)


if __name__ == "__main__":
    main()
