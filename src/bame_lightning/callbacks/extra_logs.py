"""Log more than scalars to loggers that take it: pictures, histograms, a run's configuration."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8
from torch import Tensor

from bame_lightning.callbacks.packages import known
from bame_lightning.weights.layers import LayerPlan

CONFIG = "nm_sparsity"
"""Key of a run's configuration at W&B that holds method, pattern and layers."""
_BINS = 64


def with_pictures(loggers: Iterable[Any]) -> list[Any]:
    """Find the loggers that take pictures."""
    return [logger for logger in loggers if isinstance(logger, known("loggers", "WandbLogger", "TensorBoardLogger"))]


def log_pictures(
    logger: Any,
    pictures: Mapping[str, UInt8[Tensor, "height width 3"]],
    counts: Mapping[str, Int[Tensor, " blocks"]],
    step: int,
) -> None:
    """Log pictures, and histograms of whole numbers.

    Args:
        logger: One of `with_pictures`.
        pictures: Red, green and blue, by key.
        counts: Numbers of at least 0 to make a histogram of, by key.
        step: What the logger calls the step.
    """
    if isinstance(logger, known("loggers", "TensorBoardLogger")):
        for key, picture in pictures.items():
            logger.experiment.add_image(key, picture.numpy(), step, dataformats="HWC")
        for key, values in counts.items():
            logger.experiment.add_histogram(key, values, step, bins=edges(int(values.max())))
    elif isinstance(logger, known("loggers", "WandbLogger")):
        import wandb  # where this logger is, it is installed

        media: dict[str, Any] = {key: wandb.Image(picture.numpy()) for key, picture in pictures.items()}
        for key, values in counts.items():
            histogram = np.histogram(values.numpy(), edges(int(values.max())))
            media[key] = wandb.Histogram(np_histogram=histogram)
        logger.log_metrics(media, step)


def edges(largest: int) -> list[float]:
    """Make the edges of at most 64 bins, each for equally many whole numbers, from 0 to a largest number.

    Example:
        >>> edges(2), edges(100)[:3]
        ([-0.5, 0.5, 1.5, 2.5], [-0.5, 1.5, 3.5])
    """
    width = -(-(largest + 1) // _BINS)
    return [first - 0.5 for first in range(0, largest + 1 + width, width)]


def record_config(loggers: Iterable[Any], method: str, pattern: str, plans: Sequence[LayerPlan]) -> None:
    """Enter method, pattern and the table of layers into the configuration of a run at W&B.

    Args:
        loggers: All loggers; only those of W&B are used.
        method: Name of the method.
        pattern: Default pattern.
        plans: For each weight, whether it is sparse, and why.
    """
    layers = {
        plan.name: {
            "kind": plan.kind,
            "shape": list(plan.weight.shape),
            "pattern": str(plan.pattern or "dense"),
            "blocks": plan.blocks,
            "reason": plan.reason,
        }
        for plan in plans
    }
    for logger in loggers:
        if isinstance(logger, known("loggers", "WandbLogger")):
            config = {CONFIG: {"method": method, "pattern": pattern, "layers": layers}}
            logger.experiment.config.update(config, allow_val_change=True)
