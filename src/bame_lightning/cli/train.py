"""`bame-train`: compose a configuration, check it, and train what it describes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from bame_lightning.blocks.pattern import NMPattern
from bame_lightning.cli.claims import claim, first_process
from bame_lightning.cli.command import loading
from bame_lightning.cli.composed import hydra_command
from bame_lightning.cli.conf import conf_dir
from bame_lightning.cli.errors import one_line_errors
from bame_lightning.cli.finished import experiment, finished
from bame_lightning.cli.interruption import check_stopped
from bame_lightning.cli.jobs import record, sweep_of
from bame_lightning.cli.sweeps import check_folder, in_sweep
from bame_lightning.cli.values import check_values, close_keys
from bame_lightning.show.find_runs import ERROR, strict_json


@hydra_command("bame-train", "config")
def main(cfg: DictConfig) -> float | None:
    """Train as the configuration says.

    Args:
        cfg: The composed configuration.

    Returns:
        Accuracy in validation, for sweepers that optimise; None if there is none or the job failed.
    """
    validated: float | None = None
    with one_line_errors("bame-train"):
        validated = strict_json(_results(cfg)["val_accuracy"])
    return validated  # noqa: RET504 a failed job of a sweep leaves the block without a value


def _results(cfg: DictConfig) -> dict[str, Any]:
    """Take the results that `skip_finished` finds, or train."""
    _check(cfg)
    config, run_dir = experiment(cfg), Path(cfg.run_dir)
    with _claim(run_dir):
        if cfg.skip_finished and (found := finished(run_dir, config)) is not None:
            print(f"bame-train: {run_dir} is finished; skipped")
            return found
        if not cfg.quiet:
            loading("bame-train", "PyTorch and Lightning")
        from bame_lightning.cli.training import train

        results = train(cfg, config)
    if in_sweep() and first_process():
        record(HydraConfig.get(), None)  # ended, whatever comes now
    check_stopped(f"The run had ended; all its results are in {run_dir}.")
    return results


@contextmanager
def _claim(run_dir: Path) -> Iterator[None]:
    """Write into the folder alone: no other run, and no other job of the sweep."""
    if not first_process():
        yield
        return
    hydra = HydraConfig.get()
    job = (sweep_of(hydra), str(hydra.job.num)) if in_sweep() else None
    with claim(run_dir, job):
        (run_dir / ERROR).unlink(missing_ok=True)  # an earlier attempt may have failed
        yield


def _check(cfg: DictConfig) -> None:
    """Refuse wrong values before data are read and folders are made."""
    check_folder(HydraConfig.get())
    _check_keys(cfg)
    check_values(cfg)
    if cfg.threads is not None and (type(cfg.threads) is not int or cfg.threads < 1):
        raise ValueError(
            f"`threads` must be a whole number of at least 1, or null for torch's choice; got {cfg.threads}."
        )
    if cfg.seed is None or not 0 <= cfg.seed < 2**32:
        raise ValueError(f"`seed` must be a whole number from 0 to 2**32 - 1; got {cfg.seed}.")
    NMPattern.parse(cfg.pattern)
    for name in ("max_epochs", "max_steps", "limit_train_batches"):
        if cfg.trainer.get(name) == 0:
            raise ValueError(f"`trainer.{name}` = 0 leaves nothing to train. Choose more, or leave it out.")
    for name in ("accumulate_grad_batches", "check_val_every_n_epoch"):
        if (count := cfg.trainer.get(name)) is not None and count < 1:
            raise ValueError(f"`trainer.{name}` must be at least 1; got {count}.")
    if (clip := cfg.trainer.get("gradient_clip_val")) is not None and clip < 0:
        raise ValueError(f"`trainer.gradient_clip_val` must not be negative; got {clip}. Null clips nothing.")
    if cfg.ckpt_path is not None and not Path(cfg.ckpt_path).is_file():
        why = "is a folder" if Path(cfg.ckpt_path).is_dir() else "does not exist"
        raise FileNotFoundError(
            f"`ckpt_path` must be a checkpoint file to resume from; {Path(cfg.ckpt_path)} {why}. Check the path."
        )
    if cfg.ckpt is not None and not Path(cfg.ckpt).exists():
        raise FileNotFoundError(f"`ckpt` {cfg.ckpt} does not exist. Check the path.")


def _check_keys(cfg: DictConfig) -> None:
    """Refuse a key that `+key=value` adds but nothing reads; Hydra itself proposes the plus for a mistyped key."""
    own = OmegaConf.load(conf_dir() / "config.yaml")
    groups = {group for entry in own.defaults if entry != "_self_" for group in entry}
    keys = {str(key) for key in {*own, *groups, *HydraConfig.get().runtime.choices}} - {"defaults", "hydra"}
    known = {key for key in keys if "/" not in key}
    for key in map(str, cfg):
        if key not in known:
            raise ValueError(f"`{key}` is no argument of bame-train. {close_keys(key, known)}")


if __name__ == "__main__":
    main()
