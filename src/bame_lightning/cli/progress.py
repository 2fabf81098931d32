"""Progress: a line per epoch, and in a terminal a bar; epochs count from 1."""

from __future__ import annotations

import math
import shutil
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from typing_extensions import override

_BAR = 55
"""Columns of the bar itself: "epoch 10/60: 100%|█| 1900/1900 [00:12<00:34, 12.34it/s]"."""


def _epoch(trainer: Trainer) -> str:
    last = f"/{trainer.max_epochs}" if trainer.max_epochs is not None and trainer.max_epochs > 0 else ""
    return f"epoch {trainer.current_epoch + 1}{last}"


def _shown(trainer: Trainer) -> dict[str, str]:
    """Metrics by name for people; the flip rate is in percent, because masks rarely change."""
    metrics = {name: float(value) for name, value in sorted(trainer.progress_bar_metrics.items())}
    return {name: f"{value:.3%}" if name.endswith("flip_rate") else f"{value:.4f}" for name, value in metrics.items()}


class EpochLines(Callback):
    """Print the metrics of the progress bar, a line per epoch, on the first rank."""

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics = "  ".join(f"{name} {value}" for name, value in _shown(trainer).items())
        if trainer.is_global_zero:
            line, bar = f"{_epoch(trainer)}  {metrics}", trainer.progress_bar_callback
            if isinstance(bar, EpochBar):
                bar.print(line)  # above the bar
            else:
                print(line, flush=True)


class EpochBar(TQDMProgressBar):
    """Lightning's bar, with epochs counted from 1 and numbers as in the lines, if they fit the terminal."""

    @override
    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        # As in Lightning, which would draw a bar of epoch 0 before it could get another name.
        batches, bar = self.total_train_batches, self.train_progress_bar
        bar.reset()
        bar.total = None if math.isinf(batches) else batches
        bar.initial = 0
        bar.set_description(_epoch(trainer))

    @override
    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        room, found = shutil.get_terminal_size().columns - _BAR, dict[str, int | str | float | dict[str, float]]()
        for name, value in _shown(trainer).items():
            room -= len(f", {name}={value}")
            if room >= 0:
                found[name] = value
        return found
