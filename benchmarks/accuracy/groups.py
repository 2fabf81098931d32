"""Rows of the study in groups: by pattern and method, by length of training, by change."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict

from scipy.stats import t as student  # type: ignore[import-untyped]

from benchmarks.accuracy.study import LONGER, Row, decimals, gain, recipe_epochs, same_seeds

TASKS = {
    "fashion_mnist_mlp": ("MLP", "784-512-512-10 on Fashion-MNIST, 6 epochs"),
    "fashion_mnist_cnn": ("CNN", "three convolutions on Fashion-MNIST, 5 epochs"),
    "fashion_mnist_resnet20": ("ResNet-20", "ResNet-20 on Fashion-MNIST, 3 epochs"),
    "python_source_gpt": ("GPT", "GPT on Python's standard library, 1,500 steps"),
    "digits_cnn": ("Digits", "a small CNN on scikit-learn's digits, 30 epochs"),
}
"""Recipes of the study: short name, and what is trained for how long."""
METHODS = {
    "bame": "BAME",
    "bame_blocks": "BAME, first version",
    "sr_ste": "SR-STE",
    "static": "static mask",
    "rigl": "RigL",
    "dense": "dense",
}
PATTERNS = ("1:16", "1:8", "1:4", "2:4")


def unit(task: str) -> str:
    return "bits per byte (less is better)" if task.startswith("python") else "test accuracy, %"


def by_method(rows: list[Row]) -> dict[tuple[str, str], list[Row]]:
    """Runs by pattern (none for dense ones) and method."""
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["pattern"], row["method"]].append(row)
    return dict(groups)


def lengths(rows: list[Row], method: str) -> dict[float, list[Row]]:
    """Runs of a method by length, in times the recipe's epochs."""
    groups: dict[float, list[Row]] = defaultdict(list)
    for row in rows:
        if row["method"] == method and row["variant"] in ("", *LONGER):
            groups[_times(row)].append(row)
    return dict(sorted(groups.items()))


def _times(row: Row) -> float:
    return int(row["epochs"]) / recipe_epochs(row["recipe"]) if row["variant"] in LONGER else 1


def spent(group: list[Row]) -> float:
    """Mean training FLOPs of runs, as a multiple of dense training for the recipe's epochs."""
    return statistics.mean(_times(row) * float(row["train_vs_dense"]) for row in group)


def ahead(own: list[Row], rivals: list[Row]) -> str:
    """Mean gain in quality over rivals of the same seeds ± half its 95 % interval; bold if that leaves out 0."""
    gains = [gain(row, rival) for row, rival in same_seeds(own, rivals)]
    if not gains:
        return ""
    mean, places = statistics.mean(gains), decimals(own[0])
    if len(gains) == 1:
        return f"{mean:+.{places}f}"
    half = half_interval(gains)
    text = f"{mean:+.{places}f} ± {half:.{places}f}"
    return f"**{text}**" if abs(mean) > half else text


def half_interval(gains: list[float]) -> float:
    """Half the 95 % interval of the mean, by Student's t."""
    return float(student.ppf(0.975, len(gains) - 1) * statistics.stdev(gains) / math.sqrt(len(gains)))
