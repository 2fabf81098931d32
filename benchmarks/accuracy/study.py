"""Does the evolution win? Train recipes with several methods, patterns and seeds; write a CSV and tables.

    python -m benchmarks.accuracy.study headline          # the cells of a suite that have no row yet
    python -m benchmarks.accuracy.study ablation --jobs 1

Each cell is one run of `bame-train` in a process of its own, on one thread. Its row is appended to `study.csv` when it
ends, so that an interrupted study goes on where it stopped. `study.md` is written from the rows. What a run prints is in
its folder, `output.txt`.
"""

from __future__ import annotations

import argparse
import csv
import functools
import json
import math
import multiprocessing
import os
import platform
import re
import runpy
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import torch
from omegaconf import OmegaConf

HERE = Path(__file__).parent
CSV, TABLE = HERE / "study.csv", HERE / "study.md"
RECIPES = HERE.parents[1] / "recipes"
COLUMNS = (
    *("recipe", "pattern", "method", "variant", "seed", "test_accuracy", "test_bits_per_byte", "train_loss"),
    *("train_vs_dense", "train_vs_sr_ste", "flips_per_block", "frozen_fraction"),
    *("epochs", "steps", "wall_seconds", "torch", "hardware"),
)
OUTPUT = "output.txt"
Row = dict[str, str]

# Importing torch and Lightning takes as long as an epoch of the MLP: every run forks off a server that has done so.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["bame_lightning.cli.train", "lightning", "torch"])


def _attempt(kind: str) -> str:
    return f"method.evidence._target_={__package__}.attempts.{kind}"


VARIANTS = {
    "no margin": ["method.evidence.margin=0.0"],
    "any number of blocks a row": ["method.evidence.one_per_row=false"],
    "gradients not averaged": ["method.evidence.momentum=0.0"],
    "gradients averaged shorter, smaller step": ["method.evidence.momentum=0.9", "method.evidence.step_size=1.0"],
    "evidence from zero": ["method.evidence.init=zero"],
    "two thirds of the step": ["method.evidence.step_size=1.0"],
    "twice the step": ["method.evidence.step_size=3.0"],
    "adapted every 10th step": ["method.schedule.every=10"],
    "2 % contend": ["method.evidence.contenders=0.02"],
    "10 % contend": ["method.evidence.contenders=0.1"],
    "30 % contend": ["method.evidence.contenders=0.3"],
    "read everywhere each 10th step": ["method.evidence.read_every=10"],
    "read everywhere each 40th step": ["method.evidence.read_every=40"],
    "stopped at half": ["method.schedule.stop=0.5"],
    "not rescaled": ["method.rescale=false"],
}
"""The default with one part changed, as overrides of `bame-train`."""

ATTEMPTS = {
    "a contender in every block": "BlockContenders",
    "contenders at random": "RandomContenders",
    "contenders annealed from 10 %": "AnnealedContenders",
    "mean of contenders only": "MeanOfContenders",
    "swaps start at half": "HalfStart",
    "revived with the second moment of the pruned": "Heir",
}
"""What was tried beside: names in `attempts.py`."""
VARIANTS |= {name: [_attempt(kind)] for name, kind in ATTEMPTS.items()}

BOTH_WAYS = "both ways"
"""Variant of a method: its masks are 2:4 along the output dimension, too."""
OVERRIDES = VARIANTS | {BOTH_WAYS: ["method.both_ways=true"]}

LONGER = {"half as long again": 1.5, "twice the epochs": 2, "four times the epochs": 4}
"""Variants of any method: the epochs of the recipe times this, rounded down, with the same schedule over them."""
AS_COSTLY = "for the FLOPs of BAME"
"""Variant of a rival: as long as makes its training FLOPs of the whole network those of BAME for the epochs of the recipe."""


class Cell(NamedTuple):
    """One run; `variant` names one of `OVERRIDES` or `LONGER`, is `AS_COSTLY`, or empty."""

    recipe: str
    pattern: str
    method: str
    variant: str
    seed: str


