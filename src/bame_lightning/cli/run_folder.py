"""The files of a run's folder, and when they replace those of an earlier run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import TorchCheckpointIO
from omegaconf import DictConfig, OmegaConf
from typing_extensions import override

from bame_lightning.checkpoints.replacing import replacing
from bame_lightning.cli.claims import first_process
from bame_lightning.show.find_runs import SUMMARY, read_summary


def describe(cfg: DictConfig, run_dir: Path) -> None:
    """Write the configuration where Hydra would; Hydra itself would write it before the run is sure to begin.

    Args:
        cfg: The composed configuration.
        run_dir: The run folder.
    """
    folder, hydra = run_dir / ".hydra", HydraConfig.instance().cfg
    assert hydra is not None
    for name, content in {
        "config": cfg,
        "hydra": hydra,
        "overrides": HydraConfig.get().overrides.task,
    }.items():
        with replacing(folder / f"{name}.yaml") as part:
            part.write_text(OmegaConf.to_yaml(content))


class ReplacesResults(Callback):
    """Remove the results of an earlier run in the folder when the first batch is trained, not before.

    Args:
        cfg: The composed configuration.
        run_dir: The run folder.
    """

    def __init__(self, cfg: DictConfig, run_dir: Path) -> None:
        self._cfg, self._run_dir = cfg, run_dir
        self._begun = False
        if not first_process():
            return
        for part in (*run_dir.glob(".*.part"), *run_dir.glob("checkpoints/.*.part")):
            part.unlink()  # a draft of a run that was killed while it wrote; the folder is ours
        if read_summary(run_dir) is None:
            describe(cfg, run_dir)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not self._begun and trainer.is_global_zero:
            (self._run_dir / SUMMARY).unlink(missing_ok=True)
            describe(self._cfg, self._run_dir)
        self._begun = True

    def check_begun(self) -> None:
        """Refuse to sum up a run that trained nothing.

        Raises:
            ValueError: If no batch was trained.
        """
        if not self._begun:
            raise ValueError(
                "Nothing was trained: `trainer` was told to stop before the first batch. Results that the folder held are kept."
            )


class WholeCheckpoints(TorchCheckpointIO):
    """Write checkpoints that replace the last one only when complete; a full disk leaves the last one as it is."""

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with replacing(Path(path)) as part:
            try:
                with part.open("wb") as file:
                    torch.save(checkpoint, file)
            except RuntimeError as error:
                # torch's error names a place in its own code, not the full disk.
                raise error.__context__ if isinstance(error.__context__, OSError) else error from None
