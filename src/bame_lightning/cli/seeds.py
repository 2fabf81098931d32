"""Random numbers of an epoch that follow from seed and epoch, so that a resumed run draws the same numbers."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader, RandomSampler
from typing_extensions import override


class EpochSeeds(Callback):
    """For every epoch, seed anew the order of samples, the workers that load them, and all generators of the process.

    A checkpoint at the end of an epoch then needs no state of generators, whatever the number of processes and workers.
    Samplers with a generator of their own, and workers that persist over epochs, are left alone.

    Args:
        seed: Seed of the run.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        # Of the training loader alone: what else draws numbers in between must not change the order. Two, so that neither
        # depends on how often the other was asked: Lightning may make an iterator twice.
        self._order, self._workers = torch.Generator(), torch.Generator()
        self._first = True

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._first = True

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        fit = trainer.fit_loop
        for loader in () if fit._combined_loader is None else fit._combined_loader.flattened:
            if isinstance(loader, DataLoader):
                self._take_over(loader)
        self._begin(trainer)
        if self._first and fit._data_fetcher is not None:
            # Lightning made the iterator of a fit's first epoch long ago, and its workers have begun already.
            iter(fit._data_fetcher)
            self._begin(trainer)
        self._first = False

    def _take_over(self, loader: DataLoader[Any]) -> None:
        if loader.generator is None:
            loader.generator = self._workers
        if isinstance(loader.sampler, RandomSampler) and loader.sampler.generator is None:
            loader.sampler.generator = self._order

    def _begin(self, trainer: Trainer) -> None:
        # All processes share the order, but draw different numbers for their own samples.
        shared, own = (_mixed(self._seed, trainer.current_epoch, rank) for rank in (0, trainer.global_rank + 1))
        self._order.manual_seed(shared)
        self._workers.manual_seed(own)
        random.seed(own)
        np.random.seed(own % 2**32)
        torch.manual_seed(own)


def _mixed(*numbers: int) -> int:
    """Make a seed that has nothing in common with the seeds of neighbouring numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
