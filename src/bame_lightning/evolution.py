"""Evolution of one weight: readings -> evidence -> swaps -> new mask, new weights, flip history."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.optim import Optimizer

from bame_lightning.criterion import select_mask
from bame_lightning.designation import blocks_in_share, designate, urgency
from bame_lightning.evidence import Evidence, OneBatch, Reading, noise_step
from bame_lightning.layers import SparseWeight
from bame_lightning.masks import pack_mask, unpack_mask
from bame_lightning.optimizer_state import block_rates, update_rule
from bame_lightning.oscillation import FlipHistory, frozen_blocks, record
from bame_lightning.pattern import from_blocks, gather_blocks, scatter_blocks_, to_blocks
from bame_lightning.statistics import flipped_positions

ALL = slice(None)
MEMORY = 0.9
"""Weight of the past in the running mean of squared gradients, at a reading everywhere."""


class Adaptation(NamedTuple):
    """Outcome of an adaptation.

    Args:
        mask: The new mask; shape (blocks, m).
        weight: The new weights: revived ones start with the sign of their evidence, pruned ones are zero; shape (blocks, m).
        evidence: The new evidence: pruned weights' values go into it, it is zero where kept; shape (blocks, m).
        predicted: Expected loss reduction of the swaps made, summed over blocks, in units of the loss; scalar.
    """

    mask: Bool[Tensor, "blocks m"]
    weight: Float[Tensor, "blocks m"]
    evidence: Float[Tensor, "blocks m"]
    predicted: Float[Tensor, ""]


def adapt(
    latent: Float[Tensor, "blocks m"],
    worth: Float[Tensor, "blocks m"],
    mask: Bool[Tensor, "blocks m"],
    adaptable: Bool[Tensor, " blocks"],
    n: int,
    *,
    share: float = 1.0,
    margin: float | None = None,
) -> Adaptation:
    """Adapt the mask of one weight.

    Args:
        latent: Latent weights: weights where kept, evidence where pruned.
        worth: Their value in units of the loss; the most valuable are kept.
        mask: The mask in force, exactly `n` kept per block.
        adaptable: Blocks that may change.
        n: Weights kept per block.
        share: Confine the swaps to this share of all blocks (rounded up), those of the largest predicted reduction.
        margin: For a worth that grows with the square of a weight: swap only where evidence exceeds the weight that it
            replaces by this share of it, and start revived weights there, however far evidence went since the last
            adaptation: of the size (1 + margin) times the largest weight that is pruned in the block. None knows neither.

    Returns:
        New mask, weights and evidence, and the predicted loss reduction.
    """
    selected = select_mask(worth, mask, n, margin=0.0 if margin is None else (1 + margin) ** 2 - 1)
    proposed = torch.where(adaptable[:, None], selected, mask)
    # Summed over a block: the worth of what is revived less that of what is pruned.
    reduction = (worth * (proposed.to(worth.dtype) - mask.to(worth.dtype))).sum(-1)
    if share < 1:
        best = reduction.argsort(descending=True, stable=True)[: blocks_in_share(share, len(mask))]
        chosen = torch.zeros_like(adaptable).index_fill(0, best, True)
        proposed = torch.where(chosen[:, None], proposed, mask)
        reduction = reduction * chosen
    start = latent
    if margin is not None:
        # All that is revived in a block exceeds this: the last swap's does, and it is the least of them.
        size = (1 + margin) * latent.abs().masked_fill(~mask | proposed, 0).amax(-1, keepdim=True)
        start = torch.where(mask, latent, latent.sign() * size)
    return Adaptation(
        mask=proposed,
        weight=torch.where(proposed, start, 0),
        evidence=torch.where(proposed, 0, latent),
        predicted=reduction.sum(),
    )


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
        evidence: What pruned weights would have become, zero where kept; at least float32, shape (blocks, m).
        learning_time: Steps that each block's evidence took, summed up and forgotten as it is; weights over gradients, shape
            (blocks,).
        noise: Running mean of squared gradients of pruned weights, over readings everywhere; scalar.
        unit: Root mean square of kept weights over that of pruned weights' gradients, at the last reading everywhere: the
            step by which a typical gradient moves evidence as far as a typical weight; scalar.
        history: Oscillations, and positions pruned before.
        designated: Blocks that steps between two readings of all read; shape (chosen,).
        flips: Mask positions changed so far; scalar.
        last_flips: Those that the last adaptation changed; scalar.
        predicted: Loss reduction that the last adaptation predicted; scalar.
        reading: Dense gradient that this step has read; None if it has not.
        read_share: Share of all blocks whose dense gradient the last step read.
        due: Whether all blocks were read since the last adaptation; otherwise only the designated ones were.
    """

    def __init__(self, sparse: SparseWeight, evidence: Evidence | OneBatch, freeze_after: int | None) -> None:
        self.sparse = sparse
        self.config = evidence
        self.freeze_after = freeze_after
        mask = sparse.mask()
        device, self.dtype = mask.device, torch.promote_types(sparse.weight.dtype, torch.float32)
        self.evidence = torch.zeros(mask.shape, device=device, dtype=self.dtype)
        if evidence.init == "weights":
            self.evidence += torch.where(mask, 0, self._blocks(sparse.weight.detach(), ALL))
        self.learning_time = torch.zeros(len(mask), device=device, dtype=self.dtype)
        self.noise = torch.zeros((), device=device, dtype=self.dtype)
        self.unit = torch.zeros((), device=device, dtype=self.dtype)
        self.history = FlipHistory.empty(mask)
        self.designated = torch.zeros(0, dtype=torch.int64, device=device)
        self.flips = torch.zeros((), dtype=torch.int64, device=device)
        self.last_flips = torch.zeros((), dtype=torch.int64, device=device)
        self.predicted = torch.zeros((), device=device, dtype=self.dtype)
        self.reading: BlockGradient | None = None
        self.read_share = 0.0
        self.due = False

    @property
    def frozen(self) -> Bool[Tensor, " blocks"]:
        """Blocks whose mask is final."""
        return frozen_blocks(self.history.oscillations, self.freeze_after)

    def read(self, everywhere: bool) -> None:
        """Copy the dense gradient of all unfrozen or of the designated blocks, before it is masked."""
        gradient = self.sparse.weight.grad
        if gradient is None:
            self.reading, self.read_share = None, 0.0
            return
        index: Tensor | slice = self.designated
        if everywhere:
            frozen = self.frozen
            index = (~frozen).nonzero().squeeze(-1) if self.freeze_after is not None and frozen.any() else ALL
            self.due = True
        self.read_share = 1.0 if isinstance(index, slice) else len(index) / len(self.learning_time)
        self.reading = BlockGradient(index, self._blocks(gradient, index).to(self.dtype, copy=True))

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
            self.learning_time.zero_()
        if self.reading is None:
            return
        index = self.reading.blocks
        # Selecting, not multiplying: infinity times zero is NaN.
        gradient = torch.where(finite, self.reading.gradient, 0)
        self.reading = BlockGradient(index, gradient)
        mask = ~self._blocks(self.sparse.pruned, index)
        pruned_gradient = gradient.masked_fill(mask, 0)
        if self.config.remembers:
            if reading.everywhere:
                self._measure(pruned_gradient, finite)
            rate = reading.steps * noise_step(window, self.sparse.pattern.m) * self.unit
        else:
            rate = reading.steps * self._optimizer_step(optimizer, mask)
        # The optimizer's second moment may be poisoned as well.
        rate = torch.where(finite, rate, 0)
        keep = 1 - finite.to(self.dtype) * (reading.forgets / max(1, window))
        self.evidence[index] = keep * self.evidence[index] - rate * pruned_gradient
        self.learning_time[index] = keep * self.learning_time[index] + rate.squeeze(-1)

    def _measure(self, pruned_gradient: Tensor, finite: Tensor) -> None:
        """Follow the size of gradients and of weights at a reading everywhere."""
        pattern = self.sparse.pattern
        square = pruned_gradient.square().sum() / max(1, len(pruned_gradient) * (pattern.m - pattern.n))
        running = torch.where(self.noise > 0, torch.lerp(square, self.noise, MEMORY), square)
        # The square of a finite gradient may overflow.
        self.noise = torch.where(finite & running.isfinite(), running, self.noise)
        # The optimizer may have moved pruned weights, which are zeroed only later.
        kept = self.sparse.weight.detach().masked_fill(self.sparse.pruned, 0)
        weights = kept.to(self.dtype).square().mean() / pattern.density
        self.unit = torch.where(self.noise > 0, (weights / self.noise).sqrt(), 0)

    def _optimizer_step(self, optimizer: Optimizer, mask: Tensor) -> Tensor:
        assert self.reading is not None
        index, gradient = self.reading
        rule = update_rule(optimizer, self.sparse.weight)
        moment = None if rule.second_moment is None else self._blocks(rule.second_moment, index)
        return block_rates(rule, moment, gradient, mask, self.sparse.pattern.n)

    def designate(self, share: float) -> None:
        """Choose the blocks to read until the next reading of all."""
        weight = self._blocks(self.sparse.weight.detach(), ALL).to(self.dtype)
        self.designated = designate(urgency(weight, self.evidence, self.sparse.mask()), self.frozen, share)

    def adapt(self, share: float) -> None:
        """Adapt masks by swapping weights in place: in the blocks that were read since the last adaptation."""
        pattern, weight = self.sparse.pattern, self.sparse.weight.detach()
        index, self.due = (ALL, False) if self.due else (self.designated, False)
        mask = ~self._blocks(self.sparse.pruned, index)
        latent = torch.where(mask, self._blocks(weight, index).to(self.dtype), self.evidence[index])
        time, history = self.learning_time[index], FlipHistory(*(values[index] for values in self.history))
        # A block that was never read knows nothing of its pruned weights.
        adaptable = (time > 0) & ~frozen_blocks(history.oscillations, self.freeze_after)
        # Laid out only for the criterion that asks for it: masks adapt every other step.
        gradient = None if self.config.remembers else self._gradient(index)
        worth = self.config.worth(latent, time, gradient)
        new = adapt(latent, worth, mask, adaptable, pattern.n, share=share, margin=self.config.margin)
        self._put(weight, index, new.weight)
        self._put(self.sparse.pruned, index, ~new.mask)
        self.evidence[index] = new.evidence
        for values, changed in zip(self.history, record(history, mask, new.mask), strict=True):
            values[index] = changed
        if self.freeze_after is not None:
            self.designated = self.designated[~self.frozen[self.designated]]
        self.last_flips = flipped_positions(mask, new.mask)
        self.flips += self.last_flips
        self.predicted = new.predicted

    def state_dict(self) -> dict[str, Any]:
        """All that evolves beside the mask, compact: evidence of pruned positions only, a bit per mask position."""
        state = {
            "evidence": self.evidence[~self.sparse.mask()],
            "learning_time": self.learning_time,
            "noise": self.noise,
            "unit": self.unit,
            "oscillations": self.history.oscillations,
            "pruned_before": pack_mask(self.history.pruned_before),
            "designated": self.designated.int(),
            "due": torch.tensor(self.due),
            "flips": self.flips,
            "last_flips": self.last_flips,
            "predicted": self.predicted,
        }
        # Copies: a checkpoint may be written while training goes on.
        return {key: value.detach().cpu().clone() for key, value in state.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; the mask must have been restored before."""
        # Copies: training goes on in place, and the checkpoint is the caller's.
        device = self.evidence.device
        state = {key: value.to(device, copy=True) for key, value in state.items() if isinstance(value, Tensor)}
        mask = self.sparse.mask()
        self.evidence = torch.zeros_like(self.evidence).masked_scatter(~mask, state["evidence"].to(self.dtype))
        self.learning_time = state["learning_time"].to(self.dtype)
        self.noise, self.unit = state["noise"].to(self.dtype), state["unit"].to(self.dtype)
        self.history = FlipHistory(state["oscillations"], unpack_mask(state["pruned_before"], mask.shape))
        self.designated, self.due = state["designated"].long(), bool(state["due"])
        self.flips, self.last_flips = state["flips"], state["last_flips"]
        self.predicted = state["predicted"].to(self.dtype)

    def _blocks(self, tensor: Tensor, index: Tensor | slice) -> Tensor:
        m = self.sparse.pattern.m
        return to_blocks(tensor, m) if isinstance(index, slice) else gather_blocks(tensor, m, index)

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
        if not isinstance(blocks, slice):
            gradient = torch.zeros_like(self.evidence).index_copy(0, blocks, gradient)
        return gradient[index]
