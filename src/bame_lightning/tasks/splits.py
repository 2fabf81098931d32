"""Data in three splits, as LightningDataModules."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override


class Splits(LightningDataModule):
    """Serve three splits in batches; a subclass implements `split`.

    Args:
        batch_size: Samples per batch. An incomplete last batch is left out of training, which is shuffled.
        num_workers: Processes that load batches.
        evaluation_batch_size: Samples per batch of validation and testing; None for as many.
        **options: Further arguments of `DataLoader`.

    Raises:
        ValueError: If `batch_size` is out of range.
    """

    def __init__(
        self, batch_size: int, num_workers: int, evaluation_batch_size: int | None = None, **options: Any
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1; got {batch_size}.")
        self.batch_size, self.num_workers = batch_size, num_workers
        self._evaluation_batch_size, self._options = evaluation_batch_size or batch_size, options
        self._splits: tuple[Any, Any, Any] | None = None

    @abstractmethod
    def split(self) -> tuple[Any, Any, Any]:
        """Find the samples for training, for validation (possibly none) and for testing."""

    @override
    def setup(self, stage: str) -> None:
        if self._splits is None:
            self._splits = self.split()

    @override
    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        return self._loader(0, self.batch_size, shuffle=True, drop_last=True)

    @override
    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]] | list[object]:
        loader = self._loader(1, self._evaluation_batch_size)
        return loader if len(loader) else []

    @override
    def test_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        return self._loader(2, self._evaluation_batch_size)

    def _loader(self, split: int, batch_size: int, **how: Any) -> DataLoader[tuple[Tensor, Tensor]]:
        self.setup("fit")
        assert self._splits is not None
        # Workers are new in each epoch, so that a resumed run can draw their random numbers again: generators of persistent
        # workers are saved nowhere.
        return DataLoader(self._splits[split], batch_size, num_workers=self.num_workers, **how, **self._options)
