"""The ledger in a Trainer: count the first batch's forward pass as it runs, then book every optimizer step."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Container, Mapping, Set
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from bame_lightning.blocks.pattern import NMPattern
from bame_lightning.callbacks.counting import CountedStep
from bame_lightning.callbacks.home import Home
from bame_lightning.ledger.cost import Shares
from bame_lightning.ledger.flops import Ledger, Macs
from bame_lightning.weights.layers import parse_rules


class Bookkeeper:
    """Owns the ledger of a run.

    Args:
        densities: N / M of each weight that is kept sparse, by name.
        transposed_share: As in `Ledger`.
        restored: State of the ledger to go on from.
    """

    def __init__(
        self,
        densities: Mapping[str, float],
        *,
        transposed_share: float = 1.0,
        restored: Mapping[str, float] | None = None,
    ) -> None:
        self.ledger: Ledger | None = None
        self._densities = dict(densities)
        self._transposed_share = transposed_share
        self._restored = dict(restored or {})
        self._counting: CountedStep | None = None
        self._due, self._warned = True, False
        self._costs: tuple[dict[str, Macs], Macs] = ({}, Macs())
        self.computed: set[str] = set()
        """Weights that the last batch counted did not multiply themselves, but what is computed from them."""
        self._batches = 0
        self._running = False

    def start_batch(self, trainer: L.Trainer, model: L.LightningModule) -> None:
        """Call before each training step; the first one is counted."""
        self._batches += 1
        self._running = True
        if self._due and self._counting is None:
            self._counting = CountedStep(trainer.strategy, model)

    def end_forward(self) -> None:
        """Call when the forward pass is over."""
        if self._counting is None:
            return
        counting, self._counting = self._counting, None
        counter = counting.end()
        self._due, self._costs, self.computed = False, (counter.weights, counter.other), counter.computed
        self._open()

    def follow(self, densities: Mapping[str, float], idle: Container[str] = (), *, recount: bool = False) -> None:
        """Go on with other sparse weights.

        Args:
            densities: N / M of each weight that is kept sparse from now on, by name.
            idle: Weights that turned out not to be trained; no gradient is booked for them.
            recount: Whether the next forward pass is to be counted, since this one may have left out the new ones.
        """
        self._densities, self._due = dict(densities), self._due or recount
        weights, other = self._costs
        self._costs = ({name: Macs(macs.forward) if name in idle else macs for name, macs in weights.items()}, other)
        if self.ledger is not None:
            self._open()

    def _warn(self, ledger: Ledger) -> None:
        # Not before the first step, which shows what stays sparse.
        if ledger.uncounted and not (self._warned or self._due):
            self._warned = True
            rank_zero_warn(
                f"Training FLOPs leave out {', '.join(ledger.uncounted)}: the first batch multiplied nothing with them."
            )

    def _open(self) -> None:
        """Open the ledger for what was counted, with what was booked so far."""
        booked = self.state_dict()
        self.ledger = Ledger(*self._costs, self._densities, transposed_share=self._transposed_share)
        if booked:
            self.ledger.load_state_dict(booked)

    def end_batch(self) -> None:
        """Call after each training step; if it had no backward pass, the next one's forward pass is counted instead."""
        self._running = False
        if self._counting is not None:
            counting, self._counting = self._counting, None
            counting.end()

    def abort(self) -> None:
        """Call when a batch may have begun without coming to its end; such a one costs nothing."""
        if self._running:
            self._batches = max(0, self._batches - 1)
        self.end_batch()

    def book(self, shares: Mapping[str, Shares], ranks: int, executed: Mapping[str, Shares] | None = None) -> None:
        """Book one optimizer step with all batches since the last one, those of skipped steps too."""
        if self.ledger is not None:
            self.ledger.book(shares, executed=executed, batches=self._batches * ranks)
            self._warn(self.ledger)
        self._batches = 0

    def book_part(
        self,
        shares: Mapping[str, Shares],
        ranks: int,
        batches: int,
        sparse: Set[str],
        executed: Mapping[str, Shares] | None = None,
    ) -> None:
        """Book a step of one of several optimizers that hold sparse weights.

        Args:
            shares: Of the weights that it holds.
            ranks: Processes that train.
            batches: Batches since its last step whose gradients have reached them.
            sparse: Names of all sparse weights. What else the network computes is booked once for each batch.
            executed: What was computed of the weights' dense cost.
        """
        if self.ledger is not None:
            self.ledger.book(shares, executed=executed, batches=batches * ranks, only=shares.keys())
            self.ledger.book({}, batches=self._batches * ranks, only=self.ledger.parts - sparse)
            self._warn(self.ledger)
        self._batches = 0

    @property
    def unbooked(self) -> int:
        """Batches since the last step that was booked."""
        return self._batches

    def metrics(self) -> dict[str, float]:
        """The metrics of the ledger; none before the first step."""
        if self.ledger is None and self._restored:
            earlier = Ledger({}, Macs(), {})
            earlier.load_state_dict(self._restored)
            return earlier.metrics()
        return self.ledger.metrics() if self.ledger else {}

    def state_dict(self) -> dict[str, Any]:
        """State of the ledger; empty if nothing was booked."""
        return self.ledger.state_dict() if self.ledger else dict(self._restored)


class KeepsBooks(L.Callback):
    """What every method shares with dense training: pattern and layers of the comparison, and the hooks that count.

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
        """Take up what a child process has told of a fit that ran there."""

    def come_home(self) -> None:
        """Take up what a child process has learned in a fit that ran there, if it has not been taken up."""
        told = self._home.fetch()
        if told is not None:
            self.take_home(told)

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        methods = [type(callback).__name__ for callback in callbacks if isinstance(callback, KeepsBooks)]
        if stage == "fit" and len(methods) > 1:
            raise ValueError(
                f"`callbacks` holds {len(methods)} methods, {' and '.join(methods)}, but weights follow one. Keep one; several "
                "patterns are rules of one callback, layers={'name.*': 'N:M'}."
            )
        if stage == "fit":
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
        # No end of the batch came where `on_train_batch_start` of the module has returned -1.
        self.books.abort()

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.books.abort()

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.books.abort()
