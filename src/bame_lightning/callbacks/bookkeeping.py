"""The ledger in a Trainer: count the first batch's forward pass as it runs, then book every optimizer step."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn

from bame_lightning.callbacks.counting import CountedStep
from bame_lightning.ledger.cost import Shares
from bame_lightning.ledger.flops import Ledger, Macs
from bame_lightning.methods.holder import Holder
from bame_lightning.methods.method import Run


class Bookkeeper:
    """Keep the ledger of a run.

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
        self._due, self._warned, self._told = True, False, False
        self._costs: tuple[dict[str, Macs], Macs] = ({}, Macs())
        self.computed: set[str] = set()
        """Weights that the last counted batch did not multiply themselves: only values computed from them."""
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
            recount: Whether to count the next forward pass, because this one may have left out the new weights.
        """
        self._densities, self._due = dict(densities), self._due or recount
        weights, other = self._costs
        self._costs = ({name: Macs(macs.forward) if name in idle else macs for name, macs in weights.items()}, other)
        if self.ledger is not None:
            self._open()

    def _warn(self, ledger: Ledger) -> None:
        # Not before the first step, which shows which weights stay sparse.
        if ledger.uncounted and not (self._warned or self._due):
            self._warned = True
            rank_zero_warn(
                f"Training FLOPs leave out {', '.join(ledger.uncounted)}: the first batch multiplied nothing with them."
            )

    def _open(self) -> None:
        """Open the ledger for the counted costs, with what was booked so far."""
        booked = self.state_dict()
        self.ledger = Ledger(*self._costs, self._densities, transposed_share=self._transposed_share)
        if booked:
            self.ledger.load_state_dict(booked)

    def end_batch(self) -> None:
        """Call after each training step. If it had no backward pass, the forward pass of the next one is counted instead."""
        self._running = False
        if self._counting is not None:
            counting, self._counting = self._counting, None
            counting.end()

    def abort(self) -> None:
        """Call when a batch may have begun and not ended; such a batch costs nothing."""
        if self._running:
            self._batches = max(0, self._batches - 1)
        self.end_batch()

    def book(self, shares: Mapping[str, Shares], ranks: int, executed: Mapping[str, Shares] | None = None) -> None:
        """Book one optimizer step with all batches since the last one, those of skipped steps too.

        Args:
            shares: Share of the dense cost that the step needed of each weight, by name.
            ranks: Processes that train.
            executed: Share that it has really computed.
        """
        if self.ledger is not None:
            self.ledger.book(shares, executed=executed, batches=self._batches * ranks)
            self._warn(self.ledger)
        self._batches = 0

    def book_step(
        self, run: Run, holder: Holder, shares: Mapping[str, Shares], executed: Mapping[str, Shares], ranks: int
    ) -> None:
        """Book the step of an optimizer; if several hold sparse weights, for the weights that this one holds."""
        if len(run.holders) > 1 and self.ledger is not None:
            self.ledger.book(shares, executed=executed, batches=holder.batches * ranks, only=shares.keys())
            # Everything else in the network is booked once for each batch.
            only = self.ledger.parts - {sparse.name for sparse in run.weights}
            self.ledger.book({}, batches=self._batches * ranks, only=only)
            self._warn(self.ledger)
            self._batches = 0
        else:
            self.book(shares, ranks, executed)
        holder.batches = 0

    def warn_of_no_step(self, method: str) -> None:
        """Tell the user, once, that no optimizer step was seen in many batches."""
        if self._told:
            return
        self._told = True
        rank_zero_warn(
            f"{method} has seen no optimizer step in {self._batches} batches, so masks do not evolve and no cost is booked. "
            "Step what `self.optimizers()` returns, neither what is inside of it (`optimizer.optimizer`) nor an optimizer that "
            "`configure_optimizers` does not return. Or a loss scaler has skipped all steps."
        )

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
