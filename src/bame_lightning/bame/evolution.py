"""Block-Aware Mask Evolution by contenders: readings -> evidence -> swaps, for all blocks of many weights at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from bame_lightning.bame.accumulated import Accumulated, Move
from bame_lightning.bame.contenders import PIECE, choose, closeness, count_in_share
from bame_lightning.bame.contending import Contenders
from bame_lightning.bame.evolving import EvolvingBlocks
from bame_lightning.bame.kept import KeptWeights
from bame_lightning.bame.reading import Reading, noise_step
from bame_lightning.bame.room import Room
from bame_lightning.bame.sizes import Sizes
from bame_lightning.bame.swaps import Challenge, challenge, ratio
from bame_lightning.bame.table import BlockTable, EvolvingLayer, saved
from bame_lightning.blocks.masks import zero_pruned_, zeroed
from bame_lightning.weights.layers import SparseWeight
from bame_lightning.weights.positions import take

if TYPE_CHECKING:
    from bame_lightning.bame.evidence import Evidence


class DenseGradient(NamedTuple):
    """What a step has read of dense gradients.

    Args:
        everywhere: Gradients of all blocks, shape (blocks, m); None if only contenders were read.
        contenders: Gradients of the contenders, shape (contenders,); None if all blocks were read.
        kept: If masks adapt after the step, gradients of the kept weights: in all blocks, shape (blocks, n), or in those of
            the contenders, shape (contenders, n). Backward has computed them anyway; they are copied because clipping
            changes them.
        present: Whether each weight has a gradient.
    """

    everywhere: Float[Tensor, "blocks m"] | None
    contenders: Float[Tensor, " contenders"] | None
    kept: Float[Tensor, "some n"] | None
    present: list[bool]


class ContendingBlocks(EvolvingBlocks):
    """Blocks that evolve by accumulated evidence; most steps read only a few positions: the rule `Evidence`.

    Args:
        weights: The weights. With `init="weights"` evidence starts at their values, so make this object before they are pruned.
        config: The rule.
        freeze_after: Oscillations that a block may make; one more freezes its mask. None never freezes.

    Attributes:
        kept: The positions and weights that each block keeps.
        contenders: The pruned positions that a step reads when it does not read everything.
        sizes: Sizes of gradients and weights, by readings everywhere.
        reading: Dense gradients that this step has read; None if it has read none.
        room: Refuses swaps so that masks stay 2:4 along the output dimension, too; None refuses none.
    """

    def __init__(self, weights: Sequence[SparseWeight], config: Evidence, freeze_after: int | None) -> None:
        super().__init__(weights, freeze_after)
        self.config, table = config, self.table
        if config.init == "weights":
            table.start_at_weights()
        table.accumulated = Accumulated(table.evidence, mean=config.momentum > 0)
        self.kept = KeptWeights(table)
        self.sizes = Sizes(table)
        self.contenders = Contenders(self.weights, table.positions)
        self.reading: DenseGradient | None = None
        self.room: Room | None = None

    @override
    def keep_both_ways(self) -> None:
        self.room = Room(self.weights)

    @override
    def read(self, gradients: Sequence[Tensor | None], *, everywhere: bool, adapts: bool) -> None:
        self.reading, self.extremes = None, []
        present = [gradient is not None for gradient in gradients]
        shares = shares_read(self.table, self.contenders, everywhere=everywhere)
        self.read_shares = [share * has for share, has in zip(shares, present, strict=True)]
        if not any(present):
            return
        laid_out = [
            torch.zeros_like(sparse.values) if gradient is None else gradient
            for sparse, gradient in zip(self.weights, gradients, strict=True)
        ]
        if everywhere:
            whole = torch.cat([self.table.in_order(gradient, layer) for layer, gradient in enumerate(laid_out)])
            whole = whole.to(self.table.dtype).view(-1, self.pattern.m)
            kept = whole.take(self.kept.positions()).view(-1, self.pattern.n) if adapts else None
            self.reading, self.extremes = DenseGradient(whole, None, kept, present), list(whole.aminmax())
            return
        places = self.contenders.offsets[None]
        if adapts:
            places = torch.cat((places, self.contenders.kept_offsets(self.kept.places)))
        values = take(laid_out, torch.split(places, self.contenders.split, dim=1)).to(self.table.dtype)
        read = values[0]
        self.reading = DenseGradient(None, read, values[1:].t() if adapts else None, present)
        self.extremes = list(read.aminmax()) if read.numel() else []

    @override
    def accumulate(self, optimizer: Optimizer, reading: Reading, finite: Bool[Tensor, ""], window: int) -> None:
        read, table, contenders = self.reading, self.table, self.contenders
        if read is None:
            return
        everywhere = read.everywhere is not None
        moves = None
        if table.freeze_after is not None:
            moves = ~table.frozen if everywhere else table.unfrozen(contenders.positions)
        if read.everywhere is not None:
            zero_pruned_(read.everywhere, finite)
            read.everywhere.view(-1).index_fill_(0, self.kept.positions(), 0)
            frozen = None if moves is None else ~moves
            self.sizes.measure(read.everywhere, self.kept.weights(), frozen, finite, read.present)
        spread = table.spread if everywhere else contenders.spread
        if not all(read.present):
            has = spread(torch.tensor(read.present, device=table.device))
            moves = has if moves is None else moves & has
        seen = finite.to(table.dtype)
        # The unit is not finite if the optimizer has made weights that are not.
        rate = (reading.steps * noise_step(window, self.pattern.m) * self.sizes.unit).nan_to_num_(0, 0, 0) * seen
        keep, weight = 1 - seen * (reading.forgets / max(1, window)), (1 - self.config.momentum) * seen
        move = Move(spread(rate), keep, weight).only(moves)
        if read.everywhere is not None:
            table.accumulated.move_all(read.everywhere, move)
        elif read.contenders is not None:
            table.accumulated.move_near(contenders.positions, zeroed(read.contenders, finite), move)

    @override
    def contend(self, share: float | None = None) -> None:
        """Choose the contenders, to be read until the next reading of all.

        Args:
            share: Share of a row's pruned positions, rounded up; the rule's own unless given.
        """
        share = self.config.contenders if share is None else share
        n, m, lengths = self.pattern.n, self.pattern.m, self.contenders.lengths
        evidence, weakest, closed = self.table.evidence, self.kept.weakest(), closed_now(self)
        found, counts, begin = list[Tensor](), list[int](), 0
        # Neighbours of equal rows in one go.
        for length, run in groupby(range(len(lengths)), key=lengths.__getitem__):
            layers = list(run)
            count, step = count_in_share(share, length // m * (m - n)), max(1, PIECE // length) * length // m
            end = self.table.firsts[layers[-1] + 1]
            for first in range(begin, end, step):
                some = slice(first, min(first + step, end))
                ratios = closeness(evidence[some], weakest[some], self.kept.places[some])
                ratios = ratios if closed is None else last(ratios, closed[some])
                found.append(self.choose(ratios.view(-1, length), count))
            counts += [found[-1].shape[1]] * len(layers)  # a rule may choose more or fewer
            begin = end
        self.contenders.choose(torch.cat([own.flatten() for own in found]), counts)

    def choose(self, ratios: Float[Tensor, "rows positions"], count: int) -> Int[Tensor, "rows count"]:
        """Choose the contenders of some rows, as places in them."""
        return choose(ratios, count)

    @override
    def contended(self) -> list[Int[Tensor, " contenders"]]:
        return self.contenders.within()

    @override
    def adapt(self, share: float = 1.0) -> list[Tensor] | None:
        """Swap a contender of each output row with the weakest kept weight of its block, if it exceeds that by the margin."""
        table = self.table
        table.predicted = torch.zeros_like(table.predicted)
        if not self.contenders.positions.numel():
            table.masks.unchanged()
            table.history.adaptations += 1
            return None
        found = self._challenge()
        size = (1 + self.config.margin) * found.size
        swapped = found.may_swap & (found.evidence.abs() > size)
        revived, left = self.starts(found, size)
        first, entered = found.block * self.pattern.m, found.entered
        kept = self.kept.places.index_select(0, found.block)
        revived_at, pruned_at = found.position - first, kept.gather(1, found.place).view(-1).long()
        if self.room is not None:
            urgency = ratio(found.evidence, found.size)
            swapped = self.room.admit(found.position, first + pruned_at, found.of, urgency, swapped)
        stays = ~swapped
        if (gain := predicted_gain(self.reading, found, revived)) is not None:
            table.predicted.index_add_(0, found.of, gain.masked_fill_(stays, 0))
        table.masks.swap(entered, found.dropped, swapped, found.of)
        table.history.record_swaps(found.block, revived_at, pruned_at, swapped)
        # Where nothing was swapped, the position that was pruned before stands for the one that is pruned now.
        pruned = torch.where(swapped, found.dropped, entered)
        self._hand_over(found, swapped, left)
        kept_at = torch.where(swapped, revived_at, pruned_at)[:, None].to(kept.dtype)
        self.kept.replace(found.block, kept.scatter_(1, found.place, kept_at))
        self.contenders.replace(found.slot, first + torch.where(swapped, pruned_at, revived_at), pruned)
        values = revived.masked_fill(stays, 0).to(self.weights[0].weight.dtype)
        both = torch.stack((values, torch.zeros_like(values)), dim=1).flatten()
        places = torch.stack((entered, pruned), dim=1).flatten()
        table.positions.put(places, both, [2 * count for count in found.counts])
        return list(torch.split(pruned, found.counts))

    def starts(
        self, found: Challenge, size: Float[Tensor, " rows"]
    ) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"]]:
        """Where revived weights start: as large as the margin demands. And the evidence of pruned weights: their value."""
        return size.copysign(found.evidence), found.weakest

    def _challenge(self) -> Challenge:
        """Find who challenges whom; nobody does before anything is known of pruned weights, nor in frozen blocks."""
        contenders, table = self.contenders, self.table
        offsets, n = contenders.kept_offsets(self.kept.places), self.pattern.n
        kept = table.positions.values(offsets.t().reshape(-1), [n * count for count in contenders.split])
        kept = kept.view(-1, n).to(table.dtype)
        evidence = table.accumulated.near(contenders.positions).evidence
        trained = self.sizes.noise > 0
        if not all(sparse.weight.requires_grad for sparse in self.weights):
            # A layer that was frozen since must not move.
            trained = trained & torch.tensor([s.weight.requires_grad for s in self.weights], device=table.device)
        may = None if table.freeze_after is None else table.unfrozen(contenders.positions)
        if self.room is not None:
            # Where there is no room, the next contender of the row challenges.
            of = contenders.spread(torch.arange(len(self.weights), device=table.device))
            wants = (ratio(evidence, kept.abs().amin(1)) > 1 + self.config.margin) & trained.index_select(0, of)
            has = self.room.has(contenders.positions, of, wants if may is None else wants & may)
            may = has if may is None else has & may
        found = challenge(contenders, evidence, kept, offsets, may, one_per_row=self.config.one_per_row)
        return found._replace(may_swap=found.may_swap & trained.index_select(0, found.of))

    def _hand_over(self, found: Challenge, swapped: Tensor, left: Tensor) -> None:
        """Move evidence and means: the pruned position takes the slot of the revived one."""
        near = self.table.accumulated.near(self.contenders.positions)
        near.evidence.index_copy_(0, found.slot, torch.where(swapped, left, found.evidence))
        if near.mean is not None:
            # Revived and pruned positions both start without a past.
            near.mean.index_copy_(0, found.slot, near.mean.index_select(0, found.slot).masked_fill_(swapped, 0))

    @override
    def end_step(self) -> None:
        self.reading, self.extremes = None, []
        self.kept.forget()

    @override
    def layer(self, layer: int) -> EvolvingLayer:
        return replace(
            super().layer(layer),
            kept_places=self.table.of(layer, self.kept.places),
            noise=self.sizes.noise[layer],
            unit=self.sizes.unit[layer],
            refused=None if self.room is None else self.room.refused[layer],
        )

    @override
    def state(self, layer: int) -> dict[str, Any]:
        rows = self.weights[layer].rows
        state = {
            "contenders": rows.gather(self.contenders.saved(layer).int()),
            "noise": self.sizes.noise[layer],
            "unit": self.sizes.unit[layer],
        }
        if self.room is not None:
            state["refused"] = rows.total(self.room.refused[layer])
        return super().state(layer) | saved(state)

    @override
    def load_state(self, layer: int, state: Mapping[str, Any]) -> None:
        super().load_state(layer, state)
        sparse = self.weights[layer]
        self.kept.restore(layer)
        if self.room is not None:
            self.room.recount(layer)
            self.room.refused[layer] = sparse.rows.part_of(state["refused"].to(self.table.device))
        for name, sizes in (("noise", self.sizes.noise), ("unit", self.sizes.unit)):
            sizes[layer] = state[name].to(sizes)
        self.contenders.restore(layer, sparse.rows.own(state["contenders"]))


def shares_read(table: BlockTable, contenders: Contenders, *, everywhere: bool) -> list[float]:
    """Share of each weight's pruned positions that a reading reads; waits for the device if blocks may freeze."""
    shares = []
    for layer, count in enumerate(contenders.split):
        pruned = (table.firsts[layer + 1] - table.firsts[layer]) * (table.pattern.m - table.pattern.n)
        share = 1.0 if everywhere else count / max(1, pruned)
        if table.freeze_after is not None and share:
            unfrozen = ~table.frozen_of(layer) if everywhere else table.unfrozen(contenders.by_weight()[layer])
            share *= float(unfrozen.float().mean())
        shares.append(share)
    return shares


