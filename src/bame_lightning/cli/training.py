"""The work of `bame-train`: fit, test, sum up."""

from __future__ import annotations

import logging
import sys
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Checkpoint, LearningRateMonitor
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import CheckpointIO
from omegaconf import DictConfig

from bame_lightning.callbacks import Dense, OneShotMagnitude
from bame_lightning.callbacks.driver import SparseCallback
from bame_lightning.checkpoints.files import load_weights
from bame_lightning.cli.claims import first_process
from bame_lightning.cli.finished import plain
from bame_lightning.cli.interruption import training_stopped
from bame_lightning.cli.models import build_model, data_shape
from bame_lightning.cli.parts import fitted, made, stepping
from bame_lightning.cli.progress import EpochBar, EpochLines
from bame_lightning.cli.resuming import check_resumable, how_to_go_on
from bame_lightning.cli.run_folder import ReplacesResults, WholeCheckpoints
from bame_lightning.cli.seeds import EpochSeeds
from bame_lightning.cli.summary import print_summary, provenance, summarize, write_summary
from bame_lightning.cli.sweeps import threads_per_job
from bame_lightning.cli.wandb_runs import NamesWandbRun, finish_wandb, open_loggers
from bame_lightning.show.find_runs import SUMMARY

# Useful in general, but not here: data are in memory, and a run folder holds Hydra's files before the run starts.
_NOT_A_PROBLEM = (
    ".*does not have many workers which may be a bottleneck",
    "Experiment logs directory .* exists and is not empty",
    "Checkpoint directory .* exists and is not empty",
    "Total length of .* across ranks is zero",  # val_size=0
    "The dirpath has changed from",  # resuming in a run folder of its own
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning 2.6 under torch 2.15
)


class _Run(NamedTuple):
    """The parts that a configuration makes, without the Trainer."""

    cfg: DictConfig
    data: Any
    task: LightningModule
    method: SparseCallback | Dense


def train(cfg: DictConfig, config: dict[str, Any]) -> dict[str, Any]:
    """Fit, test and sum up one run.

    Args:
        cfg: The composed configuration, checked.
        config: The values on which its results depend, as `experiment` returns them.

    Returns:
        The summary that is written to `summary.json`.

    Raises:
        ValueError: If the configuration holds a wrong value.
        FileNotFoundError: If the data set does not exist.
    """
    run_dir = Path(cfg.run_dir)
    _calm(quiet=cfg.quiet)
    threads = threads_per_job() if cfg.threads is None else cfg.threads
    if threads is not None:
        torch.set_num_threads(threads)
    seed_everything(cfg.seed, workers=True, verbose=False)
    run = _make(cfg)
    loggers, results = list[Logger](), None
    try:
        # `logger=[]` chooses none, and leaves no node behind.
        loggers += [instantiate(node) for node in run.cfg.get("logger", {}).values()]
        replaces = ReplacesResults(run.cfg, run_dir)
        trainer = _trainer(run, loggers, replaces)
        open_loggers(loggers, plain(cfg))
        start = time.perf_counter()
        with training_stopped(lambda: how_to_go_on(trainer, run_dir, cfg.ckpt_path)):
            trainer.fit(run.task, run.data, ckpt_path=cfg.ckpt_path)
            replaces.check_begun()
            seconds = time.perf_counter() - start
            metrics = {**trainer.callback_metrics}
            trainer.test(run.task, run.data, verbose=False)
        metrics |= trainer.callback_metrics
        summary = summarize(trainer, run.method, metrics=metrics, seconds=seconds, config=config, run_dir=run_dir)
        summary |= {"config": config, "provenance": provenance("bame-train", HydraConfig.get().overrides.task)}
        results = summary
    finally:
        finish_wandb(loggers, results)
    if trainer.is_global_zero:
        write_summary(summary, run_dir / SUMMARY)
        print_summary(summary, run_dir)
    return summary


def _make(cfg: DictConfig) -> _Run:
    """Make the parts of a run, and refuse wrong ones."""
    cfg, told = fitted(cfg)
    data = instantiate(cfg.data)
    shape, classes = data_shape(data)
    model = build_model(instantiate(cfg.model), shape, classes)
    make_optimizer, make_scheduler = instantiate(cfg.optimizer), stepping(instantiate(cfg.scheduler))
    parts = (model, make_optimizer, make_scheduler)
    task = made("task", instantiate(cfg.task), *parts, what="model, optimizer, scheduler")
    optimizer = made("optimizer", make_optimizer, list(task.parameters()), what="parameters")
    method: SparseCallback | Dense = instantiate(cfg.method)
    if cfg.ckpt_path is not None:
        told += check_resumable(cfg, task, optimizer, make_scheduler)
    if cfg.ckpt is not None and not isinstance(method, OneShotMagnitude):  # which loads them itself
        _start_from(task, method, Path(cfg.ckpt))
    if not cfg.quiet and first_process():
        for line in told:
            print(f"bame-train: {line}.", file=sys.stderr)
    return _Run(cfg, data, task, method)


def _trainer(run: _Run, loggers: list[Logger], replaces: ReplacesResults) -> Trainer:
    bar = sys.stdout.isatty() and not run.cfg.quiet
    callbacks = [instantiate(node) for node in run.cfg.get("callbacks", {}).values()]
    if not loggers:
        # It refuses to run without one.
        callbacks = [callback for callback in callbacks if not isinstance(callback, LearningRateMonitor)]
    callbacks += [run.method, EpochSeeds(run.cfg.seed), NamesWandbRun(), replaces]
    if not run.cfg.quiet:
        callbacks += [EpochLines(), EpochBar()] if bar else [EpochLines()]
    build = instantiate(run.cfg.trainer)
    plugins = build.keywords.get("plugins") or []
    plugins = plugins if isinstance(plugins, list) else [plugins]
    if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
        plugins = [*plugins, WholeCheckpoints()]
    trainer: Trainer = made(
        "trainer",
        build,
        what="callbacks, logger and other keys",
        callbacks=callbacks,
        logger=loggers,
        plugins=plugins,
        # Else Lightning adds a checkpoint of its own where none is configured.
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
        enable_progress_bar=bar,
        enable_model_summary=False,  # the table of the method has the layers, and their true cost is counted
    )
    return trainer


def _start_from(task: LightningModule, method: SparseCallback | Dense, checkpoint: Path) -> None:
    """Start from the weights of another run, whatever method trained them."""
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
        logger = logging.getLogger(name)
        logger.setLevel(logging.WARNING if quiet else logging.INFO)
        # Lightning is imported after Hydra has set up logging, which would print its messages once more, with dates.
        logger.propagate = False
        if not logger.handlers:
            logger.addHandler(logging.StreamHandler())
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_no_tip)


def _no_tip(record: logging.LogRecord) -> bool:
    return "Tip:" not in record.getMessage()