def headline() -> Iterator[Cell]:
    """BAME against what it has to beat, and against its first version, which read blocks (measured with that code)."""
    methods = ("bame", "sr_ste", "static", "rigl")
    mlp, cnn, gpt = "fashion_mnist_mlp", "fashion_mnist_cnn", "python_source_gpt"
    for recipe, seeds in ((mlp, 5), (cnn, 5), (gpt, 3)):
        yield from _grid(recipe, ["1:16"], methods, seeds)
        yield from _grid(recipe, [""], ["dense"], seeds)
    for recipe in (mlp, cnn):
        yield from _grid(recipe, ["1:8", "1:4", "2:4"], methods, 3)
    yield from _grid(gpt, ["2:4"], methods, 3)
    yield from _grid("digits_cnn", ["1:16", "1:8", "1:4", "2:4"], methods, 10)
    yield from _grid("digits_cnn", [""], ["dense"], 10)
    yield from _grid("fashion_mnist_resnet20", ["1:16", "2:4"], methods, 3)


def equal() -> Iterator[Cell]:
    """What rivals make of BAME's training FLOPs; needs the headline's rows of all of them."""
    for recipe, seeds in (("fashion_mnist_mlp", 5), ("fashion_mnist_cnn", 5), ("python_source_gpt", 3)):
        for seed in range(seeds):
            yield from (Cell(recipe, "1:16", method, AS_COSTLY, str(seed)) for method in ("static", "rigl"))


def ablation() -> Iterator[Cell]:
    """Each part of the default changed in turn, and the literal criterion."""
    for recipe in ("fashion_mnist_mlp", "fashion_mnist_cnn"):
        # Seed by seed, so that an unfinished study compares all parts alike.
        for seed in range(3):
            yield from (Cell(recipe, "1:16", "bame", variant, str(seed)) for variant in VARIANTS)
            yield Cell(recipe, "1:16", "bame_one_batch", "", str(seed))


def longer() -> Iterator[Cell]:
    """What a method makes of more training FLOPs."""
    for recipe, seeds in (("fashion_mnist_mlp", 5), ("fashion_mnist_cnn", 5), ("python_source_gpt", 3)):
        for seed in range(seeds):
            for variant, factor in LONGER.items():
                rivals = {2: ("static", "rigl", "sr_ste"), 4: ("static", "rigl")}.get(factor, ())
                yield from (Cell(recipe, "1:16", method, variant, str(seed)) for method in ("bame", *rivals))


def both_ways() -> Iterator[Cell]:
    """What masks cost in accuracy that are 2:4 along the output dimension, too, beside transposable ones."""
    for recipe, seeds in (("fashion_mnist_mlp", 3), ("python_source_gpt", 1)):
        for seed in range(seeds):
            for pattern in ("1:16", "1:8", "1:4", "2:4"):
                for method, variant in (("bame", BOTH_WAYS), ("transposable", ""), ("bame", "")):
                    yield Cell(recipe, pattern, method, variant, str(seed))


def _grid(recipe: str, patterns: Sequence[str], methods: Sequence[str], seeds: int) -> Iterator[Cell]:
    for pattern in patterns:
        for seed in range(seeds):
            yield from (Cell(recipe, pattern, method, "", str(seed)) for method in methods)


SUITES = {"headline": headline, "equal": equal, "longer": longer, "ablation": ablation, "both_ways": both_ways}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="*", help=f"of {', '.join(SUITES)}; none only writes the tables")
    parser.add_argument("--recipes", nargs="+", help="only these")
    parser.add_argument("--methods", nargs="+", help="only these")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, each on one thread")
    args = parser.parse_args()
    done = {Cell(*(row[name] for name in Cell._fields)) for row in read_rows()}
    cells = [cell for suite in args.suites for cell in SUITES[suite]()]
    asked = [cell for cell in cells if cell.recipe in (args.recipes or [cell.recipe])]
    todo = [cell for cell in asked if cell not in done and cell.method in (args.methods or [cell.method])]
    with ThreadPoolExecutor(args.jobs) as pool:
        for future in as_completed(pool.submit(run, cell) for cell in todo):
            if future.exception():
                pool.shutdown(wait=False, cancel_futures=True)
            append(row := future.result())
            print(*(row[name] for name in COLUMNS[:10]), flush=True)
    TABLE.write_text(table(read_rows()))


