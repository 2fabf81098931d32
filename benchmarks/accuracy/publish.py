"""Write measured results where people read them: docs/results.md, recipes/README.md and the header of each recipe.

    python -m benchmarks.accuracy.publish

Everything comes from `study.csv` and `predictor.csv`; nothing is typed in by hand.
"""

from __future__ import annotations

import csv
import re
import statistics
from collections.abc import Mapping
from pathlib import Path

from bame_lightning import Evidence, Schedule
from bame_lightning.blocks.pattern import NMPattern
from bame_lightning.ledger.cost import SR_STE, Shares
from bame_lightning.methods.bame import BAME
from bame_lightning.methods.masked import Masked
from benchmarks.accuracy.figures import draw, draw_longer, draw_overview
from benchmarks.accuracy.groups import METHODS, PATTERNS, TASKS, ahead, by_method, half_interval, lengths, spent, unit
from benchmarks.accuracy.predictor import CSV as PREDICTOR
from benchmarks.accuracy.study import (
    AS_COSTLY,
    BOTH_WAYS,
    TABLE,
    Row,
    decimals,
    gain,
    quality,
    quality_spread,
    read_rows,
    same_seeds,
    table,
)
from benchmarks.documents import fill

ROOT = Path(__file__).parents[2]
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
COMPARED = ("bame", "sr_ste", "static", "rigl")


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
    fill(results, "headline", "\n".join([*tasks(rows), "", *headline(rows), "", f"Hardware: {hardware}."]))
    fill(results, "layers", "\n".join(over_sparse_layers()))
    fill(results, "both ways", "\n".join(both_ways(rows)))
    # On the digits the seeds tell no difference between lengths.
    fill(results, "longer", "\n".join(longer([row for row in rows if row["recipe"] != "digits_cnn"])))
    fill(results, "ablation", "\n".join(ablation(rows)))
    fill(results, "predictor", "\n".join(predictor()))
    fill(ROOT / "recipes" / "README.md", "recipes", "\n".join(recipes(rows)))


