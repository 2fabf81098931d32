"""What the callback of every method shares with that of dense training."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import lightning as L
from torch import Tensor
from typing_extensions import override

from bame_lightning.blocks.pattern import NMPattern
from bame_lightning.callbacks.bookkeeping import Bookkeeper
from bame_lightning.callbacks.home import Home
from bame_lightning.ledger.cost import SR_STE, Cost
from bame_lightning.weights.layers import parse_rules


class MethodCallback(L.Callback):
    """The common part of all methods and dense training: pattern, layers, and the hooks that count costs.

    Args:
        pattern: "N:M" or an `NMPattern`.
        layers: Rules that override the default choice of layers.

    Raises:
        ValueError: If an argument is malformed.
    """

    def __init__(self, pattern: str | NMPattern, layers: Mapping[str, str | NMPattern] | None) -> None:
        parse_rules(layers or {})
        self.pattern = NMPattern.parse(pattern)
        self.rules = dict(layers or {})
        self._home = Home()
        self.books = Bookkeeper({})
        self.restored: dict[str, Any] | None = None
        """A state that was loaded and is not yet in use; empty if it was saved before a first fit."""
        self.steps = 0

    @property
    @abstractmethod
    def steps(self) -> int:
        """Optimizer steps so far."""

    @steps.setter
    @abstractmethod
    def steps(self, steps: int) -> None: ...

    @abstractmethod
    def take_home(self, told: dict[str, Any]) -> None:
        """Take over what a child process reports of a fit that ran there."""

    def come_home(self) -> None:
        """Take over the result of a fit that ran in a child process, once."""
        told = self._home.fetch()
        if told is not None:
            self.take_home(told)

    def open_books(
        self, densities: Mapping[str, float], restored: Mapping[str, Any] | None, cost: Cost = SR_STE
    ) -> None:
        """Count anew what a step costs, because layers and batches may have changed; what was booked stays.

        Args:
            densities: N / M of each weight that is kept sparse, by name.
            restored: The state of a checkpoint, if there is one.
            cost: Which products of the method are sparse.
        """
        booked = restored.get("flops") if restored else self.books.state_dict() if self.steps else None
        self.books = Bookkeeper(densities, transposed_share=cost.transposed_share, restored=booked)

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        methods = [type(callback).__name__ for callback in callbacks if isinstance(callback, MethodCallback)]
        if stage == "fit" and len(methods) > 1:
            raise ValueError(
                f"`callbacks` holds {len(methods)} methods, {' and '.join(methods)}, but weights follow one. Keep one; several "
                "patterns are rules of one callback, layers={'name.*': 'N:M'}."
            )
        if stage == "fit":
            # Left by a fit that failed, or by a test of another checkpoint; this fit's own is loaded later.
            self.restored = None
            self.come_home()
            self._home.leave(trainer.strategy)

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.books.start_batch(trainer, pl_module)

    @override
    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        self.books.end_forward()

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.books.end_batch()

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # If `on_train_batch_start` of the module returns -1, the batch has no end.
        self.books.abort()

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.books.abort()

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.books.abort()
