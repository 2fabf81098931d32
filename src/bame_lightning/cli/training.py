"""The work of `bame-train`: fit, test, sum up."""

from __future__ import annotations

import logging
import sys
import time
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from lightning import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Checkpoint, LearningRateMonitor
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig

from bame_lightning.callbacks import Dense, OneShotMagnitude
from bame_lightning.callbacks.base import SparseCallback
from bame_lightning.cli.finished import plain
from bame_lightning.cli.loggers import finish_wandb
from bame_lightning.cli.models import build_model
from bame_lightning.cli.progress import EpochLines
from bame_lightning.cli.summary import print_summary, summarize, write_summary
from bame_lightning.cli.sweeps import threads_per_job
from bame_lightning.files import load_weights
from bame_lightning.runs import SUMMARY

# Right in general, but not here: data are in memory, and a run folder holds Hydra's files before the run starts.
_NOT_A_PROBLEM = (
    ".*does not have many workers which may be a bottleneck",
    "Experiment logs directory .* exists and is not empty",
    "Checkpoint directory .* exists and is not empty",
    "Total length of .* across ranks is zero",  # val_size=0
    "The dirpath has changed from",  # resuming in a run folder of its own
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning 2.6 under torch 2.15
)


def train(cfg: DictConfig, config: dict[str, Any]) -> dict[str, Any]:
    """Fit, test and sum up one run.

    Args:
        cfg: The composed configuration, checked.
        config: What its results depend on, as `experiment` returns it.

    Returns:
        The summary that is written to `summary.json`.

    Raises:
        ValueError: If the configuration holds a wrong value.
        FileNotFoundError: If the data set does not exist.
    """
    run_dir = Path(cfg.run_dir)
    bar = sys.stdout.isatty() and not cfg.quiet
    _calm(quiet=cfg.quiet)
    threads = threads_per_job() if cfg.threads is None else cfg.threads
    if threads is not None:
        torch.set_num_threads(threads)
    seed_everything(cfg.seed, workers=True, verbose=False)

    data = instantiate(cfg.data)
    model = build_model(instantiate(cfg.model), data.input_shape, data.num_classes)
    task = instantiate(cfg.task)(model, instantiate(cfg.optimizer), instantiate(cfg.scheduler))
    method: SparseCallback | Dense = instantiate(cfg.method)
    if cfg.ckpt_path is not None:
        _check_resumable(task, Path(cfg.ckpt_path))
    if cfg.ckpt is not None and not isinstance(method, OneShotMagnitude):  # which loads them itself
        _start_from(task, method, Path(cfg.ckpt))
    callbacks = [instantiate(node) for node in cfg.get("callbacks", {}).values()]
    callbacks.append(method)
    if not bar and not cfg.quiet:
        callbacks.append(EpochLines())
    loggers, results = list[Logger](), None
    try:
        # `logger=[]` chooses none, and leaves no node behind.
        loggers += [instantiate(node) for node in cfg.get("logger", {}).values()]
        if not loggers:
            # It refuses to run without one.
            callbacks = [callback for callback in callbacks if not isinstance(callback, LearningRateMonitor)]
        trainer: Trainer = instantiate(cfg.trainer)(
            callbacks=callbacks,
            logger=loggers,
            # Else Lightning adds a checkpoint of its own where none is configured.
            enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
            enable_progress_bar=bar,
            enable_model_summary=bar,
        )
        # Results of an earlier run, which this one replaces: only now, when most mistakes would have been found.
        (run_dir / SUMMARY).unlink(missing_ok=True)
        for logger in loggers:
            logger.log_hyperparams(plain(cfg))

        start = time.perf_counter()
        trainer.fit(task, data, ckpt_path=cfg.ckpt_path)
        seconds = time.perf_counter() - start
        metrics = {**trainer.callback_metrics}
        trainer.test(task, data, verbose=False)
        metrics |= trainer.callback_metrics

        summary = summarize(trainer, method, metrics=metrics, seconds=seconds, config=config, run_dir=run_dir)
        summary["config"] = config
        results = summary
    finally:
        finish_wandb(loggers, results)
    if trainer.is_global_zero:
        write_summary(summary, run_dir / SUMMARY)
        print_summary(summary, run_dir)
    return summary


def _check_resumable(task: LightningModule, checkpoint: Path) -> None:
    """Find out that a checkpoint cannot be resumed from before the run folder is touched; Lightning would tell later."""
    found = load_weights(deepcopy(task), checkpoint, "ckpt_path")
    if not {"loops", "optimizer_states"} <= found.keys():
        raise ValueError(
            f"`ckpt_path` {checkpoint} holds weights alone, and no training to resume. Begin with them by ckpt={checkpoint}."
        )


def _start_from(task: LightningModule, method: SparseCallback | Dense, checkpoint: Path) -> None:
    """Begin with the weights of another run, whatever method trained them."""
    load_weights(task, checkpoint, "ckpt")
    if isinstance(method, SparseCallback) and method.rescale and method.init != "nonzero":
        raise ValueError(
            f"`ckpt` {checkpoint} holds trained weights, which `method.rescale` = true would multiply. Add "
            "method.rescale=false; or method.init=nonzero, if they are sparse already and their masks shall be kept."
        )


def _calm(*, quiet: bool) -> None:
    for message in _NOT_A_PROBLEM:
        warnings.filterwarnings("ignore", message)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING if quiet else logging.INFO)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_no_tip)


def _no_tip(record: logging.LogRecord) -> bool:
    return "Tip:" not in record.getMessage()