def findings(rows: list[Row]) -> list[str]:
    """What the tables say, in sentences: the default at 1:16 on each task, at equal FLOPs, and what its parts give."""
    lines = []
    for task, (name, _) in TASKS.items():
        runs = [row for row in rows if row["recipe"] == task]
        groups = by_method([row for row in runs if not row["variant"]])
        own, base = groups.get(("1:16", "bame"), []), groups.get(("1:16", "sr_ste"), [])
        if not own or not base:
            continue
        cost = 1 / statistics.mean(float(row["train_vs_sr_ste"]) for row in own)
        rivals = {method: groups.get(("1:16", method), []) for method in ("sr_ste", "rigl", "static")}
        lines.append(
            f"- **{name}**, {unit(task)}: BAME reaches {quality_spread(own)}, SR-STE {quality_spread(base)} at {cost:.2f} "
            f"times the training FLOPs. BAME is {_verdicts(own, rivals)}."
        )
        costly = by_method([row for row in runs if row["variant"] == AS_COSTLY])
        if beside := {method: group for (pattern, method), group in costly.items() if pattern == "1:16"}:
            lines[-1] += f" At equal FLOPs it is {_verdicts(own, beside)}."
    lines += _both_ways_finding(rows)
    changes = _changes(rows, MLP)
    if changes:
        name, gains = min(changes.items(), key=lambda item: statistics.mean(item[1]))
        of = "" if _version(rows, name) == "bame" else ", of the first version"
        lines.append(
            f"- **The costliest change** on the MLP{of}: {MATTER[name]}. Accuracy is then {-statistics.mean(gains):.2f} "
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
        mean, half = statistics.mean(gains), half_interval(gains)
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


def headline(rows: list[Row]) -> list[str]:
    """Quality by task, pattern and method where rivals were measured, by how much BAME is ahead, and what each method costs."""
    lines = [
        f"| task | seeds | {' | '.join(METHODS[method] for method in COMPARED)} | ahead of SR-STE | FLOPs, % of dense |",
        "|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for task, (name, _) in TASKS.items():
        groups = by_method([row for row in rows if row["recipe"] == task and not row["variant"]])
        for pattern in PATTERNS:
            found = [groups.get((pattern, method), []) for method in COMPARED]
            if found[0] and any(found[1:]):
                seeds = "-".join(map(str, sorted({len(group) for group in found if group})))
                costs = "/".join(_percent_of_dense(group) for group in found)
                cells = [f"{name} {pattern}", seeds, *map(_quality, found), ahead(found[0], found[1]), costs]
                lines.append(f"| {' | '.join(cells)} |")
    return lines


def tasks(rows: list[Row]) -> list[str]:
    """What is trained for how long, and what dense training reaches."""
    lines = []
    for task, (name, title) in TASKS.items():
        dense = [row for row in rows if row["recipe"] == task and row["method"] == "dense"]
        reached = f"; dense training reaches {quality_spread(dense)}" if dense else ""
        lines.append(f"- **{name}**: {title}{reached}.")
    return lines


def _quality(group: list[Row]) -> str:
    return quality_spread(group) if group else ""


def _mean(group: list[Row]) -> str:
    return f"{statistics.mean(quality(row) for row in group):.{decimals(group[0])}f}"


def _percent_of_dense(group: list[Row]) -> str:
    return f"{100 * statistics.mean(float(row['train_vs_dense']) for row in group):.0f}" if group else "-"


def equal(rows: list[Row]) -> list[str]:
    """BAME beside rivals that trained as long as makes their FLOPs of the whole network the same."""
    lines = [
        "| 1:16 | BAME | static mask | its steps | BAME is ahead by | RigL | its steps | BAME is ahead by |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for task, (name, _) in TASKS.items():
        runs = [row for row in rows if row["recipe"] == task and row["pattern"] == "1:16"]
        own = [row for row in runs if row["method"] == "bame" and not row["variant"]]
        rivals = by_method([row for row in runs if row["variant"] == AS_COSTLY])
        if not own or not rivals:
            continue
        cells = [name, quality_spread(own)]
        for method in ("static", "rigl"):
            group = rivals.get(("1:16", method), [])
            times = f"{int(group[0]['steps']) / int(own[0]['steps']):.2f}x" if group else ""
            cells += [_quality(group), times, ahead(own, group)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines if len(lines) > 2 else ["Not measured yet: `python -m benchmarks.accuracy.study equal`."]


def both_ways(rows: list[Row]) -> list[str]:
    """BAME with masks that are 2:4 along the output dimension, too, and transposable masks, each beside plain BAME."""
    lines = [
        "| task | seeds | BAME | both ways | ahead of BAME by | transposable | ahead of BAME by |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for task, pattern in [(task, pattern) for task in TASKS for pattern in PATTERNS]:
        plain, both, rival = _for_tensor_cores(rows, task, pattern)
        if plain and both:
            cells = [f"{TASKS[task][0]} {pattern}", str(len(both)), *map(_quality, (plain, both)), ahead(both, plain)]
            cells += [_quality(rival), ahead(rival, plain)]
            lines.append(f"| {' | '.join(cells)} |")
    return lines if len(lines) > 2 else ["Not measured yet: `python -m benchmarks.accuracy.study both_ways`."]


def _both_ways_finding(rows: list[Row]) -> list[str]:
    """Where the seeds of the MLP tell that masks for sparse tensor cores lose to BAME's, as a sentence."""
    losses: dict[str, list[str]] = {"masks 2:4 [both ways](#both-ways)": [], "transposable masks": []}
    for pattern in PATTERNS:
        plain, *others = _for_tensor_cores(rows, MLP, pattern)
        for lost, group in zip(losses.values(), others, strict=True):
            gains = [gain(*pair) for pair in same_seeds(group, plain)]
            if len(gains) < 2:
                return []
            if statistics.mean(gains) < -half_interval(gains):
                lost.append(f"{-statistics.mean(gains):.2f} points at {pattern}")
    told = [f"{kind} lose {', '.join(lost) or 'nothing that the seeds tell'}" for kind, lost in losses.items()]
    return [f"- **For sparse tensor cores** (MLP): {'; '.join(told)}."]


def _for_tensor_cores(rows: list[Row], task: str, pattern: str) -> list[list[Row]]:
    """Runs of BAME, of BAME with `both_ways`, and of transposable masks."""
    runs = [row for row in rows if row["recipe"] == task and row["pattern"] == pattern]
    kinds = (("bame", ""), ("bame", BOTH_WAYS), ("transposable", ""))
    return [[row for row in runs if (row["method"], row["variant"]) == kind] for kind in kinds]


def longer(rows: list[Row]) -> list[str]:
    """What the longest runs of rivals at 1:16 reach for their FLOPs, beside SR-STE of the recipe's length, as a finding."""
    told = []
    for task, (name, _) in TASKS.items():
        runs = [row for row in rows if row["recipe"] == task and row["pattern"] == "1:16"]
        rivals = {method: lengths(runs, method) for method in ("static", "rigl")}
        base = lengths(runs, "sr_ste").get(1)
        if not base or not all(len(found) > 1 for found in rivals.values()):
            continue
        longest = [(METHODS[method], *max(found.items())) for method, found in rivals.items()]
        cells = [
            f"{title} {_mean(group)} ({times:g}x, {spent(group):.2f})"
            for title, times, group in [*longest, (METHODS["sr_ste"], 1, base)]
        ]
        told.append(f"{name}: {', '.join(cells)}")
    if not told:
        return []
    return [
        "- **Longer runs** help every method; for their FLOPs they help those most that read least ([picture](#longer-runs)). "
        f"Quality, in brackets length and FLOPs beside the recipe's dense training: {'; '.join(told)}."
    ]


def over_sparse_layers() -> list[str]:
    """How many times SR-STE's training FLOPs exceed BAME's and a static mask's, over the N:M layers alone, by the defaults."""
    default, schedule = Evidence(), Schedule()
    assert isinstance(schedule.stop, float)
    read = schedule.stop * (1 / default.read_every + (1 - 1 / default.read_every) * default.contenders)
    lines = ["| SR-STE costs | 1:16 | 1:8 | 1:4 | 2:4 |", "|---|---:|---:|---:|---:|"]
    for name, shares in (
        ("BAME", lambda density: BAME.cost.shares(density, read)),
        ("a static mask", Masked.cost.shares),
    ):
        ratios = []
        for pattern in PATTERNS:
            density = NMPattern.parse(pattern).density
            ratios.append(_all(SR_STE.shares(density)) / _all(shares(density)))
        lines.append(f"| times {name} | {' | '.join(f'{ratio:.2f}x' for ratio in ratios)} |")
    return lines


def _all(shares: Shares) -> float:
    return shares.forward + shares.input_gradient + shares.weight_gradient


def ablation(rows: list[Row]) -> list[str]:
    """What BAME loses when a part of it is changed, under the same seeds: those of `MATTER` that cost most.

    Of the default as far as it was measured, else of the first version, which a dagger marks.
    """
    lines = ["| changed | ahead of unchanged, MLP | CNN |", "|---|---:|---:|"]
    found = _changes(rows, MLP)
    for name in sorted(found, key=lambda name: statistics.mean(found[name]))[:SHOWN]:
        mark = "" if _version(rows, name) == "bame" else "†"
        cells = [f"{MATTER[name]}{mark}", *(ahead(*_changed(rows, task, name)) for task in (MLP, "fashion_mnist_cnn"))]
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


def predictor() -> list[str]:
    """Of the runs of `predictor.py` that change masks as the default does, how well the logged prediction ranks."""
    with PREDICTOR.open() as file:
        rows = [row for row in csv.DictReader(file) if row["one_per_row"] == "True" and row["predicted"] == "logged"]
    found = {(row["every"], row["realised_on"], row["half_of_run"]): row for row in rows}
    columns = [(batch, half) for batch in ("same_batch", "next_batch") for half in ("first", "second")]
    lines = [
        f"| adapted every | {' | '.join(f'{batch}, {half} half'.replace('_', ' ') for batch, half in columns)} |",
        f"|---|{'---:|' * len(columns)}",
    ]
    for every in dict.fromkeys(row["every"] for row in rows):
        runs = [found[every, *column] for column in columns]
        cells = [f"{run['rank_correlation']} ({run['adaptations']})" for run in runs]
        lines.append(f"| {every} steps | {' | '.join(cells)} |")
    return lines


def recipes(rows: list[Row]) -> list[str]:
    """What each recipe reaches and how long it takes; writes that into the header of its file, too."""
    lines = ["| recipe | test accuracy, % (GPT: bits per byte) | seeds | minutes |", "|---|---:|---:|---:|"]
    others = []
    for path in sorted((ROOT / "recipes").glob("*.yaml")):
        runs = [row for row in rows if row["recipe"] == path.stem and not row["variant"]]
        group = by_method(runs).get(("1:16", "bame"))
        measured = "not measured"
        if group:
            # Runs shared the machine, and some were stopped for a while.
            minutes = f"{min(float(row['wall_seconds']) for row in group) / 60:.1f}"
            lines.append(f"| {path.stem} | {quality_spread(group)} | {len(group)} | {minutes} |")
            value = quality_spread(group)
            value = f"{value} bits per byte" if group[0]["test_bits_per_byte"] else f"test accuracy {value} %"
            measured = f"{value}, {len(group)} seeds, {minutes} minutes on {group[0]['hardware']}"
        else:
            others.append(path.stem)
        text = re.sub(r"^# Measured: .*$", f"# Measured: {measured}", path.read_text(), flags=re.MULTILINE)
        path.write_text(text)
    return [
        "BAME at 1:16: mean ± standard deviation over seeds, minutes of the quickest run on one thread of an "
        f"{rows[0]['hardware'].split(',')[0]}; `python -m benchmarks.accuracy.study headline`.",
        "",
        *lines,
        "",
        f"Not measured: {', '.join(others)}.",
    ]


if __name__ == "__main__":
    main()