def run(cell: Cell) -> Row:
    # Hydra takes commas and quotes for something else.
    folder = Path("outputs/study") / re.sub(r"[^\w.-]+", "_", "-".join(cell).replace(":", "of"))
    arguments = [
        f"recipe={cell.recipe}",
        f"method={cell.method}",
        f"seed={cell.seed}",
        *OVERRIDES.get(cell.variant, []),
    ]
    arguments += [f"pattern={cell.pattern}"] if cell.pattern else []
    if cell.variant in LONGER:
        arguments.append(f"trainer.max_epochs={int(LONGER[cell.variant] * recipe_epochs(cell.recipe))}")
    if cell.variant == AS_COSTLY:
        arguments += stretched(cell.recipe, cost(cell._replace(method="bame")) / cost(cell))
    arguments += ["threads=1", "quiet=true", f"hydra.run.dir={folder}"]
    process = PROCESSES.Process(target=_train, args=(arguments, folder / OUTPUT))
    process.start()
    process.join()
    if process.exitcode:
        printed = (folder / OUTPUT).read_text()
        raise RuntimeError(f"bame-train {' '.join(arguments)} failed:\n{printed[-2000:]}")
    summary = json.loads((folder / "summary.json").read_text())
    sparse, blocks = summary.get("sparse", {}), sum(layer["blocks"] for layer in summary.get("layers", []))
    found = {
        **cell._asdict(),
        **{name: f"{summary['flops'][f'flops/{name}']:.4f}" for name in ("train_vs_dense", "train_vs_sr_ste")},
        "flips_per_block": f"{sparse['flips'] / 2 / blocks:.3f}" if "flips" in sparse else "",
        "frozen_fraction": f"{sparse['frozen_fraction']:.4f}" if "frozen_fraction" in sparse else "",
        "torch": torch.__version__,
        "hardware": f"{processor()}, one thread",
    }
    row = {name: found.get(name, summary.get(name)) for name in COLUMNS}
    return {name: "" if value is None else str(value) for name, value in row.items()}


def cost(cell: Cell) -> float:
    """Training FLOPs of a method for the epochs of the recipe, as a share of dense training's: mean over the seeds measured."""
    same = [row for row in read_rows() if (*(row[name] for name in Cell._fields[:4]),) == (*cell[:3], "")]
    return statistics.mean(float(row["train_vs_dense"]) for row in same)


def stretched(recipe: str, factor: float) -> list[str]:
    """Overrides that make a run `factor` times as long as its recipe: whole epochs, each cut short alike."""
    epochs = factor * recipe_epochs(recipe)
    whole = math.ceil(epochs)
    limit = OmegaConf.load(RECIPES / f"{recipe}.yaml").trainer.get("limit_train_batches", 1.0)
    cut = round(limit * epochs / whole) if isinstance(limit, int) else limit * epochs / whole
    return [f"trainer.max_epochs={whole}", f"++trainer.limit_train_batches={cut}"]


@functools.cache
def recipe_epochs(recipe: str) -> int:
    """Epochs that a recipe trains."""
    return int(OmegaConf.load(RECIPES / f"{recipe}.yaml").trainer.max_epochs)