def predicted_gain(
    read: DenseGradient | None, found: Challenge, revived: Float[Tensor, " rows"]
) -> Float[Tensor, " rows"] | None:
    """Loss reduction of each swap to first order, -<g, change of w>; None if this step has not read g."""
    if read is None or read.kept is None:
        return None
    if read.everywhere is not None:
        gained, own = read.everywhere.view(-1).index_select(0, found.position), read.kept.index_select(0, found.block)
    else:
        assert read.contenders is not None
        gained, own = read.contenders.index_select(0, found.slot), read.kept.index_select(0, found.slot)
    return own.gather(1, found.place).view(-1) * found.weakest - gained * revived


def closed_now(blocks: ContendingBlocks) -> Bool[Tensor, "*#positions"] | None:
    """Which positions may not swap now; None if all may."""
    table, room = blocks.table, blocks.room
    closed = None if table.freeze_after is None else table.frozen[:, None]
    if room is not None:
        full = torch.cat([room.full(layer) for layer in range(len(table.weights))])
        closed = full if closed is None else closed | full
    return closed


def last(ratios: Float[Tensor, "some m"], closed: Bool[Tensor, "*#positions"]) -> Float[Tensor, "some m"]:
    """Put positions that may not swap last, but still before kept ones, which never contend."""
    least = ratios.clamp_min(torch.finfo(ratios.dtype).tiny).masked_fill_(closed, 0)
    return torch.where(ratios < 0, ratios, least)
