"""Block-aware mask evolution by contenders: readings -> evidence -> swaps, for all blocks of many weights at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Int16, Shaped
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from bame_lightning.bame.accumulated import Accumulated
from bame_lightning.bame.contenders import alike, choose, closeness, count_in_share
from bame_lightning.bame.contending import Contenders
from bame_lightning.bame.evolving import EvolvingBlocks, EvolvingLayer
from bame_lightning.bame.reading import Reading, noise_step
from bame_lightning.bame.room import Room
from bame_lightning.bame.sizes import Sizes
from bame_lightning.blocks.masks import kept_places, pieces, zero_pruned_
from bame_lightning.weights.layers import SparseWeight
from bame_lightning.weights.positions import take

if TYPE_CHECKING:
    from bame_lightning.bame.evidence import Evidence


class DenseGradient(NamedTuple):
    """What a step has read of dense gradients.

    Args:
        everywhere: Of all blocks, shape (blocks, m); None if only contenders were read.
        contenders: Of the contenders, shape (contenders,); None if all blocks were read.
        kept: If masks adapt after the step, of the kept weights: in all blocks, shape (blocks, n), or in those of the
            contenders, shape (contenders, n). They are computed anyway, and kept aside since clipping changes them.
        present: Whether each weight has a gradient.
    """

    everywhere: Float[Tensor, "blocks m"] | None
    contenders: Float[Tensor, " contenders"] | None
    kept: Float[Tensor, "some n"] | None
    present: list[bool]


class Challenge(NamedTuple):
    """The contender of each output row that is closest to a swap, and the kept weight that it challenges.

    Args:
        slot: Which contender.
        position: Its position.
        evidence: Its evidence.
        block: Its block.
        place: Which of the block's kept positions it challenges, in the order of `kept_places`.
        weakest: The weight there, the smallest that the block keeps.
        may_swap: Whether it may take its place.
    """

    slot: Int[Tensor, " rows"]
    position: Int[Tensor, " rows"]
    evidence: Float[Tensor, " rows"]
    block: Int[Tensor, " rows"]
    place: Int[Tensor, " rows"]
    weakest: Float[Tensor, " rows"]
    may_swap: Bool[Tensor, " rows"]


class ContendingBlocks(EvolvingBlocks):
    """Blocks that evolve by accumulated evidence, of which few positions are read at most steps: the rule `Evidence`.

    Args:
        weights: The weights. With `init="weights"` evidence starts at their values, so make this object before they are pruned.
        config: The rule.
        freeze_after: Oscillations that a block may make; one more freezes its mask. None never freezes.

    Attributes:
        kept_places: Places in its block of the positions that each block keeps, ascending; shape (blocks, n).
        contenders: The pruned positions that steps between two readings of all read.
        sizes: Sizes of gradients and weights, by readings everywhere.
        reading: Dense gradients that this step has read; None if it has not.
        room: What refuses swaps, so that masks stay 2:4 along the output dimension, too; None refuses none.
    """

    def __init__(self, weights: Sequence[SparseWeight], config: Evidence, freeze_after: int | None) -> None:
        super().__init__(weights, freeze_after)
        self.config = config
        if config.init == "weights":
            self.dense_start()
        self.kept_places = torch.cat([kept_places(sparse.mask(), self.pattern.n) for sparse in weights])
        self.accumulated = Accumulated(self.evidence, mean=config.momentum > 0)
        self.sizes = Sizes(self.weights, self.dtype)
        self.contenders = Contenders(self.weights, self.positions)
        self.reading: DenseGradient | None = None
        self.room: Room | None = None
        # Of the step that is going on: weights where they are kept.
        self._kept: Tensor | None = None

    @override
    def keep_both_ways(self) -> None:
        self.room = Room(self.weights)

    # Readings.

    @override
    def read(self, gradients: Sequence[Tensor | None], *, everywhere: bool, adapts: bool) -> None:
        self.reading = None
        present = [gradient is not None for gradient in gradients]
        self.read_shares = [share * has for share, has in zip(self._shares_read(everywhere), present, strict=True)]
        if not any(present):
            return
        laid_out = [
            torch.zeros_like(sparse.values) if gradient is None else gradient
            for sparse, gradient in zip(self.weights, gradients, strict=True)
        ]
        if everywhere:
            whole = torch.cat([self.in_order(gradient, layer) for layer, gradient in enumerate(laid_out)])
            whole = whole.to(self.dtype).view(-1, self.pattern.m)
            places = self.kept_places.long()
            kept = whole.gather(1, places) if adapts else None
            self.reading = DenseGradient(whole, None, kept, present)
            return
        places = self.contenders.contested(self.kept_places)
        places = places if adapts else places[:, :1]
        values = take(laid_out, torch.split(places, self.contenders.split)).to(self.dtype)
        self.reading = DenseGradient(None, values[:, 0], values[:, 1:] if adapts else None, present)

    @override
    def extremes(self) -> list[Tensor]:
        if self.reading is None:
            return []
        read = self.reading.contenders if self.reading.everywhere is None else self.reading.everywhere
        return list(read.aminmax()) if read is not None and read.numel() else []

    @override
    def accumulate(self, optimizer: Optimizer, reading: Reading, finite: Bool[Tensor, ""], window: int) -> None:
        read = self.reading
        if read is None:
            return
        if read.everywhere is not None:
            zero_pruned_(read.everywhere, finite)
            read.everywhere.scatter_(1, self.kept_places.long(), 0)
            frozen = None if self.freeze_after is None else self.frozen
            self.sizes.measure(read.everywhere, self._kept_weights(), frozen, finite, read.present)
        rate = reading.steps * noise_step(window, self.pattern.m) * self.sizes.unit
        # The unit may be poisoned by what the optimizer did to the weights.
        rate = torch.where(finite & (rate - rate == 0), rate, 0)
        keep = 1 - finite.to(self.dtype) * (reading.forgets / max(1, window))
        if read.everywhere is not None:
            self._move_all(read.everywhere, finite, rate, keep, read.present)
        elif read.contenders is not None:
            self._move_contenders(read.contenders, finite, rate, keep, read.present)

    def _move_all(
        self, gradient: Float[Tensor, "blocks m"], finite: Tensor, rate: Tensor, keep: Tensor, present: list[bool]
    ) -> None:
        """Move mean and evidence of all pruned positions outside frozen blocks."""
        moves = self._moving(self._of_blocks, present, lambda: ~self.frozen)
        rates, weight = self._of_blocks(rate)[:, None], (1 - self.config.momentum) * finite.to(self.dtype)
        if moves is None:
            keeps, weight = (value.expand(len(gradient), 1) for value in (keep, weight))
        else:
            moves = moves[:, None]
            keeps, rates, weight = torch.where(moves, keep, 1), rates * moves, weight * moves
        means = self.accumulated.mean
        averaged = gradient if means is None else means
        for evidence, mean, seen, by, kept, how in pieces(self.evidence, averaged, gradient, rates, keeps, weight):
            change = seen if means is None else mean.lerp_(seen, how)
            evidence.mul_(kept).addcmul_(change, by, value=-1)

    def _move_contenders(
        self, gradient: Float[Tensor, " contenders"], finite: Tensor, rate: Tensor, keep: Tensor, present: list[bool]
    ) -> None:
        """Move mean and evidence of the contenders outside frozen blocks."""
        places = self.contenders.positions
        moves = self._moving(self.contenders.spread, present, lambda: self._unfrozen(places))
        near, change = self.accumulated.near(places), gradient.clone()
        zero_pruned_(change, finite)
        weight, rates = (1 - self.config.momentum) * finite.to(self.dtype), self.contenders.spread(rate)
        if moves is not None:
            keep, rates, weight = torch.where(moves, keep, 1), rates * moves, weight * moves
        if near.mean is not None:
            change = near.mean.lerp_(change, weight)
        near.evidence.mul_(keep).addcmul_(rates, change, value=-1)

    def _of_blocks(self, values: Shaped[Tensor, " weights"]) -> Shaped[Tensor, " blocks"]:
        """For each block the value of its weight."""
        return values.repeat_interleave(self.sizes.blocks, output_size=self.firsts[-1])

    def _kept_weights(self) -> Float[Tensor, "blocks n"]:
        """Weights where they are kept; an optimizer may have moved the others, which are zeroed only later."""
        if self._kept is None:
            first = torch.arange(0, self.positions.starts[-1], self.pattern.m, device=self.evidence.device)
            places = self.positions.offsets(first[:, None] + self.kept_places, self.sizes.blocks)
            self._kept = take(self._values(), torch.split(places, self.sizes.split)).to(self.dtype)
        return self._kept

    def _values(self) -> list[Tensor]:
        return [self.positions.weight(layer) for layer in range(len(self.weights))]

    def _moving(
        self, spread: Callable[[Tensor], Tensor], present: list[bool], unfrozen: Callable[[], Tensor]
    ) -> Bool[Tensor, " some"] | None:
        """Whether evidence moves: not in frozen blocks, nor in weights without a gradient. None if all does."""
        moves = None if self.freeze_after is None else unfrozen()
        if all(present):
            return moves
        has = spread(torch.tensor(present, device=self.sizes.unit.device))
        return has if moves is None else moves & has

    # Contenders.

    @override
    def kept_in(self, layer: int) -> Int16[Tensor, "blocks n"]:
        return self.of(layer, self.kept_places)

    @override
    def contend(self, share: float | None = None) -> None:
        """Choose the contenders, to be read until the next reading of all.

        Args:
            share: Share of a row's pruned positions, rounded up; that of the rule unless given.
        """
        share = self.config.contenders if share is None else share
        weakest = self._kept_weights().abs().amin(-1, keepdim=True)
        ratios = closeness(self.evidence, weakest, self.kept_places)
        if self.freeze_after is not None or self.room is not None:
            # What may not swap comes last, but what is kept never contends.
            least = ratios.clamp_min(torch.finfo(ratios.dtype).tiny).masked_fill_(self._closed(), 0)
            ratios = torch.where(ratios < 0, ratios, least)
        own = [
            part.view(rows, -1) for part, rows in zip(self.sizes.of_weights(ratios), self.contenders.rows, strict=True)
        ]
        n, m = self.pattern.n, self.pattern.m
        shapes = [(*rows.shape, count_in_share(share, rows.shape[1] // m * (m - n))) for rows in own]
        chosen: dict[int, Tensor] = {}
        for layers in alike(shapes):
            together = self.choose(torch.cat([own[layer] for layer in layers]), shapes[layers[0]][2])
            chosen |= zip(layers, torch.split(together, [len(own[layer]) for layer in layers]), strict=True)
        self.contenders.choose([chosen[layer] for layer in range(len(own))])

    def _closed(self) -> Bool[Tensor, "blocks places"]:
        """Positions that may not swap now: in frozen blocks, or without room in their column; 1 place for all of a block."""
        closed = self.frozen[:, None]
        if self.room is not None:
            closed = closed | torch.cat([self.room.full(layer) for layer in range(len(self.weights))])
        return closed

    def choose(self, ratios: Float[Tensor, "rows positions"], count: int) -> Int[Tensor, "rows count"]:
        """Choose the contenders of some rows, as places in them."""
        return choose(ratios, count)

    @property
    @override
    def designated(self) -> Bool[Tensor, " blocks"]:
        chosen = torch.zeros(self.firsts[-1], dtype=torch.bool, device=self.evidence.device)
        return chosen.index_fill_(0, self.contenders.blocks, True) & ~self.frozen

    @override
    def contended(self) -> list[Int[Tensor, " contenders"]]:
        return self.contenders.within()

    @property
    @override
    def contender_count(self) -> int:
        return self.contenders.positions.numel()

    def _unfrozen(self, places: Int[Tensor, " positions"]) -> Bool[Tensor, " positions"]:
        return ~self.frozen[places // self.pattern.m]

    # Adaptations.

    @override
    def adapt(self, share: float = 1.0) -> list[Tensor] | None:
        """Swap a contender of each output row with the weakest kept weight of its block, if it outgrew that by the margin."""
        self.predicted = torch.zeros_like(self.predicted)
        if not self.contender_count:
            self.masks.unchanged()
            self.history.quiet += 1
            return None
        challenge, of, counts = self._challenge()
        size = (1 + self.config.margin) * challenge.weakest.abs()
        swapped = challenge.may_swap & (challenge.evidence.abs() > size)
        started = self.started(size, challenge)
        m, position = self.pattern.m, challenge.position
        dropped = challenge.block * m + self.kept_places[challenge.block, challenge.place]
        if self.room is not None:
            urgency = _ratio(challenge.evidence, challenge.weakest.abs())
            swapped = self.room.admit(position, dropped, of, urgency, swapped)
        places = self.contenders.contested(self.kept_places)[challenge.slot]
        revived, pruned = places[:, 0], places.gather(1, challenge.place[:, None] + 1).squeeze(1)
        self._predict(challenge, swapped, started, of)
        self._hand_over(challenge, swapped, dropped)
        self.masks.swap(revived, pruned, swapped, of)
        self.history.record_swaps(challenge.block, position, dropped, swapped)
        # Where nothing was swapped, what was pruned before stands for what is pruned now.
        pruned = torch.where(swapped, pruned, revived)
        started = torch.where(swapped, started, 0).to(self.weights[0].weight.dtype)
        places = torch.stack((revived, pruned), dim=1).flatten()
        values = torch.stack((started, torch.zeros_like(started)), dim=1).flatten()
        self.positions.put(places, values, [2 * count for count in counts])
        return list(torch.split(pruned, counts))

    def started(self, size: Float[Tensor, " rows"], challenge: Challenge) -> Float[Tensor, " rows"]:
        """Where a revived weight starts: as large as the margin demands, however far evidence went."""
        return size.copysign(challenge.evidence)

    def _challenge(self) -> tuple[Challenge, Int[Tensor, " rows"], list[int]]:
        """Find who challenges whom: not before anything is known of pruned weights, and not in what is frozen.

        Returns:
            The challenge, the weight of each, and how many are in each weight.
        """
        contenders = self.contenders
        places = contenders.contested(self.kept_places)[:, 1:]
        kept = take(self._values(), torch.split(places, contenders.split)).to(self.dtype)
        sizes, place = kept.abs().min(-1)
        evidence = self.accumulated.near(contenders.positions).evidence
        near = _ratio(evidence, sizes)
        trained = self.sizes.noise > 0
        if not all(sparse.weight.requires_grad for sparse in self.weights):
            # Somebody has frozen a layer since: a weight that moved would be no frozen one.
            trained = trained & torch.tensor([s.weight.requires_grad for s in self.weights], device=trained.device)
        may = contenders.spread(trained)
        if self.freeze_after is not None:
            may = may & self._unfrozen(contenders.positions)
        if self.room is not None:
            # Where there is none, the next contender challenges in its row.
            of = contenders.spread(torch.arange(len(self.weights), device=near.device))
            may = may & self.room.has(contenders.positions, of, may & (near > 1 + self.config.margin))
        near = torch.where(may & (near == near), near, -1)
        find = contenders.first_of_rows if self.config.one_per_row else contenders.first_of_blocks
        slot, swaps, of, counts = find(near)
        position, place = contenders.positions[slot], place[slot]
        weakest = kept[slot, place]
        challenge = Challenge(slot, position, evidence[slot], position // self.pattern.m, place, weakest, swaps)
        return challenge, of, counts

    def _predict(self, challenge: Challenge, swapped: Tensor, started: Tensor, of: Tensor) -> None:
        """Predict the loss reduction to first order, -<g, change of w>, where this step has read g."""
        read = self.reading
        if read is None or read.kept is None:
            return
        if read.everywhere is not None:
            gained = read.everywhere.view(-1)[challenge.position]
            lost = read.kept[challenge.block, challenge.place]
        else:
            assert read.contenders is not None
            gained, lost = read.contenders[challenge.slot], read.kept[challenge.slot, challenge.place]
        gain = lost * challenge.weakest - gained * started
        self.predicted.index_add_(0, of, torch.where(swapped, gain, 0))

    def _hand_over(self, challenge: Challenge, swapped: Tensor, dropped: Tensor) -> None:
        """Move evidence, means, places and contenders: what is pruned takes the slot of what is revived."""
        position, slot, place = challenge.position, challenge.slot, challenge.place
        near = self.accumulated.near(self.contenders.positions)
        near.evidence.index_copy_(0, slot, torch.where(swapped, self.handed_down(challenge), challenge.evidence))
        if near.mean is not None:
            # What is revived starts without a past, and so does what is pruned.
            near.mean.index_copy_(0, slot, near.mean[slot].masked_fill_(swapped, 0))
        self.accumulated.clear(position)
        kept = self.kept_places[challenge.block].long()
        entered = torch.where(swapped, position % self.pattern.m, dropped % self.pattern.m)
        kept = kept.scatter_(1, place[:, None], entered[:, None]).sort(-1).values
        self.kept_places.index_copy_(0, challenge.block, kept.to(self.kept_places.dtype))
        self.contenders.replace(slot, torch.where(swapped, dropped, position))
        self._forget()

    def handed_down(self, challenge: Challenge) -> Float[Tensor, " rows"]:
        """Evidence of a weight that is pruned: its value."""
        return challenge.weakest

    def _forget(self) -> None:
        self._kept = None
        self.contenders.forget()

    # What others see.

    @override
    def _layer(self, layer: int) -> EvolvingLayer:
        means = self.accumulated.mean
        mean = None if means is None else self.of(layer, means)
        refused = None if self.room is None else self.room.refused[layer]
        known = super()._layer(layer)
        return replace(
            known, mean_gradient=mean, refused=refused, noise=self.sizes.noise[layer], unit=self.sizes.unit[layer]
        )

    @override
    def end_step(self) -> None:
        self.reading, self._kept = None, None

    @override
    def copies(self, layer: int) -> dict[str, Tensor]:
        own = {
            "evidence": self.of(layer, self.evidence),
            "contenders": self.contenders.by_weight()[layer],
        }
        if (means := self.accumulated.mean) is not None:
            own["mean gradient"] = self.of(layer, means)
        return own | super().copies(layer)

    @override
    def statistics(self, layer: int) -> dict[str, Tensor]:
        return {"size of gradients": self.sizes.noise[layer]}

    @override
    def state(self, layer: int) -> dict[str, Any]:
        sparse = self.weights[layer]
        rows, pruned = sparse.rows, ~sparse.mask()
        state = {
            "contenders": rows.gather(self.contenders.saved(layer).int()),
            "noise": self.sizes.noise[layer],
            "unit": self.sizes.unit[layer],
        }
        if (means := self.accumulated.mean) is not None:
            state["mean_gradient"] = rows.gather(self.of(layer, means)[pruned])
        if self.room is not None:
            state["refused"] = rows.total(self.room.refused[layer])
        return super().state(layer) | {key: value.detach().cpu().clone() for key, value in state.items()}

    @override
    def load_state(self, layer: int, state: Mapping[str, Any]) -> None:
        super().load_state(layer, state)
        sparse = self.weights[layer]
        mask = sparse.mask()
        self.of(layer, self.kept_places).copy_(kept_places(mask, self.pattern.n))
        if (means := self.accumulated.mean) is not None:
            self.of(layer, means).copy_(self.laid_out(layer, ~mask, state["mean_gradient"]))
        if self.room is not None:
            self.room.recount(layer)
            self.room.refused[layer] = sparse.rows.part_of(state["refused"].to(mask.device))
        for name, sizes in (("noise", self.sizes.noise), ("unit", self.sizes.unit)):
            sizes[layer] = state[name].to(sizes)
        self.contenders.restore(layer, sparse.rows.own(state["contenders"]))

    def _shares_read(self, everywhere: bool) -> list[float]:
        """Share of each weight's pruned positions that a reading reads; waits for the device if blocks may freeze."""
        shares = []
        for layer, own in enumerate(self.contenders.by_weight()):
            pruned = (self.firsts[layer + 1] - self.firsts[layer]) * (self.pattern.m - self.pattern.n)
            share = 1.0 if everywhere else len(own) / max(1, pruned)
            if self.freeze_after is not None and share:
                unfrozen = ~self.frozen_of(layer) if everywhere else self._unfrozen(own)
                share *= float(unfrozen.float().mean())
            shares.append(share)
        return shares


def _ratio(evidence: Tensor, weakest: Tensor) -> Tensor:
    """How close contenders are to a swap; never divided by zero."""
    return evidence.abs() / weakest.clamp_min(torch.finfo(weakest.dtype).tiny)
