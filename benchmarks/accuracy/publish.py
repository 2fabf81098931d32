"""Write measured results where people read them: README, docs/results.md, recipes/README.md and the header of each recipe.

    python -m benchmarks.accuracy.publish

Everything comes from `study.csv` and `predictor.csv`; nothing is typed in by hand.
"""

from __future__ import annotations

import csv
import math
import re
import statistics
from collections import defaultdict
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from scipy.stats import t as student  # type: ignore[import-untyped]

from bame_lightning import Evidence, Schedule
from bame_lightning.blocks.pattern import NMPattern
from bame_lightning.ledger.cost import SR_STE
from bame_lightning.methods.bame import BAME
from bame_lightning.methods.masked import Masked
from benchmarks.accuracy.predictor import CSV as PREDICTOR
from benchmarks.accuracy.study import (
    AS_COSTLY,
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
COLOURS = dict(zip(METHODS, ("#0072B2", "#8CBEDD", "#D55E00", "#009E73", "#CC79A7", "#000000"), strict=True))
MARKERS = {"1:16": "o", "1:8": "s", "1:4": "^", "2:4": "D", "": "*"}


def main() -> None:
    rows = read_rows()
    TABLE.write_text(table(rows))
    draw([row for row in rows if not row["variant"] and row["method"] in METHODS])
    draw_longer(rows)
    hardware = "; ".join(sorted({f"{row['hardware']}, torch {row['torch']}" for row in rows}))
    command = "```\npython -m benchmarks.accuracy.study headline\npython -m benchmarks.accuracy.publish\n```"

    text = [
        "Fashion-MNIST with an MLP, a CNN and a ResNet-20, and the digits with a CNN (test accuracy, %); a small GPT on",
        "Python's source text (bits per byte, less is better). 1:16, mean ± standard deviation over seeds. FLOPs of",
        "training the whole network, counted, not executed. *Ahead*: how much better under the same seeds, ± half the 95 %",
        f"interval of the mean (Student's t); bold where it leaves out 0. On {hardware}.",
        "",
        *headline(rows, "1:16"),
        "",
        command,
        "",
        "All patterns and tasks, longer runs, what each part of the method gives, and what did not work:",
        "[results](docs/results.md).",
    ]
    fill(ROOT / "README.md", "study", "\n".join(text))

    fill(ROOT / "docs" / "results.md", "lead", "\n".join(lead(rows)))
    fill(ROOT / "docs" / "results.md", "equal", "\n".join(equal(rows)))
    text = [f"Measured on {hardware}.", "", "![quality against training FLOPs](../benchmarks/accuracy/results.png)", ""]
    for pattern in [pattern for pattern in MARKERS if pattern]:
        text += [f"### {pattern}", "", *headline(rows, pattern), "", over_sparse_layers(pattern), ""]
    fill(ROOT / "docs" / "results.md", "headline", "\n".join([*text, command]))
    text = [
        "![quality of ever longer runs against training FLOPs](../benchmarks/accuracy/longer.png)",
        "",
        *longer(rows),
        "",
        "```\npython -m benchmarks.accuracy.study longer\npython -m benchmarks.accuracy.publish\n```",
    ]
    fill(ROOT / "docs" / "results.md", "longer", "\n".join(text))
    fill(ROOT / "docs" / "results.md", "ablation", "\n".join(ablation(rows, "bame")))
    fill(ROOT / "docs" / "results.md", "first-ablation", "\n".join(ablation(rows, "bame_blocks")))
    fill(ROOT / "docs" / "results.md", "predictor", "\n".join(predictor()))
    _recipes(rows, hardware)


def headline(rows: list[Row], pattern: str) -> list[str]:
    """A row for each task and method: quality, by how much it is ahead of SR-STE, loss, FLOPs."""
    lines = [
        "| task | method | seeds | quality | ahead of SR-STE | training loss | FLOPs / dense | SR-STE costs |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for task in TASKS:
        groups = _groups([row for row in rows if row["recipe"] == task and not row["variant"]])
        base = groups.get((pattern, "sr_ste"), [])
        for method, title in METHODS.items():
            group = groups.get(("" if method == "dense" else pattern, method), [])
            if not group or not any(groups.get((pattern, version)) for version in ("bame", "bame_blocks")):
                continue
            against = _ahead(group, base) if method not in ("sr_ste", "dense") else ""
            flops = statistics.mean(float(row["train_vs_sr_ste"]) for row in group)
            cells = [
                *(task, title, str(len(group)), quality_spread(group), against),
                spread([float(row["train_loss"]) for row in group], 4),
                f"{statistics.mean(float(row['train_vs_dense']) for row in group):.3f}",
                f"{1 / flops:.2f}x" if method != "dense" else "",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def lead(rows: list[Row]) -> list[str]:
    """By how much BAME is ahead of each rival, seed by seed, with the 95 % interval of the mean by Student's t."""
    rivals = ("sr_ste", "rigl", "static", "bame_blocks")
    lines = [
        f"| task | N:M | {' | '.join(f'ahead of {METHODS[rival]}' for rival in rivals)} | SR-STE costs |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for task in TASKS:
        groups = _groups([row for row in rows if row["recipe"] == task and not row["variant"]])
        for pattern in [pattern for pattern in MARKERS if groups.get((pattern, "bame"))]:
            own = groups[pattern, "bame"]
            cost = 1 / statistics.mean(float(row["train_vs_sr_ste"]) for row in own)
            ahead = [_ahead(own, groups.get((pattern, rival), [])) for rival in rivals]
            lines.append(f"| {task} | {pattern} | {' | '.join(ahead)} | {cost:.2f}x |")
    return lines


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


def _ahead(own: list[Row], rivals: list[Row]) -> str:
    """Mean gain in quality over rivals of the same seeds ± half its 95 % interval; bold if that leaves out 0."""
    gains = [gain(row, rival) for row, rival in same_seeds(own, rivals)]
    if not gains:
        return ""
    mean, places = statistics.mean(gains), decimals(own[0])
    if len(gains) == 1:
        return f"{mean:+.{places}f}"
    half = student.ppf(0.975, len(gains) - 1) * statistics.stdev(gains) / math.sqrt(len(gains))
    text = f"{mean:+.{places}f} ± {half:.{places}f}"
    return f"**{text}**" if abs(mean) > half else text


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


def over_sparse_layers(pattern: str) -> str:
    """How many times SR-STE's training FLOPs exceed BAME's and a static mask's, over the N:M layers alone, by the defaults."""
    default, schedule = Evidence(), Schedule()
    assert isinstance(schedule.stop, float)
    read = schedule.stop * (1 / default.read_every + (1 - 1 / default.read_every) * default.contenders)
    density = NMPattern.parse(pattern).density
    base, bame, static = (
        shares.forward + shares.input_gradient + shares.weight_gradient
        for shares in (SR_STE.shares(density), BAME.cost.shares(density, read), Masked.cost.shares(density))
    )
    return (
        f"Over the N:M layers alone SR-STE costs {base / bame:.2f}x the training FLOPs of BAME; of a static mask, the bound, "
        f"{base / static:.2f}x."
    )


def ablation(rows: list[Row], method: str) -> list[str]:
    """A version of BAME with one part changed, beside itself under the same seeds; the lowest training loss first."""
    lines = [
        "| task | N:M | changed | seeds | quality | ahead of the default | training loss | swaps a block | FLOPs / SR-STE |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for task, pattern in [(task, pattern) for task in TASKS for pattern in MARKERS if pattern]:
        chosen = [row for row in rows if row["recipe"] == task and row["pattern"] == pattern]
        lengths = ("", *LONGER, AS_COSTLY)
        changed = [row for row in chosen if row["method"] == method and row["variant"] not in lengths]
        changed += [row for row in chosen if row["method"] == "bame_one_batch"]
        default = [row for row in chosen if row["method"] == method and not row["variant"]]
        groups: dict[str, list[Row]] = {}
        for row in changed:
            groups.setdefault(row["variant"] or "one batch, the literal criterion", []).append(row)
        ranked = sorted(groups.items(), key=lambda item: statistics.mean(float(row["train_loss"]) for row in item[1]))
        for name, group in [("**nothing: the default**", default), *ranked] if changed and default else []:
            ahead = _ahead(group, default)
            if not ahead:
                continue  # the default has not been measured with these seeds yet
            cells = [
                *(task, pattern, name, str(len(group)), quality_spread(group)),
                ahead if group is not default else "",
                spread([float(row["train_loss"]) for row in group], 4),
                f"{statistics.mean(float(row['flips_per_block']) for row in group):.2f}",
                f"{statistics.mean(float(row['train_vs_sr_ste']) for row in group):.3f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines if len(lines) > 2 else ["Not measured yet: `python -m benchmarks.accuracy.study ablation`."]


def predictor() -> list[str]:
    """The table of `predictor.py`, as it is."""
    with PREDICTOR.open() as file:
        rows = list(csv.DictReader(file))
    head = [name.replace("_", " ") for name in rows[0]]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return lines + [f"| {' | '.join(value.replace('_', ' ') for value in row.values())} |" for row in rows]


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
