"""Lightning's classes under both names of the package: `lightning` and `pytorch_lightning`."""

from __future__ import annotations

import sys
from typing import Any

import lightning as L

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def known(module: str, *names: str) -> tuple[Any, ...]:
    """Find classes of these names in every package that is imported and has them.

    Call this late: `pytorch_lightning` may be imported after this module.

    Example:
        >>> [found.__module__.partition(".")[0] for found in known("callbacks", "StochasticWeightAveraging")][0]
        'lightning'
    """
    modules = [sys.modules.get(f"{package}.{module}") for package in _PACKAGES]
    return tuple(getattr(found, name) for found in modules for name in names if hasattr(found, name))


def averaging_callbacks() -> tuple[Any, ...]:
    """Callbacks that average weights; `WeightAveraging` came with Lightning 2.6."""
    return known("callbacks", "StochasticWeightAveraging", "WeightAveraging")


def accumulation_schedulers(trainer: L.Trainer) -> list[Any]:
    """The callbacks of a Trainer that change how many batches a step accumulates."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return [found for found in callbacks if isinstance(found, known("callbacks", "GradientAccumulationScheduler"))]
