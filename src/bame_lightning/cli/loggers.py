"""Weights & Biases, usable without an account; imported only where a run logs there."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.loggers import Logger, WandbLogger

from bame_lightning.cli.account import logged_in
from bame_lightning.cli.sweeps import in_sweep, sweep_name, unescaped


def wandb_logger(*, silent: bool, **kwargs: Any) -> WandbLogger:
    """Make a W&B logger that works offline where nobody is logged in; `WANDB_MODE` decides where it is set.

    In a sweep, the group is by default the sweep and the name what sets this job apart.

    Args:
        silent: Whether W&B prints nothing.
        **kwargs: Arguments of `WandbLogger` and `wandb.init`.

    Returns:
        The logger.
    """
    import wandb

    if "WANDB_MODE" not in os.environ and not logged_in():
        kwargs["mode"] = "offline"
    if in_sweep():
        kwargs["group"] = kwargs.get("group") or sweep_name()
        kwargs["name"] = (
            kwargs.get("name") or unescaped(HydraConfig.get().job.override_dirname)[:128]
        )  # W&B takes no more
    logger = WandbLogger(settings=wandb.Settings(silent=silent), **kwargs)
    logger._wandb_init.pop("anonymous", None)  # has had no effect for long, and W&B warns of it even where it is None
    return logger


def finish_wandb(loggers: Iterable[Logger], summary: Mapping[str, Any] | None) -> None:
    """End the W&B run of a job, if it has one: in a sweep all jobs share a process, and the next would go on with it.

    Args:
        loggers: The job's loggers.
        summary: The results of the job, which become the summary of the W&B run; None if it failed.
    """
    found = [logger for logger in loggers if isinstance(logger, WandbLogger)]
    for logger in found:
        import wandb

        if summary is not None:
            logger.experiment.summary.update(wandb_summary(summary))
        wandb.finish(exit_code=int(summary is None))


def wandb_summary(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What of a run's results becomes its summary at W&B: plain numbers by key, FLOPs and ratios under the keys of the logs.

    Example:
        >>> wandb_summary({"test_accuracy": 0.9, "val_loss": None, "model": "mlp", "flops": {"flops/train_total": 8.0}})
        {'test_accuracy': 0.9, 'flops/train_total': 8.0}
    """
    parts = {**summary, **summary["flops"], **summary.get("sparse", {})}
    return {key: value for key, value in parts.items() if isinstance(value, int | float)}
