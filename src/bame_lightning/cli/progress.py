"""Progress where no progress bar can be drawn."""

from __future__ import annotations

from lightning import Callback, LightningModule, Trainer
from typing_extensions import override


class EpochLines(Callback):
    """Print the metrics of the progress bar, a line per epoch, on the first rank."""

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics = "  ".join(
            f"{name} {float(value):.4f}" for name, value in sorted(trainer.progress_bar_metrics.items())
        )
        if trainer.is_global_zero:
            print(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  {metrics}", flush=True)
