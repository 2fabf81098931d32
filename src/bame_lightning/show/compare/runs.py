"""The runs below a folder: the results of finished runs, and which runs did not finish."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from bame_lightning.show.find_runs import ERROR, SUMMARY, flatten, read_error, read_summary


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
        CompareError: If the folder does not exist or holds no finished run.
    """
    if not folder.is_dir():
        raise CompareError(f"`SWEEP_DIR` must be a folder of runs; {folder} is none.")
    runs, notes = list[Run](), list[str]()
    for place in sorted(_run_folders(folder), key=_by_number):
        name = str(place.relative_to(folder))
        summary = read_summary(place)
        if summary is None:
            error = read_error(place)
            notes.append(f"failed: {name}: {error}" if error is not None else f"unfinished: {name}{_overrides(place)}")
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
    files = [*folder.rglob(SUMMARY), *folder.rglob(ERROR)]
    started = [path.parent for path in folder.rglob(".hydra/overrides.yaml")]
    return {path.parent for path in files} | {path.parent for path in started}


def _by_number(folder: Path) -> list[tuple[bool, int, str]]:
    return [(part.isdigit(), int(part), "") if part.isdigit() else (False, 0, part) for part in folder.parts]


def _overrides(folder: Path) -> str:
    path = folder / ".hydra" / "overrides.yaml"
    overrides = [str(item) for item in OmegaConf.load(path)] if path.is_file() else []
    return f": {' '.join(overrides)}" if overrides else ""
