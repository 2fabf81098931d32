"""What commands share that answer a question about a configured model, without training it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig


def tell(cfg: DictConfig, found: dict[str, Any], show: Callable[[dict[str, Any]], None]) -> None:
    """Print an answer.

    Args:
        cfg: The composed configuration; with `json` the answer is printed as such.
        found: The answer.
        show: Prints it for people.
    """
    if cfg.json:
        print(json.dumps(found, indent=2))
    else:
        show(found)


def check_counts(cfg: DictConfig, *names: str) -> None:
    """Refuse values that are no numbers of something.

    Args:
        cfg: The composed configuration.
        names: Which values.

    Raises:
        ValueError: If one is not a whole number, or less than 1.
    """
    for name in names:
        if not isinstance(cfg[name], int) or cfg[name] < 1:
            raise ValueError(f"`{name}` must be a whole number of at least 1; got {cfg[name]}.")


def layer_rules(cfg: DictConfig) -> dict[str, Any]:
    """The rules that override the default choice of layers."""
    rules = cfg.sparsity.layers or {}
    return {str(glob): rules[glob] for glob in rules}
