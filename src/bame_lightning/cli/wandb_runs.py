"""Weights & Biases, usable without an account; imported only where a run logs there."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, WandbLogger
from typing_extensions import override

from bame_lightning.checkpoints.untrusted import load_untrusted
from bame_lightning.cli.account import base_url, check_reachable, logged_in
from bame_lightning.cli.claims import first_process
from bame_lightning.cli.sweeps import in_sweep, sweep_name, unescaped

_PROJECT = "bame-lightning"
_PATIENCE = 20  # seconds in which W&B must answer, unless WANDB_INIT_TIMEOUT is set; its own default is 90
_RUN = "wandb_run_id"
_ONLINE = ("online", "shared", "run")
_MODES = (*_ONLINE, "offline", "disabled", "dryrun")


def wandb_logger(*, silent: bool, resumed_from: str | None = None, **kwargs: Any) -> WandbLogger:
    """Make a W&B logger that works offline if nobody is logged in; `WANDB_MODE` decides if it is set.

    Project, entity, name and group that are not configured are those of the environment (`WANDB_PROJECT`, `WANDB_ENTITY`,
    `WANDB_NAME`, `WANDB_RUN_GROUP`). Else, in a sweep, the group is the sweep, and the name says what sets this job apart.

    Args:
        silent: Whether W&B prints nothing.
        resumed_from: Checkpoint whose W&B run goes on, except in jobs of a sweep that start from another run's checkpoint;
            None for a new run.
        **kwargs: Arguments of `WandbLogger` and `wandb.init`.

    Returns:
        The logger.

    Raises:
        ValueError: If `WANDB_MODE` is none of W&B's, or its server cannot be reached.
    """
    import wandb

    mode = os.environ.get("WANDB_MODE")
    if mode and mode not in _MODES:
        raise ValueError(f"WANDB_MODE must be one of {', '.join(_MODES)}; got {mode}.")
    if mode is None and not logged_in():
        kwargs["mode"] = "offline"
    online = kwargs.get("mode", wandb.setup().settings.mode) in _ONLINE and not kwargs.get("offline")
    if online and first_process():
        try:
            check_reachable()  # W&B itself tries for much longer
        except OSError as error:
            raise _unusable(f"{base_url()} does not answer ({error.strerror or error})") from error
    ours = {"project": _PROJECT, "group": None, "name": None, "entity": None}
    if in_sweep():  # W&B takes names of 128 characters
        ours |= {"group": sweep_name(), "name": unescaped(HydraConfig.get().job.override_dirname)[:128]}
    variables = {"group": "WANDB_RUN_GROUP"}
    for key, value in ours.items():
        variable = variables.get(key, f"WANDB_{key.upper()}")
        kwargs[key] = kwargs.get(key) or os.environ.get(variable) or value
    kwargs["tags"] = list(kwargs.get("tags") or []) or None  # an empty list would hide WANDB_TAGS
    if (
        resumed_from is not None
        and "WANDB_RUN_ID" not in os.environ
        and not _branches(resumed_from, kwargs["save_dir"])
    ):
        kwargs["id"] = kwargs.get("id") or load_untrusted(Path(resumed_from)).get(_RUN)
    settings = wandb.Settings(silent=silent)
    if "WANDB_INIT_TIMEOUT" not in os.environ:
        settings.init_timeout = _PATIENCE
    logger = WandbLogger(settings=settings, **kwargs)
    logger._wandb_init.pop("anonymous", None)  # has had no effect for long, and W&B warns of it even if it is None
    return logger


def _branches(checkpoint: str, folder: str) -> bool:
    """Whether other jobs may go on from the checkpoint, too; they would all write into its W&B run."""
    return in_sweep() and not Path(checkpoint).resolve().is_relative_to(Path(folder).resolve())


class NamesWandbRun(Callback):
    """Save the W&B run in checkpoints, so that a resumed run goes on with it."""

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger) and logger.version:
                checkpoint[_RUN] = str(logger.version)


def open_loggers(loggers: Iterable[Logger], hyperparameters: Mapping[str, Any]) -> None:
    """Open the loggers before training begins.

    Args:
        loggers: The loggers.
        hyperparameters: The configuration of the run.

    Raises:
        ValueError: If W&B refuses.
    """
    for logger in loggers:
        try:
            logger.log_hyperparams({**hyperparameters})
        except Exception as error:
            if not isinstance(logger, WandbLogger) or type(error).__module__.partition(".")[0] != "wandb":
                raise
            raise _unusable(str(error).strip().splitlines()[0]) from error


def _unusable(said: str) -> ValueError:
    return ValueError(
        f"W&B cannot be reached, or refuses the account: {said}. WANDB_MODE=offline trains without it, and `wandb sync` "
        "uploads the run later; `wandb login --relogin` takes a new key."
    )


def finish_wandb(loggers: Iterable[Logger], summary: Mapping[str, Any] | None) -> None:
    """End the W&B run of a job, if it has one. The jobs of a sweep share a process, and the next would go on with it.

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
    """Make the summary at W&B from a run's results: plain numbers by key; FLOPs and ratios have the keys of the logs.

    Example:
        >>> wandb_summary({"test_accuracy": 0.9, "val_loss": None, "model": "mlp", "flops": {"flops/train_total": 8.0}})
        {'test_accuracy': 0.9, 'flops/train_total': 8.0}
    """
    parts = {**summary, **summary["flops"], **summary.get("sparse", {})}
    return {key: value for key, value in parts.items() if isinstance(value, int | float)}
