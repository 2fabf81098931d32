"""Training by `pytorch_lightning`, as a test starts it: `python -m tests.callbacks.other_package`."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch.nn import functional

from bame_lightning import BAMECallback, Schedule, StaticMask
from tests.training import Task, blocks_over, tiny_model


class Other(pl.LightningModule):
    """`Task`, as a module of the other package."""

    train_dataloader = Task.train_dataloader

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = tiny_model()
        self.batch = 8

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return functional.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def trainer(*callbacks: Any, **kwargs: Any) -> Any:
    defaults = {"accelerator": "cpu", "devices": 1, "max_epochs": 4, "logger": False, "enable_checkpointing": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(callbacks=list(callbacks), **(defaults | quiet | kwargs))


def averages_are_sparse() -> None:
    for make in (
        lambda: pl.callbacks.EMAWeightAveraging(decay=0.9),
        lambda: pl.callbacks.StochasticWeightAveraging(swa_lrs=0.1),
    ):
        for first in (True, False):
            callback, task = BAMECallback("2:4", schedule=Schedule(every=2)), Other()
            callbacks = [callback, make()]
            trainer(*(callbacks if first else callbacks[::-1])).fit(task)
            assert sum(int(weight.flips) for weight in callback.evolving) > 0
            assert not any(blocks_over(task.model[index].weight, 2, 4) for index in (2, 4, 6))


def a_window_follows_its_accumulation_scheduler() -> None:
    callback = BAMECallback("2:4", schedule=Schedule(start=0.0, stop=1.0, every=1))
    # 8 batches an epoch: 8 steps, then 4, then 2 twice.
    trainer(callback, pl.callbacks.GradientAccumulationScheduler({0: 1, 1: 2, 2: 4})).fit(Other())
    assert callback.steps == 16
    assert (callback.window.start, callback.window.stop) == (0, 16)


def strategies_that_cannot_be_right_are_refused() -> None:
    callback = StaticMask("2:4")
    running = trainer(callback)
    running._accelerator_connector.strategy = object.__new__(pl.strategies.FSDPStrategy)  # it needs a GPU
    with pytest.raises(ValueError, match=r"`strategy` FSDPStrategy cannot train .*FSDP1 flattens weights"):
        callback.setup(running, Other(), "fit")


if __name__ == "__main__":
    torch.set_num_threads(1)
    averages_are_sparse()
    a_window_follows_its_accumulation_scheduler()
    strategies_that_cannot_be_right_are_refused()
