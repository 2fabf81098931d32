"""Training that goes on from a checkpoint: check that it can, and tell interrupted users how."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import DictConfig
from torch.optim import Optimizer

from bame_lightning.checkpoints.files import load_weights
from bame_lightning.cli.sweeps import unescaped
from bame_lightning.show.numbers import amount

_RUN_LONG = 10**9  # steps of a schedule that is made only to be inspected
_SET_BY_SCHEDULES = {"params", "initial_lr"}


def check_resumable(
    cfg: DictConfig, task: LightningModule, optimizer: Optimizer, scheduler: Callable[..., Any]
) -> list[str]:
    """Refuse a checkpoint that cannot be resumed before the run folder is touched; Lightning would fail later.

    Args:
        cfg: The composed configuration, which names the checkpoint as `ckpt_path`.
        task: The module that it must fit.
        optimizer: The optimizer that will go on with its state.
        scheduler: Makes the schedule of the optimizer.

    Returns:
        Lines that name values which are not used.

    Raises:
        ValueError: If the checkpoint cannot be resumed, or leaves nothing to train.
    """
    path = Path(cfg.ckpt_path)
    found = load_weights(deepcopy(task), path, "ckpt_path")
    if not {"loops", "optimizer_states"} <= found.keys():
        raise ValueError(
            f"`ckpt_path` {path} holds weights alone, and no training to resume. Begin with them by ckpt={path}."
        )
    _check_length(cfg, path, found)
    return list(_check_optimizer(cfg, path, found, optimizer, scheduler))


def _check_length(cfg: DictConfig, path: Path, found: Mapping[Any, Any]) -> None:
    epochs = found["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
    for unit, length in {"epoch": epochs, "step": found["global_step"]}.items():
        limit = cfg.trainer.get(f"max_{unit}s")
        if limit is not None and 0 <= limit <= length:
            raise ValueError(
                f"`ckpt_path` {path} has {amount(length, unit)} behind it, so `trainer.max_{unit}s` = {limit} leaves "
                f"nothing to train. Choose more of them, such as trainer.max_{unit}s={2 * length}."
            )


def _check_optimizer(
    cfg: DictConfig, path: Path, found: Mapping[Any, Any], optimizer: Optimizer, scheduler: Callable[..., Any]
) -> Iterator[str]:
    saved, new = found["optimizer_states"][0]["param_groups"][0], optimizer.param_groups[0]
    begin = f"Resume with the one it was trained by, or begin with its weights by ckpt={path}."
    same = saved.keys() - _SET_BY_SCHEDULES == new.keys() - _SET_BY_SCHEDULES
    if not same or saved.get("decoupled_weight_decay") != new.get("decoupled_weight_decay"):
        raise ValueError(
            f"`ckpt_path` {path} was trained by another `optimizer` than {type(optimizer).__name__}. {begin}"
        )
    states = found.get("lr_schedulers") or [{}]
    if states[0].keys() != scheduler(optimizer, _RUN_LONG).state_dict().keys():
        raise ValueError(f"`ckpt_path` {path} was trained under another `scheduler`. {begin}")
    for name in sorted(cfg.optimizer.keys() & new.keys()):
        # Schedules change the learning rate, and keep its first value.
        before, now = (
            _plain(group.get("initial_lr", group["lr"]) if name == "lr" else group[name]) for group in (saved, new)
        )
        if before != now:
            yield f"`optimizer.{name}` {now} is not used: a resumed run goes on with {before}"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def how_to_go_on(trainer: Trainer, run_dir: Path, ckpt_path: str | None) -> list[str]:
    """Tell the user who stopped a run how to go on.

    Args:
        trainer: The Trainer of the run.
        run_dir: The run folder.
        ckpt_path: The checkpoint from which the run itself was resumed.

    Returns:
        Lines.
    """
    saved = [
        callback.best_model_path for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)
    ]
    last = next((path for path in saved if Path(path).name == "last.ckpt" and Path(path).is_file()), ckpt_path)
    if not last:
        return ["No epoch had ended, so there is no checkpoint: the same command begins again."]
    limits = ((trainer.max_epochs, trainer.current_epoch), (trainer.max_steps, trainer.global_step))
    if any(limit is not None and 0 <= limit <= done for limit, done in limits):
        return [f"Training had ended, but for the test of the network, which is in {last}."]
    task = [text for text in HydraConfig.get().overrides.task if not text.startswith(("ckpt_path=", "skip_finished="))]
    words = ["bame-train", *map(unescaped, task), f"hydra.run.dir={run_dir}", f"ckpt_path={last}"]
    return ["To go on from its last checkpoint:", f"  {shlex.join(words)}"]
