"""The common part of commands that answer a question about a model without training it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import ceil
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from bame_lightning.blocks.pattern import NMPattern
from bame_lightning.cli.command import loading
from bame_lightning.cli.errors import one_line_errors
from bame_lightning.cli.values import check_values


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


@contextmanager
def prepared(cfg: DictConfig, name: str, heavy: str, **counts: int) -> Iterator[None]:
    """Check a configuration and fill in its numbers, before anything heavy is imported; errors become one line.

    Args:
        cfg: The composed configuration, which is changed.
        name: Name of the command.
        heavy: What it imports then.
        **counts: Its numbers, and what they are where neither the command line nor a recipe says them.

    Yields:
        Nothing.
    """
    with one_line_errors(name):
        NMPattern.parse(cfg.pattern)
        check_values(cfg)
        _fill_counts(cfg, counts)
        loading(name, heavy)
        yield


def _fill_counts(cfg: DictConfig, defaults: Mapping[str, int]) -> None:
    """Put numbers where the configuration has none: those of the recipe, if one is chosen and says them, else defaults."""
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
