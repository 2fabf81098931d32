"""Block-Aware Mask Evolution as a method: read, accumulate, adapt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from bame_lightning.bame.evidence import Evidence, OneBatch
from bame_lightning.bame.evolving import EvolvingBlocks
from bame_lightning.bame.grouping import regrouped
from bame_lightning.bame.schedule import Schedule
from bame_lightning.bame.statistics import contention, metrics_of, summary_of
from bame_lightning.bame.table import EvolvingLayer
from bame_lightning.blocks.pattern import NMPattern
from bame_lightning.ledger.cost import PRODUCTS, Cost
from bame_lightning.methods.holder import Holder
from bame_lightning.methods.masked import Masked
from bame_lightning.methods.method import NextRead, Replica
from bame_lightning.weights.layers import SparseWeight
from bame_lightning.weights.mask_set import flip_rates


class BAME(Masked):
    """Block-aware mask evolution.

    Weights of one pattern, type, device and optimizer evolve together (`EvolvingBlocks`).

    Args:
        evidence: The rule: what is read, how it moves evidence, and which weights swap.
        schedule: When masks adapt.
        freeze_after: Oscillations that a block may make; one more freezes its mask for good. None never freezes.
        rescale: As in `Masked`.
        both_ways: As in `Masked`; swaps that do not fit are refused.

    Attributes:
        groups: The weights that evolve together.
        adaptations: Adaptations so far.
        discarded: Readings discarded because of values that are not finite; scalar.
    """

    name = "BAMECallback"
    never = "BAME will never adapt a mask"
    cost = Cost("BAME", PRODUCTS, reads=True)
    schedule: Schedule

    def __init__(
        self,
        evidence: Evidence | OneBatch,
        schedule: Schedule,
        freeze_after: int | None = None,
        *,
        rescale: bool = False,
        both_ways: bool = False,
    ) -> None:
        super().__init__(rescale=rescale, both_ways=both_ways)
        self.evidence = evidence
        self.schedule = schedule
        self.freeze_after = freeze_after
        self.groups: list[EvolvingBlocks] = []
        self.adaptations = 0
        self.discarded = torch.zeros((), dtype=torch.int64)

    @property
    def layers(self) -> list[EvolvingLayer]:
        """The evolving state of each weight, in the order of the run's weights."""
        found = {id(layer.sparse): layer for group in self.groups for layer in group.layers()}
        return [found[id(sparse)] for sparse in self.run.weights]

    @override
    def begin(self, restored: Mapping[str, Any] | None) -> None:
        known = {id(sparse) for group in self.groups for sparse in group.weights}
        if restored is None and self.run.steps and known & {id(sparse) for sparse in self.run.weights}:
            # A second fit goes on where the first one ended.
            self.groups = _together(self, self.groups)
            return
        self.groups = _together(self, [])
        self.adaptations = 0
        self.discarded = torch.zeros((), dtype=torch.int64, device=self.run.weights[0].kept.device)
        if restored is not None:
            self.adaptations = int(restored["adaptations"])
            self.discarded += restored["discarded"].to(self.discarded.device)
            for group in self.groups:
                for layer, sparse in enumerate(group.weights):
                    group.load_state(layer, restored["layers"][sparse.name])

    @override
    def regroup(self) -> None:
        self.groups = _together(self, self.groups)
        super().regroup()

    @override
    def rescaled(self, sparse: SparseWeight, factor: float) -> None:
        for group in self.groups:
            for layer, weight in enumerate(group.weights):
                if weight is sparse:
                    group.table.of(layer, group.table.evidence).mul_(factor)

    @override
    def reads(self, holder: Holder) -> bool:
        return self.evidence.reading(holder.steps, holder.window) is not None

    @override
    def next_read(self, holder: Holder) -> NextRead:
        reading = self.evidence.reading(holder.steps, holder.window)
        if reading is None:
            return NextRead(everything=False)
        groups = _held(self, holder)
        contended = {s.name: own for group in groups for s, own in zip(group.weights, group.contended(), strict=True)}
        return NextRead(reading.everywhere, contended)

    @override
    def read(self, holder: Holder, gradients: Mapping[str, Tensor]) -> None:
        reading = self.evidence.reading(holder.steps, holder.window)
        assert reading is not None
        if isinstance(self.evidence, OneBatch):
            self.run.suspect(holder.weights)  # all that is pruned will be zeroed
        for group in _held(self, holder):
            found = [gradients.get(sparse.name) for sparse in group.weights]
            group.read(found, everywhere=reading.everywhere, adapts=holder.window.adapts(holder.steps))

    @override
    def evolve(self, holder: Holder) -> bool:
        reading, groups = self.evidence.reading(holder.steps, holder.window), _held(self, holder)
        if reading is None:
            for group in groups:
                group.read_shares = [0.0] * len(group.weights)
        else:
            # A single NaN would stay in the evidence for good, so all readings of a step are taken or discarded together.
            extremes = [bound for group in groups for bound in group.extremes]
            bounds = torch.stack(extremes) if extremes else torch.zeros(1, device=self.discarded.device)
            finite = self.run.everywhere((bounds - bounds == 0).all())
            self.discarded += ~finite
            for group in groups:
                group.accumulate(holder.optimizer, reading, finite, len(holder.window))
                if reading.everywhere:
                    group.contend()
        adapts = holder.window.adapts(holder.steps)
        if adapts:
            with ExitStack() as observed:
                for observer in self.run.observers:
                    observed.enter_context(observer())
                _adapt(self, holder)
            self.adaptations += 1
        for group in groups:
            group.end_step()
        return adapts

    @override
    def read_shares(self, holder: Holder) -> Mapping[str, float]:
        return {
            sparse.name: share
            for group in _held(self, holder)
            for sparse, share in zip(group.weights, group.read_shares, strict=True)
        }

    @override
    def mean_read_share(self, pattern: NMPattern, steps: int) -> float:
        # A run reads less than this, because frozen blocks are not read. Rounding contenders up in each row is neglected.
        window = self.schedule.window(steps)
        readings = (self.evidence.reading(step, window) for step in range(steps))
        return sum(reading.share for reading in readings if reading is not None) / steps

    @override
    def metrics(self) -> dict[str, Tensor]:
        holders = [next((h for h in self.run.holders if group in _held(self, h)), None) for group in self.groups]
        inside = [holder is not None and holder.steps in holder.window for holder in holders]
        return {
            **flip_rates(group.table.masks for group in self.groups),
            **contention(self.groups, inside),
            "bame/discarded_readings": self.discarded.float(),
            **metrics_of(self.layers, self.adaptations),
        }

    @override
    def replicas(self) -> Iterator[Replica]:
        yield from super().replicas()
        for group in self.groups:
            for layer, sparse in enumerate(group.weights):
                # Statistics of the whole layer, even if processes share its rows.
                if (noise := group.layer(layer).noise) is not None:
                    yield Replica("size of gradients", sparse.label, noise)
                if sparse.rows.whole:
                    yield from (Replica(what, sparse.label, value) for what, value in group.copies(layer).items())

    @override
    def state(self) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
        layers = {s.name: group.state(layer) for group in self.groups for layer, s in enumerate(group.weights)}
        return layers, {"adaptations": self.adaptations, "discarded": self.discarded.cpu().clone()}

    @override
    def summary(self, mean: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]) -> dict[str, Any]:
        return {
            "adaptations": self.adaptations,
            "flips": sum(group.table.masks.total() for group in self.groups),
            "discarded_readings": int(self.discarded),
            **summary_of(self.layers, self.adaptations, mean),
        }


def _together(method: BAME, before: list[EvolvingBlocks]) -> list[EvolvingBlocks]:
    """Group the weights of the run that evolve together; they keep what was known of them."""

    def begin(weights: Sequence[SparseWeight]) -> EvolvingBlocks:
        group = method.evidence.begin(weights, method.freeze_after)
        if method.both_ways:
            group.keep_both_ways()
        return group

    held = [holder.weights for holder in method.run.holders]
    return regrouped(before, method.run.weights, held, begin)


def _held(method: BAME, holder: Holder) -> list[EvolvingBlocks]:
    """The groups whose weights an optimizer holds."""
    here = {id(sparse) for sparse in holder.weights}
    return [group for group in method.groups if id(group.weights[0]) in here]


def _adapt(method: BAME, holder: Holder) -> None:
    """Swap, and let optimizer state follow."""
    share = method.evidence.adaptable_share(holder.steps, holder.window)
    for group in _held(method, holder):
        before = holder.masks_of_copies(group.weights)
        swaps = group.adapt(share)
        if swaps is None:
            # State was zero where weights were pruned, so a revived weight starts without history.
            method.enforce(group.weights)
        else:
            holder.rest(group.weights, swaps)
        holder.restart_copies(before)
