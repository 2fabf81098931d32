"""The files that a run leaves in its folder, as plain values."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

SUMMARY = "summary.json"
OVERRIDES = ".hydra/overrides.yaml"
ERROR = "error.txt"  # of a failed job of a sweep: the message in its first line, then the traceback


def read_summary(folder: Path) -> dict[str, Any] | None:
    """Read the summary of a run.

    Args:
        folder: The run's folder.

    Returns:
        The summary; None if the run has not ended, or its summary cannot be read.
    """
    try:
        summary = json.loads((folder / SUMMARY).read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return summary if isinstance(summary, dict) else None


def read_error(folder: Path) -> str | None:
    """Read why a job of a sweep failed.

    Args:
        folder: The job's folder.

    Returns:
        One line; None if the job did not fail.
    """
    path = folder / ERROR
    return next(iter(path.read_text().splitlines()), "") if path.is_file() else None


def read_overrides(folder: Path) -> list[str]:
    """Read what followed the command that began a run, as Hydra keeps it; nothing where it keeps none."""
    path = folder / OVERRIDES
    return [str(word) for word in OmegaConf.load(path)] if path.is_file() else []


def strict_json(value: Any) -> Any:
    """Make a value that every JSON reader accepts: a number that is not finite becomes None.

    Args:
        value: Mappings, lists, tuples, strings, numbers, booleans and None, nested.

    Returns:
        The value that reading the written JSON gives.

    Example:
        >>> strict_json({"loss": float("nan"), 1: (2, "a")})
        {'loss': None, '1': [2, 'a']}
    """
    if isinstance(value, Mapping):
        return {str(key): strict_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """Name the leaves of a nested configuration as an override would.

    Args:
        config: Nested mappings.

    Returns:
        Values by dotted key.

    Example:
        >>> flatten({"seed": 0, "optimizer": {"lr": 0.1, "betas": [0.9, 0.99]}, "method": {}})
        {'seed': 0, 'optimizer.lr': 0.1, 'optimizer.betas': [0.9, 0.99], 'method': {}}
    """
    leaves: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            leaves |= {f"{key}.{name}": leaf for name, leaf in flatten(value).items()}
        else:
            leaves[str(key)] = value
    return leaves
