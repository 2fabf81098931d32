"""Evolution of one weight: readings -> evidence -> swaps -> new mask, new weights, flip history."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.optim import Optimizer

from bame_lightning.bame.contenders import choose, closeness, count_in_share, first, weakest
from bame_lightning.bame.criterion import select_mask
from bame_lightning.bame.evidence import Evidence, OneBatch, Reading, noise_step
from bame_lightning.bame.oscillation import FlipHistory, frozen_blocks, mask_ages, record
from bame_lightning.blocks.layout import from_blocks, gather_blocks, gather_positions, scatter_blocks_, to_blocks
from bame_lightning.blocks.masks import pack_mask, pieces, unpack_mask, zero_pruned_, zeroed
from bame_lightning.blocks.statistics import flipped_positions
from bame_lightning.weights.layers import SparseWeight
from bame_lightning.weights.optimizer_step import block_rates, update_rule
from bame_lightning.weights.sharding import ALL_ROWS, Rows, local

ALL = slice(None)
MEMORY = 0.9
"""Weight of the past in the running mean of squared gradients, at a reading everywhere."""


class Adaptation(NamedTuple):
    """Outcome of an adaptation.

    Args:
        mask: The new mask; shape (blocks, m).
        weight: The new weights: revived ones start with the sign of their evidence, pruned ones are zero; shape (blocks, m).
        evidence: The new evidence: pruned weights' values go into it, it is zero where kept; shape (blocks, m).
    """

    mask: Bool[Tensor, "blocks m"]
    weight: Float[Tensor, "blocks m"]
    evidence: Float[Tensor, "blocks m"]


def adapt(
    latent: Float[Tensor, "blocks m"],
    worth: Float[Tensor, "blocks m"],
    mask: Bool[Tensor, "blocks m"],
    adaptable: Bool[Tensor, "#blocks"] | None,
    n: int,
    *,
    share: float = 1.0,
    margin: float | None = None,
    rows: Rows = ALL_ROWS,
) -> Adaptation:
    """Adapt the mask of one weight.

    Args:
        latent: Latent weights: weights where kept, evidence where pruned.
        worth: How much it matters that each is kept; the worthiest are.
        mask: The mask in force, exactly `n` kept per block.
        adaptable: Blocks that may change; None for all.
        n: Weights kept per block.
        share: Confine the swaps to this share of all blocks (rounded up), those that gain most.
        margin: For a worth that is the size of a weight: swap only where evidence exceeds the weight that it replaces by this
            share of it, and start revived weights there, however far evidence went since the last adaptation: of the size
            (1 + margin) times the largest weight that is pruned in the block. None knows neither.
        rows: Which rows the blocks are of; a share is one of the blocks of all rows.

    Returns:
        New mask, weights and evidence.
    """
    proposed = select_mask(worth, mask, n, margin=margin or 0.0, adaptable=adaptable)
    if share < 1:
        # Summed over a block: the worth of what is revived less that of what is pruned.
        gain = (worth * (proposed.to(worth.dtype) - mask.to(worth.dtype))).sum(-1)
        ranked = rows.gather(gain).argsort(descending=True, stable=True)
        best = rows.own_index(ranked[: count_in_share(share, len(ranked))], len(mask))
        chosen = torch.zeros(len(mask), dtype=torch.bool, device=mask.device).index_fill(0, best, True)
        proposed = torch.where(chosen[:, None], proposed, mask)
    weight, evidence = latent.clone(), latent.clone()
    if margin is not None:
        # All that is revived in a block exceeds this: the last swap's does, and it is the least of them.
        dropped = latent.abs()
        zero_pruned_(dropped, mask & ~proposed)
        size = (1 + margin) * dropped.amax(-1, keepdim=True)
        weight = torch.where(mask, latent, size.copysign(latent))
    zero_pruned_(weight, proposed)
    zero_pruned_(evidence, ~proposed)
    return Adaptation(proposed, weight, evidence)


class DenseGradient(NamedTuple):
    """What a step has read of a dense gradient, in float32 at least.

    Args:
        everywhere: Of all blocks, shape (blocks, m); None if only contenders were read.
        contenders: Of the contenders, row by row; nothing if all blocks were read.
        around: Of the contenders' blocks, shape (contenders, m), if masks adapt after such a step. Gradients of kept weights
            are computed anyway; they are kept aside since clipping changes them.
    """

    everywhere: Float[Tensor, "blocks m"] | None
    contenders: Float[Tensor, " contenders"]
    around: Float[Tensor, "contenders m"] | None


class Challenge(NamedTuple):
    """Which blocks may swap, and what challenges the weakest kept weight there.

    Args:
        blocks: The blocks: their indices, or a slice of all.
        latent: Weights where kept, and what challenges them; shape (chosen, m).
        adaptable: Blocks that may change.
        slots: Place of the challenger among the contenders; None if all pruned weights challenge.
    """

    blocks: Int[Tensor, " chosen"] | slice
    latent: Float[Tensor, "chosen m"]
    adaptable: Bool[Tensor, "#chosen"]
    slots: Int[Tensor, " chosen"] | None


class EvolvingWeight:
    """A sparse weight with all that evolves in its blocks beside the mask.

    Positions are numbered through in the order of blocks: block * m + place in the block.

    Args:
        sparse: The weight and its mask, which `adapt` changes in place.
        evidence: What is known of pruned weights. With `init="weights"` it starts at their values, so make this object
            before they are zeroed.
        freeze_after: Oscillations that a block may make; one more freezes its mask. None never freezes.

    Attributes:
        mask: The mask in blocks: a view of that of `sparse`, or a copy where blocks are not contiguous in it.
        evidence: What pruned weights would have become, zero where kept; at least float32, shape (blocks, m).
        contenders: Pruned positions that steps between two readings of all read; as many in each row, shape (rows, count).
        mean_gradient: Running mean of pruned positions' gradients over their readings, like `evidence`; None without
            `momentum`.
        noise: Running mean of squared gradients of pruned weights, over readings everywhere; scalar.
        unit: Root mean square of kept weights over that of pruned weights' gradients, at the last reading everywhere: the
            step by which a typical gradient moves evidence as far as a typical weight; scalar.
        history: Oscillations, and positions pruned before.
        ages: Adaptations since the mask of a block last changed, or all so far; shape (blocks,).
        flips: Mask positions changed so far; scalar.
        last_flips: Those that the last adaptation changed; scalar.
        predicted: Loss reduction that the last adaptation predicted, to first order; scalar, in units of the loss.
        reading: Dense gradient that this step has read; None if it has not.
        read_share: Share of all pruned positions whose gradient the last step read.
    """

    def __init__(self, sparse: SparseWeight, evidence: Evidence | OneBatch, freeze_after: int | None) -> None:
        self.sparse = sparse
        self.config = evidence
        self.freeze_after = freeze_after
        self.mask = mask = sparse.mask()
        device, self.dtype = mask.device, torch.promote_types(sparse.weight.dtype, torch.float32)
        self.evidence = torch.zeros(mask.shape, device=device, dtype=self.dtype)
        if evidence.init == "weights":
            self.evidence += torch.where(mask, 0, self._blocks(sparse.values, ALL))
        self.contenders = torch.zeros(len(sparse.kept), 0, dtype=torch.int64, device=device)
        self.mean_gradient = torch.zeros_like(self.evidence) if evidence.momentum > 0 else None
        self.noise = torch.zeros((), device=device, dtype=self.dtype)
        self.unit = torch.zeros((), device=device, dtype=self.dtype)
        self.history = FlipHistory.empty(mask)
        self.ages = torch.zeros_like(self.history.oscillations)
        self.flips = torch.zeros((), dtype=torch.int64, device=device)
        self.last_flips = torch.zeros((), dtype=torch.int64, device=device)
        self.predicted = torch.zeros((), device=device, dtype=self.dtype)
        self.reading: DenseGradient | None = None
        self.read_share = 0.0

    @property
    def frozen(self) -> Bool[Tensor, " blocks"]:
        """Blocks whose mask is final."""
        return frozen_blocks(self.history.oscillations, self.freeze_after)

    @property
    def pruned_positions(self) -> int:
        """Number of positions that are pruned, the same at all times."""
        return len(self.mask) * (self.sparse.pattern.m - self.sparse.pattern.n)

    @property
    def designated(self) -> Bool[Tensor, " blocks"]:
        """Blocks that hold a contender, and are not frozen."""
        chosen = torch.zeros(len(self.mask), dtype=torch.bool, device=self.mask.device)
        return chosen.index_fill_(0, self._contested.flatten(), True) & ~self.frozen

    @property
    def _contested(self) -> Int[Tensor, "rows count"]:
        """The block of each contender."""
        return self.contenders // self.sparse.pattern.m

    def read(self, everywhere: bool, adapts: bool = False) -> None:
        """Copy the dense gradient before it is masked.

        Args:
            everywhere: Of all unfrozen blocks; otherwise of the contenders.
            adapts: Whether masks adapt after this step.
        """
        gradient = self.sparse.gradient
        if gradient is None:
            self.reading, self.read_share = None, 0.0
            return
        self.read_share = self._share_read(everywhere)
        if everywhere:
            whole = self._blocks(gradient, ALL, copy=True).to(self.dtype)
            self.reading = DenseGradient(whole, whole.new_zeros(0), None)
            return
        at = gather_positions(gradient, self.contenders.flatten()).to(self.dtype)
        around = self._blocks(gradient, self._contested.flatten()).to(self.dtype) if adapts else None
        self.reading = DenseGradient(None, at, around)

    def extremes(self) -> list[Tensor]:
        """Least and largest value of what this step has read; NaN if there is one among them."""
        if self.reading is None:
            return []
        read = self.reading.contenders if self.reading.everywhere is None else self.reading.everywhere
        return list(read.aminmax()) if read.numel() else []

    def accumulate(self, optimizer: Optimizer, reading: Reading, finite: Bool[Tensor, ""], window: int) -> None:
        """Move the evidence by what was read.

        Args:
            optimizer: The optimizer that has just stepped on it.
            reading: What the reading is.
            finite: False discards it, on the device.
            window: Steps of the window.
        """
        if not self.config.remembers:
            self.evidence.zero_()
        if self.reading is None:
            return
        if not self.config.remembers:
            self._follow_optimizer(optimizer, reading, finite)
            return
        if self.reading.everywhere is not None:
            self._measure(self.reading.everywhere, finite)
        rate = reading.steps * noise_step(window, self.sparse.pattern.m) * self.unit
        # The unit may be poisoned by what the optimizer did to the weights.
        rate = torch.where(finite, rate, 0)
        keep = 1 - finite.to(self.dtype) * (reading.forgets / max(1, window))
        if self.reading.everywhere is not None:
            self._move_all(self.reading.everywhere, finite, rate, keep)
        else:
            self._move_contenders(self.reading.contenders, finite, rate, keep)

    def _move_all(self, gradient: Float[Tensor, "blocks m"], finite: Tensor, rate: Tensor, keep: Tensor) -> None:
        """Move mean and evidence of all pruned positions outside frozen blocks."""
        unfrozen = torch.ones_like(self.mask[:, :1]) if self.freeze_after is None else ~self.frozen[:, None]
        means = gradient if self.mean_gradient is None else self.mean_gradient
        for evidence, mean, seen, kept, may in pieces(self.evidence, means, gradient, self.mask, unfrozen):
            change = zeroed(seen, ~kept & may)
            zero_pruned_(change, finite)
            if self.mean_gradient is not None:
                change = mean.lerp_(change, (1 - self.config.momentum) * (finite & may).to(self.dtype))
            evidence.mul_(torch.where(may, keep, 1)).addcmul_(change, rate * may, value=-1)

    def _move_contenders(
        self, gradient: Float[Tensor, " contenders"], finite: Tensor, rate: Tensor, keep: Tensor
    ) -> None:
        """Move mean and evidence of the contenders outside frozen blocks."""
        places = self.contenders.flatten()
        may = self._unfrozen(places)
        change = gradient.clone()
        zero_pruned_(change, finite)
        if self.mean_gradient is not None:
            mean = self.mean_gradient.view(-1).index_select(0, places)
            change = mean.lerp_(change, (1 - self.config.momentum) * (finite & may).to(self.dtype))
            self.mean_gradient.view(-1).index_copy_(0, places, change)
        evidence = self.evidence.view(-1).index_select(0, places)
        moved = torch.where(may, evidence * keep - rate * change, evidence)
        self.evidence.view(-1).index_copy_(0, places, moved)

    def _follow_optimizer(self, optimizer: Optimizer, reading: Reading, finite: Bool[Tensor, ""]) -> None:
        """Set the evidence to what the optimizer would have made of this one gradient."""
        assert self.reading is not None
        assert self.reading.everywhere is not None
        gradient = self.reading.everywhere
        zero_pruned_(gradient, finite)
        rule = update_rule(optimizer, self.sparse.weight)
        moment = rule.second_moment
        if moment is not None:
            moment = self._blocks(self.sparse.oriented(local(moment)), ALL)
        rate = reading.steps * block_rates(rule, moment, gradient, self.mask, self.sparse.pattern.n)
        # The optimizer's second moment may be poisoned as well.
        rate = torch.where(finite, rate, 0).expand(len(gradient), 1)
        self.evidence.addcmul_(zeroed(gradient, ~self.mask & ~self.frozen[:, None]), rate, value=-1)

    def _measure(self, gradient: Float[Tensor, "blocks m"], finite: Bool[Tensor, ""]) -> None:
        """Follow the size of gradients and of weights at a reading everywhere, both over all rows of the layer."""
        pattern, pruned = self.sparse.pattern, ~self.mask
        read: Tensor = gradient.new_tensor(len(self.mask))
        if self.freeze_after is not None:
            pruned &= ~self.frozen[:, None]
            read = (~self.frozen).sum().to(self.dtype)
        gradients = _sum_of_squares(gradient, pruned, self.dtype)
        # The optimizer may have moved pruned weights, which are zeroed only later.
        weights = _sum_of_squares(self.sparse.values, self.sparse.kept, self.dtype)
        gradients, weights, read = self.sparse.rows.total(torch.stack((gradients, weights, read))).unbind()
        square = gradients / (read * (pattern.m - pattern.n)).clamp_min(1)
        running = torch.where(self.noise > 0, torch.lerp(square, self.noise, MEMORY), square)
        # The square of a finite gradient may overflow.
        self.noise = torch.where(finite & running.isfinite(), running, self.noise)
        weights = weights / (self.sparse.weight.numel() * pattern.density)
        self.unit = torch.where(self.noise > 0, (weights / self.noise).sqrt(), 0)

    def closeness(self) -> Float[Tensor, "blocks m"]:
        """How close every position is to a swap: `contenders.closeness`."""
        return closeness(self._blocks(self.sparse.values, ALL), self.evidence, self.mask)

    def contend(self, share: float) -> None:
        """Choose the contenders, to be read until the next reading of all.

        Args:
            share: Share of a row's pruned positions, rounded up.
        """
        rows = len(self.sparse.kept)
        ratios = self.closeness()
        if self.freeze_after is not None:
            ratios.masked_fill_(self.frozen[:, None], -1)
        self.contenders = choose(ratios.view(rows, -1), count_in_share(share, self.pruned_positions // rows))

    def adapt(self, share: float) -> None:
        """Adapt masks by swapping weights in place: a pruned one that outgrew the block's weakest kept one takes its place."""
        if not self.sparse.weight.requires_grad or not self._may_adapt:
            # Somebody has frozen the layer since: a weight that moved would be no frozen one.
            self.last_flips, self.predicted = torch.zeros_like(self.flips), torch.zeros_like(self.predicted)
            return
        pattern, weight = self.sparse.pattern, self.sparse.values
        index, latent, adaptable, slots = self._challenges()
        mask, evidence = _rows(self.mask, index).clone(), _rows(self.evidence, index)
        old = zeroed(latent, mask)
        gradient = self._gradient(index, slots)
        worth = self.config.worth(latent, gradient)
        new = adapt(
            latent, worth, mask, adaptable, pattern.n, share=share, margin=self.config.margin, rows=self.sparse.rows
        )
        self._put(weight, index, new.weight)
        self._put(self.sparse.kept, index, new.mask)
        _put_rows(self.mask, index, new.mask)
        _put_rows(self.evidence, index, zeroed(old + evidence, ~new.mask))
        if self.mean_gradient is not None:
            # What is revived starts without a past, and so does what is pruned.
            _put_rows(self.mean_gradient, index, zeroed(_rows(self.mean_gradient, index), ~new.mask))
        if slots is not None:
            self._hand_over(slots, index, mask, new.mask)
        history = FlipHistory(*(_rows(values, index) for values in self.history))
        for values, changed in zip(self.history, record(history, mask, new.mask), strict=True):
            _put_rows(values, index, changed)
        ages = mask_ages(_rows(self.ages, index), mask, new.mask)
        self.ages += 1
        _put_rows(self.ages, index, ages)
        self.last_flips = flipped_positions(mask, new.mask)
        self.flips += self.last_flips
        # To first order, -<g, change of w>.
        self.predicted = torch.zeros_like(self.predicted)
        if gradient is not None:
            self.predicted -= torch.dot(gradient.flatten(), (new.weight - old).flatten())

    @property
    def _may_adapt(self) -> bool:
        """Whether there is anything to adapt by: contenders are known from the first reading of all on."""
        return not self.config.remembers or self.contenders.numel() > 0

    def _challenges(self) -> Challenge:
        if not self.config.remembers:
            old = zeroed(self._blocks(self.sparse.values, ALL).to(self.dtype), self.mask)
            return Challenge(ALL, old + self.evidence, ~self.frozen, None)
        m, rows, places = self.sparse.pattern.m, len(self.sparse.kept), self.contenders.flatten()
        contested = self._contested.flatten()
        around = self._blocks(self.sparse.values, contested).to(self.dtype)
        evidence = self.evidence.view(-1).index_select(0, places)
        near = evidence.abs() / weakest(around, _rows(self.mask, contested))
        # Not before anything is known of pruned weights, and not once they are frozen.
        near = near.masked_fill(~(self._unfrozen(places) & (self.noise > 0)), -1)
        index: Tensor | slice
        if self.config.one_per_row:
            slots, adaptable = first(near, places // (self.mask.numel() // rows), rows)
            index = contested[slots]
        else:
            slots, adaptable = first(near, contested, len(self.mask))
            index = ALL
        mask = _rows(self.mask, index)
        # The optimizer may have moved pruned weights, which are zeroed only later.
        latent = zeroed(self._blocks(self.sparse.values, index).to(self.dtype), mask)
        challenger = (places[slots] % m)[:, None] == torch.arange(m, device=places.device)
        latent = torch.where(challenger & adaptable[:, None], evidence[slots][:, None], latent)
        return Challenge(index, latent, adaptable, slots)

    def _hand_over(self, slots: Tensor, index: Tensor | slice, old: Tensor, new: Tensor) -> None:
        """Let what was pruned contend in place of what was revived."""
        dropped = old & ~new
        blocks = torch.arange(len(self.mask), device=old.device) if isinstance(index, slice) else index
        places = blocks * self.sparse.pattern.m + dropped.to(torch.int8).argmax(-1)
        # Where nothing was swapped, the write goes to a slot that nobody reads.
        target = torch.where(dropped.any(-1), slots, self.contenders.numel())
        padded = torch.nn.functional.pad(self.contenders.flatten(), (0, 1)).index_copy_(0, target, places)
        self.contenders = padded[:-1].view(self.contenders.shape)

    def _unfrozen(self, places: Int[Tensor, " positions"]) -> Bool[Tensor, "#positions"]:
        """Whether positions lie in blocks whose masks may change."""
        if self.freeze_after is None:
            return torch.ones(1, dtype=torch.bool, device=places.device)
        return ~self.frozen[places // self.sparse.pattern.m]

    def _share_read(self, everywhere: bool) -> float:
        places = self.contenders.flatten()
        read = 1.0 if everywhere else len(places) / max(1, self.pruned_positions)
        if self.freeze_after is None or not read:
            return read
        unfrozen = ~self.frozen if everywhere else self._unfrozen(places)
        return read * float(unfrozen.float().mean())

    def _gradient(self, index: Tensor | slice, slots: Tensor | None) -> Float[Tensor, "chosen m"] | None:
        """The gradient of this step in challenged blocks; None if it was not read there."""
        if self.reading is None:
            return None
        if self.reading.everywhere is not None:
            return _rows(self.reading.everywhere, index)
        return None if self.reading.around is None or slots is None else self.reading.around[slots]

    def state_dict(self) -> dict[str, Any]:
        """All that evolves beside the mask, of all rows: evidence of pruned positions only, a bit per mask position."""
        rows = self.sparse.rows
        state = {
            # Every row has as many pruned positions as any other.
            "evidence": rows.gather(self.evidence[~self.mask]),
            "contenders": rows.gather((self.contenders - self._row_starts).int()),
            "mean_gradient": None if self.mean_gradient is None else rows.gather(self.mean_gradient[~self.mask]),
            "noise": self.noise,
            "unit": self.unit,
            "oscillations": rows.gather(self.history.oscillations),
            "ages": rows.gather(self.ages),
            "pruned_before": pack_mask(rows.gather(self.history.pruned_before)),
            "flips": rows.total(self.flips),
            "last_flips": rows.total(self.last_flips),
            "predicted": rows.total(self.predicted),
        }
        # Copies: a checkpoint may be written while training goes on.
        return {key: value.detach().cpu().clone() for key, value in state.items() if value is not None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; the mask must have been restored before."""
        # Copies: training goes on in place, and the checkpoint is the caller's.
        device, rows = self.evidence.device, self.sparse.rows
        state = {key: value.to(device, copy=True) for key, value in state.items() if isinstance(value, Tensor)}
        mask = self.mask.copy_(self.sparse.mask())
        self.evidence = self._pruned(mask, state["evidence"])
        self.contenders = rows.own(state["contenders"]).long() + self._row_starts
        if self.mean_gradient is not None:
            self.mean_gradient = self._pruned(mask, state["mean_gradient"])
        self.noise, self.unit = state["noise"].to(self.dtype), state["unit"].to(self.dtype)
        everywhere = torch.Size((len(mask) * rows.parts, mask.shape[1]))
        before = rows.own(unpack_mask(state["pruned_before"], everywhere))
        self.history = FlipHistory(rows.own(state["oscillations"]), before)
        self.ages = rows.own(state["ages"])
        self.flips, self.last_flips = rows.part_of(state["flips"]), rows.part_of(state["last_flips"])
        self.predicted = rows.part_of(state["predicted"].to(self.dtype))

    def _pruned(self, mask: Tensor, values: Tensor) -> Float[Tensor, "blocks m"]:
        """Lay out what was saved of pruned positions."""
        return torch.zeros_like(self.evidence).masked_scatter(~mask, self.sparse.rows.own(values).to(self.dtype))

    @property
    def _row_starts(self) -> Int[Tensor, "rows 1"]:
        """Number of the first position of each row that this process holds."""
        rows = len(self.sparse.kept)
        return torch.arange(0, self.mask.numel(), self.mask.numel() // rows, device=self.mask.device)[:, None]

    def _blocks(self, tensor: Tensor, index: Tensor | slice, *, copy: bool = False) -> Tensor:
        m = self.sparse.pattern.m
        if not isinstance(index, slice):
            return gather_blocks(tensor, m, index)
        if copy:
            tensor = tensor.movedim(1, -1).clone(memory_format=torch.contiguous_format).movedim(-1, 1)
        return to_blocks(tensor, m)

    def _put(self, tensor: Tensor, index: Tensor | slice, blocks: Tensor) -> None:
        if isinstance(index, slice):
            tensor.copy_(from_blocks(blocks, tensor.shape))
        else:
            scatter_blocks_(tensor, index, blocks)


def _rows(values: Tensor, index: Tensor | slice) -> Tensor:
    return values[index] if isinstance(index, slice) else values.index_select(0, index)


def _put_rows(values: Tensor, index: Tensor | slice, rows: Tensor) -> None:
    if isinstance(index, slice):
        values[index].copy_(rows)
    else:
        values.index_copy_(0, index, rows)


def _sum_of_squares(values: Tensor, kept: Tensor, dtype: torch.dtype) -> Float[Tensor, ""]:
    def part(values: Tensor, kept: Tensor) -> Tensor:
        flat = zeroed(values, kept).to(dtype).flatten()
        return torch.dot(flat, flat)

    return torch.stack([part(*piece) for piece in pieces(values, kept)]).sum()
