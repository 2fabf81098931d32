"""`bame-train`: compose a configuration, check it, and train what it describes."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from bame_lightning.cli.command import loading
from bame_lightning.cli.composed import hydra_command
from bame_lightning.cli.conf import conf_dir
from bame_lightning.cli.errors import one_line_errors
from bame_lightning.cli.finished import experiment, finished
from bame_lightning.pattern import NMPattern
from bame_lightning.runs import strict_json

_WHOLE = (
    *("seed", "threads", "trainer.max_epochs", "trainer.max_steps", "trainer.log_every_n_steps"),
    *("trainer.accumulate_grad_batches", "trainer.check_val_every_n_epoch"),
)


@hydra_command("bame-train", "config")
def main(cfg: DictConfig) -> float | None:
    """Train what the configuration describes.

    Args:
        cfg: The composed configuration.

    Returns:
        Accuracy in validation, for sweepers that optimise; None if there are none or the job failed.
    """
    validated: float | None = None
    with one_line_errors("bame-train"):
        validated = strict_json(_results(cfg)["val_accuracy"])
    return validated  # noqa: RET504 a failed job of a sweep leaves the block without a value


def _results(cfg: DictConfig) -> dict[str, Any]:
    """Take the results that `skip_finished` finds, or train."""
    _check(cfg)
    config, run_dir = experiment(cfg), Path(cfg.run_dir)
    if cfg.skip_finished and (found := finished(run_dir, config)) is not None:
        print(f"bame-train: {run_dir} is finished; skipped")
        return found
    if not cfg.quiet:
        loading("bame-train", "PyTorch and Lightning")
    from bame_lightning.cli.training import train

    return train(cfg, config)


def _check(cfg: DictConfig) -> None:
    """Find out about wrong values before data are read and folders are made."""
    _check_keys(cfg)
    for name in _WHOLE:
        value = OmegaConf.select(cfg, name)
        if value is not None and type(value) is not int:
            raise ValueError(f"`{name}` must be a whole number, such as 20; got {value}.")
    if cfg.seed is None or not 0 <= cfg.seed < 2**32:
        raise ValueError(f"`seed` must be a whole number from 0 to 2**32 - 1; got {cfg.seed}.")
    NMPattern.parse(cfg.pattern)
    if cfg.ckpt_path is not None and not Path(cfg.ckpt_path).is_file():
        raise FileNotFoundError(
            f"`ckpt_path` must be a checkpoint file to resume from; {cfg.ckpt_path} does not exist."
        )
    if cfg.threads is not None and cfg.threads < 1:
        raise ValueError(f"`threads` must be at least 1, or null for torch's own choice; got {cfg.threads}.")


def _check_keys(cfg: DictConfig) -> None:
    """Refuse what `+key=value` adds and nothing reads; Hydra itself proposes the plus for a mistyped key."""
    own = OmegaConf.load(conf_dir() / "config.yaml")
    groups = {group for entry in own.defaults if entry != "_self_" for group in entry}
    known = {str(key) for key in {*own, *groups, *HydraConfig.get().runtime.choices} if "/" not in str(key)}
    for key in map(str, cfg):
        if key not in known:
            close = difflib.get_close_matches(key, known, 1)
            hint = f"Did you mean `{close[0]}`?" if close else "bame-train --help lists what there is."
            raise ValueError(f"`{key}` is no argument of bame-train. {hint}")


if __name__ == "__main__":
    main()
