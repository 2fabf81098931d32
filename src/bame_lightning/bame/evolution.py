"""Block-Aware Mask Evolution by contenders: readings -> evidence -> swaps, for all blocks of many weights at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from bame_lightning.bame.accumulated import Accumulated, Move
from bame_lightning.bame.contenders import alike, choose, closeness, count_in_share
from bame_lightning.bame.contending import Contenders
from bame_lightning.bame.evolving import EvolvingBlocks
from bame_lightning.bame.kept import KeptWeights
from bame_lightning.bame.reading import Reading, noise_step
from bame_lightning.bame.room import Room
from bame_lightning.bame.sizes import Sizes
from bame_lightning.bame.swaps import Challenge, challenge, ratio
from bame_lightning.bame.table import BlockTable, EvolvingLayer, saved
from bame_lightning.blocks.masks import zero_pruned_
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
            kept = whole.gather(1, self.kept.places.long()) if adapts else None
            self.reading, self.extremes = DenseGradient(whole, None, kept, present), list(whole.aminmax())
            return
        places = self.contenders.contested(self.kept.places)
        places = places if adapts else places[:1]
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
            read.everywhere.scatter_(1, self.kept.places.long(), 0)
            frozen = None if moves is None else ~moves
            self.sizes.measure(read.everywhere, self.kept.weights(), frozen, finite, read.present)
        spread = table.spread if everywhere else contenders.spread
        if not all(read.present):
            has = spread(torch.tensor(read.present, device=table.device))
            moves = has if moves is None else moves & has
        rate = reading.steps * noise_step(window, self.pattern.m) * self.sizes.unit
        # The unit is not finite if the optimizer has made weights that are not.
        rate = torch.where(finite & (rate - rate == 0), rate, 0)
        seen = finite.to(table.dtype)
        keep, weight = 1 - seen * (reading.forgets / max(1, window)), (1 - self.config.momentum) * seen
        move = Move(spread(rate), keep, weight).only(moves)
        if read.everywhere is not None:
            table.accumulated.move_all(read.everywhere, move)
        elif read.contenders is not None:
            change = read.contenders.clone()
            zero_pruned_(change, finite)
            table.accumulated.move_near(contenders.positions, change, move)

    @override
    def contend(self, share: float | None = None) -> None:
        """Choose the contenders, to be read until the next reading of all.

        Args:
            share: Share of a row's pruned positions, rounded up; the rule's own unless given.
        """
        share = self.config.contenders if share is None else share
        n, m, rows = self.pattern.n, self.pattern.m, self.contenders.rows
        lengths = [sparse.kept.numel() // count for sparse, count in zip(self.weights, rows, strict=True)]
        shapes = [(*shape, count_in_share(share, shape[1] // m * (m - n))) for shape in zip(rows, lengths, strict=True)]
        weakest, chosen = self.kept.weakest(), dict[int, Tensor]()
        for layers in alike(shapes):
            ratios = closeness_now(self, layers, weakest).view(-1, lengths[layers[0]])
            together = self.choose(ratios, shapes[layers[0]][2])
            chosen |= zip(layers, torch.split(together, [rows[layer] for layer in layers]), strict=True)
        self.contenders.choose([chosen[layer] for layer in range(len(rows))])

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
            table.history.quiet += 1
            return None
        found = self._challenge()
        size = (1 + self.config.margin) * found.weakest.abs()
        swapped = found.may_swap & (found.evidence.abs() > size)
        revived, left = self.starts(found, size)
        position, dropped = found.position, self.kept.positions(found.block, found.place)
        if self.room is not None:
            swapped = self.room.admit(position, dropped, found.of, ratio(found.evidence, found.weakest.abs()), swapped)
        places = self.contenders.contested(self.kept.places).index_select(1, found.slot)
        entered, pruned = places[0], places.gather(0, found.place[None] + 1).squeeze(0)
        if (gain := predicted_gain(self.reading, found, revived)) is not None:
            table.predicted.index_add_(0, found.of, torch.where(swapped, gain, 0))
        self._hand_over(found, swapped, dropped, left)
        table.masks.swap(entered, pruned, swapped, found.of)
        table.history.record_swaps(found.block, position, dropped, swapped)
        # Where nothing was swapped, the position that was pruned before stands for the one that is pruned now.
        pruned = torch.where(swapped, pruned, entered)
        values = torch.where(swapped, revived, 0).to(self.weights[0].weight.dtype)
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
        places = contenders.contested(self.kept.places)[1:]
        kept = take(table.positions.memory(), torch.split(places, contenders.split, dim=1)).to(table.dtype)
        evidence = table.accumulated.near(contenders.positions).evidence
        trained = self.sizes.noise > 0
        if not all(sparse.weight.requires_grad for sparse in self.weights):
            # A layer that was frozen since must not move.
            trained = trained & torch.tensor([s.weight.requires_grad for s in self.weights], device=table.device)
        may = contenders.spread(trained)
        if table.freeze_after is not None:
            may = may & table.unfrozen(contenders.positions)
        if self.room is not None:
            # Where there is no room, the next contender of the row challenges.
            of = contenders.spread(torch.arange(len(self.weights), device=table.device))
            wants = ratio(evidence, kept.abs().amin(0)) > 1 + self.config.margin
            may = may & self.room.has(contenders.positions, of, may & wants)
        return challenge(contenders, evidence, kept, may, one_per_row=self.config.one_per_row)

    def _hand_over(self, found: Challenge, swapped: Tensor, dropped: Tensor, left: Tensor) -> None:
        """Move evidence, means, places and contenders: the pruned position takes the slot of the revived one."""
        accumulated, position = self.table.accumulated, found.position
        near = accumulated.near(self.contenders.positions)
        near.evidence.index_copy_(0, found.slot, torch.where(swapped, left, found.evidence))
        if near.mean is not None:
            # Revived and pruned positions both start without a past.
            near.mean.index_copy_(0, found.slot, near.mean[found.slot].masked_fill_(swapped, 0))
        accumulated.clear(position)
        self.kept.replace(found.block, found.place, torch.where(swapped, position, dropped))
        self.contenders.replace(found.slot, torch.where(swapped, dropped, position))
        self.contenders.forget()

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
    for layer, own in enumerate(contenders.by_weight()):
        pruned = (table.firsts[layer + 1] - table.firsts[layer]) * (table.pattern.m - table.pattern.n)
        share = 1.0 if everywhere else len(own) / max(1, pruned)
        if table.freeze_after is not None and share:
            unfrozen = ~table.frozen_of(layer) if everywhere else table.unfrozen(own)
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
        gained, lost = read.everywhere.view(-1)[found.position], read.kept[found.block, found.place]
    else:
        assert read.contenders is not None
        gained, lost = read.contenders[found.slot], read.kept[found.slot, found.place]
    return lost * found.weakest - gained * revived


def closeness_now(
    blocks: ContendingBlocks, layers: Sequence[int], weakest: Float[Tensor, "blocks 1"]
) -> Float[Tensor, "some m"]:
    """Measure how close the positions of some weights are to a swap; positions that may not swap now come last.

    Args:
        blocks: The blocks of all weights.
        layers: Which weights.
        weakest: Size of the smallest weight that each block keeps.
    """
    table, room = blocks.table, blocks.room
    evidence, sizes, places = (
        torch.cat([table.of(layer, values) for layer in layers])
        for values in (table.evidence, weakest, blocks.kept.places)
    )
    ratios = closeness(evidence, sizes, places)
    if table.freeze_after is None and room is None:
        return ratios
    closed = torch.cat([table.frozen_of(layer) for layer in layers])[:, None]
    if room is not None:
        closed = closed | torch.cat([room.full(layer) for layer in layers])
    # Positions that may not swap still come before kept ones, which never contend.
    least = ratios.clamp_min(torch.finfo(ratios.dtype).tiny).masked_fill_(closed, 0)
    return torch.where(ratios < 0, ratios, least)
