"""Evolution of one weight: readings -> evidence -> swaps -> new mask, new weights, flip history."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.optim import Optimizer

from bame_lightning.blocks import from_blocks, gather_blocks, scatter_blocks_, to_blocks
from bame_lightning.criterion import select_mask
from bame_lightning.designation import MostUrgent, blocks_in_share, designate, most_urgent, urgency
from bame_lightning.evidence import Evidence, OneBatch, Reading, noise_step
from bame_lightning.layers import SparseWeight
from bame_lightning.masks import pack_mask, pieces, unpack_mask, zero_pruned_, zeroed
from bame_lightning.optimizer_state import block_rates, update_rule
from bame_lightning.oscillation import FlipHistory, frozen_blocks, mask_ages, record
from bame_lightning.sharding import ALL_ROWS, Rows, local
from bame_lightning.statistics import flipped_positions
from bame_lightning.working_set import BlockState, WorkingSet

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
        best = rows.own_index(ranked[: blocks_in_share(share, len(ranked))], len(mask))
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


class BlockGradient(NamedTuple):
    """Dense gradient of some blocks.

    Args:
        blocks: Which blocks: their indices, or a slice of all.
        gradient: Their gradient in float32; shape (chosen, m).
    """

    blocks: Int[Tensor, " chosen"] | slice
    gradient: Float[Tensor, "chosen m"]


class EvolvingWeight:
    """A sparse weight with all that evolves in its blocks beside the mask.

    Args:
        sparse: The weight and its mask, which `adapt` changes in place.
        evidence: What is known of pruned weights. With `init="weights"` it starts at their values, so make this object
            before they are zeroed.
        freeze_after: Oscillations that a block may make; one more freezes its mask. None never freezes.

    Attributes:
        mask: The mask in blocks: a view of that of `sparse`, or a copy where blocks are not contiguous in it.
        evidence: What pruned weights would have become, zero where kept; at least float32, shape (blocks, m).
        mean_gradient: Running mean of pruned weights' gradients over a block's readings, like `evidence`; None without
            `momentum`.
        noise: Running mean of squared gradients of pruned weights, over readings everywhere; scalar.
        unit: Root mean square of kept weights over that of pruned weights' gradients, at the last reading everywhere: the
            step by which a typical gradient moves evidence as far as a typical weight; scalar.
        history: Oscillations, and positions pruned before.
        ages: Adaptations since the mask of a block last changed, or all so far; shape (blocks,).
        designated: Blocks that steps between two readings of all read; shape (chosen,).
        flips: Mask positions changed so far; scalar.
        last_flips: Those that the last adaptation changed; scalar.
        predicted: Loss reduction that the last adaptation predicted, to first order; scalar, in units of the loss.
        reading: Dense gradient that this step has read; None if it has not.
        read_share: Share of all blocks whose dense gradient the last step read.
        due: Whether all blocks were read since the last adaptation; otherwise only the designated ones were.
    """

    def __init__(self, sparse: SparseWeight, evidence: Evidence | OneBatch, freeze_after: int | None) -> None:
        self.sparse = sparse
        self.config = evidence
        self.freeze_after = freeze_after
        self.mask = mask = sparse.mask()
        device, self.dtype = mask.device, torch.promote_types(sparse.weight.dtype, torch.float32)
        self._working_set: WorkingSet | None = None
        self.evidence = torch.zeros(mask.shape, device=device, dtype=self.dtype)
        if evidence.init == "weights":
            self.evidence += torch.where(mask, 0, self._blocks(sparse.values, ALL))
        self.mean_gradient = torch.zeros_like(self.evidence) if evidence.momentum > 0 else None
        self.noise = torch.zeros((), device=device, dtype=self.dtype)
        self.unit = torch.zeros((), device=device, dtype=self.dtype)
        self.history = FlipHistory.empty(mask)
        self.ages = torch.zeros_like(self.history.oscillations)
        self.designated = torch.zeros(0, dtype=torch.int64, device=device)
        self.flips = torch.zeros((), dtype=torch.int64, device=device)
        self.last_flips = torch.zeros((), dtype=torch.int64, device=device)
        self.predicted = torch.zeros((), device=device, dtype=self.dtype)
        self.reading: BlockGradient | None = None
        self.read_share = 0.0
        self.due = False

    @property
    def evidence(self) -> Float[Tensor, "blocks m"]:
        """Evidence of all blocks."""
        self._put_back()
        return self._evidence

    @evidence.setter
    def evidence(self, evidence: Float[Tensor, "blocks m"]) -> None:
        self._put_back()
        self._evidence = evidence

    @property
    def mean_gradient(self) -> Float[Tensor, "blocks m"] | None:
        """Running mean of gradients of all blocks."""
        self._put_back()
        return self._mean_gradient

    @mean_gradient.setter
    def mean_gradient(self, mean: Float[Tensor, "blocks m"] | None) -> None:
        self._put_back()
        self._mean_gradient = mean

    @property
    def frozen(self) -> Bool[Tensor, " blocks"]:
        """Blocks whose mask is final."""
        return frozen_blocks(self.history.oscillations, self.freeze_after)

    def read(self, everywhere: bool) -> None:
        """Copy the dense gradient of all unfrozen or of the designated blocks, before it is masked."""
        gradient = self.sparse.gradient
        if gradient is None:
            self.reading, self.read_share = None, 0.0
            return
        index: Tensor | slice = self.designated
        if everywhere:
            frozen = self.frozen
            index = (~frozen).nonzero().squeeze(-1) if self.freeze_after is not None and frozen.any() else ALL
        self.read_share = 1.0 if isinstance(index, slice) else len(index) / len(self.mask)
        self.reading = BlockGradient(index, self._blocks(gradient, index, copy=True).to(self.dtype))

    def extremes(self) -> list[Tensor]:
        """Least and largest value of what this step has read; NaN if there is one among them."""
        return list(self.reading.gradient.aminmax()) if self.reading and self.reading.gradient.numel() else []

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
        self.due |= reading.everywhere
        index, gradient = self.reading
        if self.config.remembers:
            if reading.everywhere:
                self._measure(finite)
            rate = reading.steps * noise_step(window, self.sparse.pattern.m) * self.unit
        else:
            zero_pruned_(gradient, finite)
            rate = reading.steps * self._optimizer_step(optimizer)
        # The optimizer's second moment may be poisoned as well.
        rate = torch.where(finite, rate, 0).expand(len(gradient), 1)
        keep = 1 - finite.to(self.dtype) * (reading.forgets / max(1, window))
        state = self._at(index)
        for read, chosen in _pieces(index, gradient):
            seen = gradient[read]
            zero_pruned_(seen, finite)
            change = zeroed(seen, ~state.kept[read])
            if state.mean is not None:
                change = self._average(chosen, change, state.mean[read], finite)
            state.evidence[read].mul_(keep).addcmul_(change, rate[read], value=-1)

    def _average(
        self,
        index: Int[Tensor, " chosen"] | slice,
        pruned_gradient: Float[Tensor, "chosen m"],
        mean: Float[Tensor, "chosen m"],
        finite: Bool[Tensor, ""],
    ) -> Float[Tensor, "chosen m"]:
        """Move the running mean of gradients by what was read of these blocks, in place; returns what evidence follows."""
        return mean.lerp_(pruned_gradient, (1 - self.config.momentum) * finite.to(self.dtype))

    def _measure(self, finite: Tensor) -> None:
        """Follow the size of gradients and of weights at a reading everywhere, both over all rows of the layer."""
        assert self.reading is not None
        pattern, (index, gradient) = self.sparse.pattern, self.reading
        gradients = _sum_of_squares(gradient, ~_rows(self.mask, index), self.dtype)
        # The optimizer may have moved pruned weights, which are zeroed only later.
        weights = _sum_of_squares(self.sparse.values, self.sparse.kept, self.dtype)
        read: int | Tensor = max(1, len(gradient) * (pattern.m - pattern.n))
        if not self.sparse.rows.whole:
            sums = torch.stack((gradients, weights, gradients.new_tensor(read)))
            gradients, weights, read = self.sparse.rows.total(sums).unbind()
        square = gradients / read
        running = torch.where(self.noise > 0, torch.lerp(square, self.noise, MEMORY), square)
        # The square of a finite gradient may overflow.
        self.noise = torch.where(finite & running.isfinite(), running, self.noise)
        weights = weights / (self.sparse.weight.numel() * pattern.density)
        self.unit = torch.where(self.noise > 0, (weights / self.noise).sqrt(), 0)

    def _optimizer_step(self, optimizer: Optimizer) -> Tensor:
        assert self.reading is not None
        index, gradient = self.reading
        rule = update_rule(optimizer, self.sparse.weight)
        moment = rule.second_moment
        if moment is not None:
            moment = self._blocks(self.sparse.oriented(local(moment)), index)
        return block_rates(rule, moment, gradient, _rows(self.mask, index), self.sparse.pattern.n)

    def urgency(self, index: Int[Tensor, " chosen"] | slice = ALL) -> Float[Tensor, " chosen"]:
        """How close all or some blocks are to a swap: `designation.urgency`."""
        weight, state = self._blocks(self.sparse.values, index), self._at(index)
        return urgency(weight, state.evidence[: len(weight)], state.kept[: len(weight)])

    def designate(self, share: float) -> None:
        """Choose the blocks to read until the next reading of all."""
        pressing, rows = self.urgency(), self.sparse.rows
        frozen = None if self.freeze_after is None else rows.gather(self.frozen)
        chosen = designate(rows.gather(pressing), frozen, share)
        self.designated = rows.own_index(chosen, len(pressing))

    def adapt(self, share: float) -> None:
        """Adapt masks by swapping weights in place: in the blocks that were read since the last adaptation."""
        if not self.sparse.weight.requires_grad:
            # Somebody has frozen the layer since: a weight that moved would be no frozen one.
            self.last_flips, self.predicted = torch.zeros_like(self.flips), torch.zeros_like(self.predicted)
            return
        pattern, weight = self.sparse.pattern, self.sparse.values
        index, self.due = (ALL, False) if self.due else (self.designated, False)
        state, adaptable = self._at(index), self._adaptable(index)
        places: Tensor | slice = ALL if isinstance(index, slice) else slice(len(index))
        if self.config.one_per_row:
            # Nothing else changes, so that the rest is done for one block of each row only.
            index, adaptable = self._most_urgent(index, adaptable)
            places = self._places(index)
        mask, evidence = _rows(self.mask, index).clone(), _rows(state.evidence, places)
        # The optimizer may have moved pruned weights, which are zeroed only later.
        old = self._blocks(weight, index, copy=True).to(self.dtype)
        zero_pruned_(old, mask)
        latent = old + evidence
        history = FlipHistory(*(_rows(values, index) for values in self.history))
        worth, margin = self._worth(latent, index), self.config.margin
        new = adapt(latent, worth, mask, adaptable, pattern.n, share=share, margin=margin, rows=self.sparse.rows)
        self._put(weight, index, new.weight)
        self._put(self.sparse.kept, index, new.mask)
        _put_rows(self.mask, index, new.mask)
        _put_rows(state.kept, places, new.mask)
        _put_rows(state.evidence, places, new.evidence)
        if state.mean is not None:
            # What is revived starts without a past, and so does what is pruned.
            _put_rows(state.mean, places, zeroed(_rows(state.mean, places), ~new.mask))
        for values, changed in zip(self.history, record(history, mask, new.mask), strict=True):
            _put_rows(values, index, changed)
        ages = mask_ages(_rows(self.ages, index), mask, new.mask)
        self.ages += 1
        _put_rows(self.ages, index, ages)
        if self.freeze_after is not None:
            self.designated = self.designated[~self.frozen[self.designated]]
        self.last_flips = flipped_positions(mask, new.mask)
        self.flips += self.last_flips
        self.predicted = self._first_order(index, new.weight - old)

    def _at(self, index: Int[Tensor, " chosen"] | slice) -> BlockState:
        """What evolves in all blocks, or in some, which are gathered the first time; those have a row more than asked for."""
        if not isinstance(index, slice) and self._working_set is not None and self._working_set.index is index:
            return self._working_set.state
        state = BlockState(self.mask, self.evidence, self.mean_gradient)
        if isinstance(index, slice):
            return state
        self._working_set = WorkingSet(index, state)
        return self._working_set.state

    def _places(self, index: Int[Tensor, " wanted"]) -> Int[Tensor, " wanted"]:
        """Where blocks are in the state that was asked for last."""
        return index if self._working_set is None else self._working_set.places(index)

    def _put_back(self) -> None:
        if self._working_set is not None:
            self._working_set.put_back()
            self._working_set = None

    def _worth(self, latent: Float[Tensor, "chosen m"], index: Tensor | slice) -> Float[Tensor, "chosen m"]:
        # Laid out only for the criterion that asks for it: masks adapt every other step.
        return self.config.worth(latent, None if self.config.remembers else self._gradient(index))

    def _adaptable(self, index: Tensor | slice) -> Bool[Tensor, "#chosen"]:
        """Blocks that may change: not before anything is known of their pruned weights, and not once they are frozen."""
        known = self.noise > 0 if self.config.remembers else torch.ones_like(self.noise, dtype=torch.bool)
        if self.freeze_after is None:
            return known[None]
        return known & ~frozen_blocks(_rows(self.history.oscillations, index), self.freeze_after)

    def _most_urgent(self, index: Tensor | slice, adaptable: Bool[Tensor, "#chosen"]) -> MostUrgent:
        """The one block of each output row that may adapt, of those at `index`."""
        pressing = self.urgency(index).masked_fill(~adaptable, -1)
        rows = len(self.sparse.kept)
        return most_urgent(pressing, None if isinstance(index, slice) else index, rows, len(self.mask) // rows)

    def _first_order(self, index: Tensor | slice, change: Float[Tensor, "chosen m"]) -> Float[Tensor, ""]:
        r"""Loss reduction that the gradient of this step predicts for a change of weights: $-\langle g, \Delta w \rangle$.

        Only over the blocks that this step has read: of others no gradient is known.
        """
        gradient = self._gradient(index)
        return (
            torch.zeros_like(self.predicted) if gradient is None else -torch.dot(gradient.flatten(), change.flatten())
        )

    def state_dict(self) -> dict[str, Any]:
        """All that evolves beside the mask, of all rows: evidence of pruned positions only, a bit per mask position."""
        rows = self.sparse.rows
        state = {
            # Every row has as many pruned positions as any other.
            "evidence": rows.gather(self.evidence[~self.mask]),
            "mean_gradient": None if self.mean_gradient is None else rows.gather(self.mean_gradient[~self.mask]),
            "noise": self.noise,
            "unit": self.unit,
            "oscillations": rows.gather(self.history.oscillations),
            "ages": rows.gather(self.ages),
            "pruned_before": pack_mask(rows.gather(self.history.pruned_before)),
            "designated": rows.gather_index(self.designated, len(self.evidence)).int(),
            "due": torch.tensor(self.due),
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
        if self.mean_gradient is not None:
            self.mean_gradient = self._pruned(mask, state["mean_gradient"])
        self.noise, self.unit = state["noise"].to(self.dtype), state["unit"].to(self.dtype)
        everywhere = torch.Size((len(mask) * rows.parts, mask.shape[1]))
        before = rows.own(unpack_mask(state["pruned_before"], everywhere))
        self.history = FlipHistory(rows.own(state["oscillations"]), before)
        self.ages = rows.own(state["ages"])
        self.designated, self.due = rows.own_index(state["designated"].long(), len(mask)), bool(state["due"])
        self.flips, self.last_flips = rows.part_of(state["flips"]), rows.part_of(state["last_flips"])
        self.predicted = rows.part_of(state["predicted"].to(self.dtype))

    def _pruned(self, mask: Tensor, values: Tensor) -> Float[Tensor, "blocks m"]:
        """Lay out what was saved of pruned positions."""
        return torch.zeros_like(self.evidence).masked_scatter(~mask, self.sparse.rows.own(values).to(self.dtype))

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

    def _gradient(self, index: Tensor | slice) -> Tensor | None:
        """The reading of this step in these blocks, zero where they were not read."""
        if self.reading is None:
            return None
        blocks, gradient = self.reading
        if isinstance(blocks, slice):
            return _rows(gradient, index)
        if isinstance(index, slice) or not len(blocks):
            return _rows(torch.zeros_like(self.evidence).index_copy_(0, blocks, gradient), index)
        # Blocks that were read are in order.
        place = torch.searchsorted(blocks.contiguous(), index.contiguous()).clamp_max_(len(blocks) - 1)
        found = gradient.index_select(0, place)
        zero_pruned_(found, (blocks.index_select(0, place) == index)[:, None])
        return found


def _rows(values: Tensor, index: Tensor | slice) -> Tensor:
    return values[index] if isinstance(index, slice) else values.index_select(0, index)


def _put_rows(values: Tensor, index: Tensor | slice, rows: Tensor) -> None:
    if isinstance(index, slice):
        values[index].copy_(rows)
    else:
        values.index_copy_(0, index, rows)


def _pieces(index: Tensor | slice, read: Tensor) -> Iterator[tuple[slice, Tensor | slice]]:
    """Where to find blocks among those that were read, and which these are, in pieces as `masks.pieces` cuts them."""
    begin = 0
    for (part,) in pieces(read):
        rows = slice(begin, begin + len(part))
        yield rows, rows if isinstance(index, slice) else index[rows]
        begin = rows.stop


def _sum_of_squares(values: Tensor, kept: Tensor, dtype: torch.dtype) -> Float[Tensor, ""]:
    def part(values: Tensor, kept: Tensor) -> Tensor:
        flat = zeroed(values, kept).to(dtype).flatten()
        return torch.dot(flat, flat)

    return torch.stack([part(*piece) for piece in pieces(values, kept)]).sum()
