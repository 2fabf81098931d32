"""The runs below a folder: the results of finished runs, and which runs did not finish."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bame_lightning.show.find_runs import ERROR, OVERRIDES, SUMMARY, flatten, read_error, read_overrides, read_summary
from bame_lightning.show.numbers import in_order


class CompareError(ValueError):
    """Runs cannot be compared; the message says why, in one line."""


@dataclass(frozen=True)
class Run:
    """One finished run.

    Args:
        folder: Its folder, relative to the one that was searched.
        data: Option of the group `data`; likewise `model`, `recipe` and `method`.
        pattern: "N:M"; None for a dense network.
        seed: Seed of everything random.
        accuracy: Test accuracy, in [0, 1].
        bits_per_byte: Test bits per byte; None if the task is not language modelling.
        loss: Mean training loss of the last epoch.
        flops: Training FLOPs by metric key; empty if they were not counted.
        config: The rest of the configuration, by dotted key.
    """

    folder: str
    data: str
    model: str
    recipe: str | None
    pattern: str | None
    method: str
    seed: int
    accuracy: float
    bits_per_byte: float | None = None
    loss: float | None = None
    flops: Mapping[str, float] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)


def find_runs(folder: Path) -> tuple[list[Run], list[str]]:
    """Read all runs below a folder, also those of nested sweeps.

    Args:
        folder: Where to search.

    Returns:
        Finished runs in the order of their folders, and a line for each run that is not among them.

    Raises:
        CompareError: If the folder holds no finished run.
    """
    runs, notes = list[Run](), list[str]()
    for place in sorted(_run_folders(folder), key=lambda path: in_order(str(path))):
        name = str(place.relative_to(folder))
        summary = read_summary(place)
        if summary is None:
            error = read_error(place)
            told = f": {' '.join(words)}" if (words := read_overrides(place)) else ""
            notes.append(f"failed: {name}: {error}" if error is not None else f"unfinished: {name}{told}")
        elif not isinstance(summary.get("method"), str) or not isinstance(summary.get("seed"), int):
            notes.append(f"left out: {name}: its {SUMMARY} is not one of bame-train")
        elif summary.get("test_accuracy") is None:
            notes.append(f"left out: {name}: it has no test accuracy")
        else:
            runs.append(_run(name, summary))
    if not runs:
        told = f" ({'; '.join(notes)})" if notes else ""
        raise CompareError(
            f"{folder} holds no {SUMMARY} of a finished run{told}. Name the folder of one or of several."
        )
    return runs, notes


def _run(name: str, summary: Mapping[str, Any]) -> Run:
    config = flatten(summary.get("config", {}))
    # Dense runs of a sweep over patterns differ only in a value that they do not use.
    pattern = config.pop("pattern", None)
    return Run(
        folder=name,
        data=str(summary.get("data")),
        model=str(summary.get("model")),
        recipe=summary.get("recipe"),
        pattern=summary.get("pattern"),
        method=summary["method"],
        seed=summary["seed"],
        accuracy=float(summary["test_accuracy"]),
        bits_per_byte=summary.get("test_bits_per_byte"),
        loss=summary.get("train_loss"),
        flops={key: value for key, value in summary.get("flops", {}).items() if value is not None},
        config={key: "${pattern}" if value == pattern else value for key, value in config.items() if key != "seed"},
    )


def _run_folders(folder: Path) -> set[Path]:
    ended = {path.parent for name in (SUMMARY, ERROR) for path in folder.rglob(name)}
    return ended | {path.parents[1] for path in folder.rglob(OVERRIDES)}
