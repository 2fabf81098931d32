"""Does the evolution beat a frozen mask? Train recipes with several methods and seeds; write a CSV and a table.

    python -m benchmarks.accuracy.study                                   # the cells below that have no row yet
    python -m benchmarks.accuracy.study --recipes fashion_mnist_mlp --methods bame static --seeds 0 1 2

Each cell is one run of `bame-train` in a process of its own, on one thread. Its row is appended to `study.csv` when it
ends, so that an interrupted study goes on where it stopped. `study.md` is written from the rows.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import statistics
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch

HERE = Path(__file__).parent
CSV, TABLE = HERE / "study.csv", HERE / "study.md"
COLUMNS = (
    *("recipe", "pattern", "method", "seed", "test_accuracy", "train_loss", "flips_per_block", "frozen_fraction"),
    *("epochs", "steps", "wall_seconds", "torch", "hardware"),
)
Row = dict[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=["fashion_mnist_mlp", "fashion_mnist_cnn"])
    parser.add_argument("--patterns", nargs="+", default=["1:16"])
    parser.add_argument("--methods", nargs="+", default=["bame", "static", "dense"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, each on one thread")
    args = parser.parse_args()
    done = {(row["recipe"], row["pattern"], row["method"], row["seed"]) for row in read_rows()}
    cells = [
        (recipe, pattern if method != "dense" else "", method, str(seed))
        for recipe in args.recipes
        for pattern in args.patterns
        for seed in args.seeds
        for method in args.methods
    ]
    todo = [cell for cell in dict.fromkeys(cells) if cell not in done]
    with ThreadPoolExecutor(args.jobs) as pool:
        for future in as_completed(pool.submit(run, *cell) for cell in todo):
            append(row := future.result())
            print(*(row[name] for name in COLUMNS[:6]), flush=True)
    TABLE.write_text(table(read_rows()))


def run(recipe: str, pattern: str, method: str, seed: str) -> Row:
    folder = Path("outputs/study") / f"{recipe}-{pattern.replace(':', 'of')}-{method}-{seed}"
    command = [sys.executable, "-m", "bame_lightning.cli.train", f"recipe={recipe}", f"method={method}", f"seed={seed}"]
    command += [f"pattern={pattern}"] if pattern else []
    subprocess.run([*command, "threads=1", "quiet=true", f"hydra.run.dir={folder}"], check=True, capture_output=True)
    summary = json.loads((folder / "summary.json").read_text())
    sparse, blocks = summary.get("sparse", {}), sum(layer["blocks"] for layer in summary.get("layers", []))
    found = {
        "recipe": recipe,
        "pattern": pattern,
        "flips_per_block": f"{sparse['flips'] / 2 / blocks:.3f}" if "flips" in sparse else "",
        "frozen_fraction": f"{sparse['frozen_fraction']:.4f}" if "frozen_fraction" in sparse else "",
        "torch": torch.__version__,
        "hardware": f"{processor()}, one thread",
    }
    return {name: str(found.get(name, summary.get(name, ""))) for name in COLUMNS}


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
    groups: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["recipe"], row["pattern"], row["method"]].append(row)
    lines = [
        "# Accuracy against a static mask",
        "",
        "Written by `python -m benchmarks.accuracy.study` from `study.csv`. Test accuracy in percent and mean training loss",
        "of the last epoch: mean ± standard deviation over seeds. Swaps per block and frozen blocks: means. The last column",
        "counts the seeds in which both loss and accuracy beat the static mask of the same recipe, pattern and seed.",
        "",
        "| recipe | pattern | method | seeds | accuracy | loss | swaps a block | frozen | beats static |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (recipe, pattern, method), group in sorted(groups.items()):
        static = {row["seed"]: row for row in groups.get((recipe, pattern, "static"), [])}
        pairs = [(row, static[row["seed"]]) for row in group if row["seed"] in static]
        wins = sum(
            float(a["train_loss"]) < float(b["train_loss"]) and float(a["test_accuracy"]) > float(b["test_accuracy"])
            for a, b in pairs
        )
        cells = [
            *(recipe, pattern or "dense", method, str(len(group))),
            spread([100 * float(row["test_accuracy"]) for row in group], 2),
            spread([float(row["train_loss"]) for row in group], 4),
            mean(group, "flips_per_block", ".2f"),
            mean(group, "frozen_fraction", ".1%"),
            f"{wins} of {len(pairs)}" if pairs and method != "static" else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    hardware = sorted({f"{row['hardware']}, torch {row['torch']}" for row in rows})
    return "\n".join([*lines, "", f"Hardware: {'; '.join(hardware)}.", ""])


def spread(values: list[float], digits: int) -> str:
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def mean(group: list[Row], column: str, form: str) -> str:
    values = [float(row[column]) for row in group if row[column]]
    return format(statistics.mean(values), form) if values else ""


if __name__ == "__main__":
    main()