def _train(arguments: list[str], output: Path) -> None:
    """Be `bame-train` in a process of its own."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("w") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    sys.argv = ["bame-train", *arguments]
    runpy.run_module("bame_lightning.cli.train", run_name="__main__")


def processor() -> str:
    names = Path("/proc/cpuinfo")
    if names.exists():
        return next(line.split(": ")[1] for line in names.read_text().splitlines() if line.startswith("model name"))
    return platform.processor()


def read_rows() -> list[Row]:
    if not CSV.exists():
        return []
    with CSV.open() as file:
        return list(csv.DictReader(file))


def append(row: Row) -> None:
    new = not CSV.exists()
    with CSV.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerow(row)


def table(rows: list[Row]) -> str:
    groups: dict[tuple[str, str, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["recipe"], row["pattern"], row["method"], row["variant"]].append(row)
    lines = [
        "# Measured: the methods, and the parts of the default",
        "",
        "Written by `python -m benchmarks.accuracy.study` from `study.csv`: mean ± standard deviation over seeds. Quality is",
        "test accuracy in percent (more is better), or test bits per byte for `python_source_gpt` (less is better); loss is",
        "the mean training loss of the last epoch; FLOPs are those of training the whole network, counted, not executed, as",
        "multiples of SR-STE's. The last column counts the seeds in which both loss and quality beat SR-STE, and the static",
        "mask, of the same recipe, pattern and seed.",
        "",
        "| recipe | pattern | method | seeds | quality | loss | FLOPs | swaps a block | frozen | beats SR-STE, static |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (recipe, pattern, method, variant), group in sorted(groups.items()):
        rivals = (
            _wins(group, groups.get((recipe, pattern, rival, ""), [])) if rival != method else ""
            for rival in ("sr_ste", "static")
        )
        cells = [
            *(recipe, pattern or "dense", f"{method}, {variant}" if variant else method, str(len(group))),
            quality_spread(group),
            spread([float(row["train_loss"]) for row in group], 4),
            _mean(group, "train_vs_sr_ste", ".3f") if pattern else "",
            _mean(group, "flips_per_block", ".2f"),
            _mean(group, "frozen_fraction", ".1%"),
            ", ".join(filter(None, rivals)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    hardware = sorted({f"{row['hardware']}, torch {row['torch']}" for row in rows})
    return "\n".join([*lines, "", f"Hardware: {'; '.join(hardware)}.", ""])


def quality(row: Row) -> float:
    """Bits per byte of a language model, test accuracy in percent of a classifier."""
    return float(row["test_bits_per_byte"]) if row["test_bits_per_byte"] else 100 * float(row["test_accuracy"])


def decimals(row: Row) -> int:
    """Decimal places to show of a quality."""
    return 3 if row["test_bits_per_byte"] else 2


def quality_spread(group: list[Row]) -> str:
    """Mean and standard deviation of the quality of runs."""
    return spread([quality(row) for row in group], decimals(group[0]))


def gain(row: Row, rival: Row) -> float:
    """By how much the quality of a run is better than that of another."""
    difference = quality(row) - quality(rival)
    return -difference if row["test_bits_per_byte"] else difference


def same_seeds(group: list[Row], rivals: list[Row]) -> list[tuple[Row, Row]]:
    """Each run of a group beside the rival's of the same seed, where there is one."""
    by_seed = {row["seed"]: row for row in rivals}
    return [(row, by_seed[row["seed"]]) for row in group if row["seed"] in by_seed]


def _wins(group: list[Row], rivals: list[Row]) -> str:
    pairs = same_seeds(group, rivals)
    wins = sum(float(a["train_loss"]) < float(b["train_loss"]) and gain(a, b) > 0 for a, b in pairs)
    return f"{wins} of {len(pairs)}" if pairs else ""


def spread(values: list[float], places: int) -> str:
    deviation = f" ± {statistics.stdev(values):.{places}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{places}f}{deviation}"


def _mean(group: list[Row], column: str, form: str) -> str:
    values = [float(row[column]) for row in group if row[column]]
    return format(statistics.mean(values), form) if values else ""


if __name__ == "__main__":
    main()
