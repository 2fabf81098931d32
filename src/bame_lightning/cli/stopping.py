"""Training that stops early because it gets no better."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from typing_extensions import override


class EarlyStop(EarlyStopping):
    """Lightning's early stopping, which says in one line if its metric is missing."""

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self.monitor.startswith("val/") and not sum(trainer.num_val_batches):
            raise ValueError(
                f"`callbacks.early_stopping.monitor` {self.monitor} needs samples to validate on. Keep some (data.val_size=, "
                "data.val_share=), or leave early_stopping out."
            )

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with _in_a_line():
            super().on_train_epoch_end(trainer, pl_module)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with _in_a_line():
            super().on_validation_end(trainer, pl_module)


@contextmanager
def _in_a_line() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # a metric that nothing logs
        raise ValueError(f"`callbacks.early_stopping.monitor`: {' '.join(str(error).split())}") from None
