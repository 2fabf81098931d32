"""The common part of commands that answer a question about a model without training it."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import ceil
from typing import Any

from hydra.core.hydra_config import HydraConfig
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


def fill_counts(cfg: DictConfig, **defaults: int) -> None:
    """Fill in missing numbers: those of the chosen recipe, if it has them, else defaults.

    Args:
        cfg: The composed configuration, which is changed: `batch_size`, and `steps` if it is among the defaults.
        defaults: The numbers by name.

    Raises:
        ValueError: If a number is not whole, or less than 1.
    """
    recipe = _counts_of_recipe(cfg) if HydraConfig.get().runtime.choices.get("recipe") else {}
    for name, default in defaults.items():
        if cfg.get(name) is None:
            cfg[name] = recipe.get(name, default)
        if type(cfg[name]) is not int or cfg[name] < 1:
            raise ValueError(f"`{name}` must be a whole number of at least 1; got {cfg[name]}.")


def _counts_of_recipe(cfg: DictConfig) -> dict[str, int]:
    """The numbers that a recipe gives without reading data: an epoch has as many steps as its limit says."""
    found, trainer = {}, cfg.trainer
    batches, accumulated = trainer.limit_train_batches, trainer.accumulate_grad_batches
    if cfg.get("data") and "batch_size" in cfg.data:
        found["batch_size"] = cfg.data.batch_size * accumulated
    if trainer.max_steps > 0:
        found["steps"] = trainer.max_steps
    elif type(batches) is int and trainer.max_epochs is not None:
        found["steps"] = trainer.max_epochs * ceil(batches / accumulated)
    return found


def layer_rules(cfg: DictConfig) -> dict[str, Any]:
    """The rules that override the default choice of layers."""
    rules = cfg.sparsity.layers or {}
    return {str(glob): rules[glob] for glob in rules}
