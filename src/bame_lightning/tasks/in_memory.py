"""Data sets that fit into memory, as LightningDataModules."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence, Sized
from typing import Any, ClassVar, Protocol, runtime_checkable

from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from bame_lightning.tasks.loaders import make_loader


@runtime_checkable
class Batches(Sized, Protocol):
    """Serve a whole batch at once: for small models a loop over samples costs more than a step."""

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Inputs and targets of the samples with these indices."""


def _as_is(batch: Any) -> Any:
    return batch


class InMemoryData(LightningDataModule):
    """Serve three splits that are held in memory; a subclass implements `split`.

    Args:
        batch_size: Samples per batch. An incomplete last batch is left out of training.
        num_workers: Processes that load batches; 0 is the fastest for samples that are in memory already.

    Raises:
        ValueError: If `batch_size` is out of range.
    """

    evaluation_batch_size: ClassVar[int]
    """Samples per batch of validation and testing."""

    def __init__(self, batch_size: int, num_workers: int) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1; got {batch_size}.")
        self.batch_size, self.num_workers = batch_size, num_workers
        self._splits: tuple[Batches, Batches, Batches] | None = None

    @abstractmethod
    def split(self) -> tuple[Batches, Batches, Batches]:
        """Read the samples for training, for validation (possibly none) and for testing."""

    @override
    def setup(self, stage: str) -> None:
        if self._splits is None:
            self._splits = self.split()

    @override
    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        return self._loader(0, training=True)

    @override
    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]] | list[object]:
        loader = self._loader(1)
        return loader if len(loader) else []

    @override
    def test_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        return self._loader(2)

    def _loader(self, split: int, *, training: bool = False) -> DataLoader[tuple[Tensor, Tensor]]:
        self.setup("fit")
        assert self._splits is not None
        batch_size = self.batch_size if training else self.evaluation_batch_size
        return make_loader(self._splits[split], batch_size, self.num_workers, training=training, collate_fn=_as_is)
