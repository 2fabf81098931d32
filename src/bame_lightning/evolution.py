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
from bame_lightning.evidence import Evidence, OneBatch, accumulate
from bame_lightning.layers import SparseWeight
from bame_lightning.masks import pack_mask, unpack_mask
from bame_lightning.optimizer_state import block_rates, update_rule
from bame_lightning.oscillation import FlipHistory, frozen_blocks, record
from bame_lightning.pattern import from_blocks, gather_blocks, to_blocks
from bame_lightning.statistics import flipped_positions


class Adaptation(NamedTuple):
    """Outcome of an adaptation.

    Args:
        mask: The new mask; shape (blocks, m).
        weight: The new weights: revived ones start at their evidence, pruned ones are zero; shape (blocks, m).
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
    share: float = 1.0,
) -> Adaptation:
    """Adapt the mask of one weight.

    Args:
        latent: Latent weights: weights where kept, evidence where pruned.
        worth: Their value in units of the loss; the most valuable are kept.
        mask: The mask in force, exactly `n` kept per block.
        adaptable: Blocks that may change.
        n: Weights kept per block.
        share: Confine the swaps to this share of all blocks (rounded up), those of the largest predicted reduction.

    Returns:
        New mask, weights and evidence, and the predicted loss reduction.
    """
    proposed = torch.where(adaptable[:, None], select_mask(worth, mask, n), mask)
    # Summed over a block: the worth of what is revived less that of what is pruned.
    reduction = (worth * (proposed.to(worth.dtype) - mask.to(worth.dtype))).sum(-1)
    if share < 1:
        best = reduction.argsort(descending=True, stable=True)[: blocks_in_share(share, len(mask))]
        chosen = torch.zeros_like(adaptable).index_fill(0, best, True)
        proposed = torch.where(chosen[:, None], proposed, mask)
        reduction = reduction * chosen
    return Adaptation(
        mask=proposed,
        weight=torch.where(proposed, latent, 0),
        evidence=torch.where(proposed, 0, latent),
        predicted=reduction.sum(),
    )


class BlockGradient(NamedTuple):
    """Dense gradient of some blocks.

    Args:
        blocks: Which blocks; None for all.
        gradient: Their gradient in float32; shape (chosen, m).
    """

    blocks: Int[Tensor, " chosen"] | None
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
        learning_time: Learning rate times steps of each block's readings, summed up and decaying as the evidence does;
            shape (blocks,).
        history: Oscillations, and positions pruned before.
        designated: Blocks that steps between two readings of all read; shape (chosen,).
        flips: Mask positions changed so far; scalar.
        last_flips: Those that the last adaptation changed; scalar.
        predicted: Loss reduction that the last adaptation predicted; scalar.
        reading: Dense gradient that this step has read; None if it has not.
        read_share: Share of all blocks whose dense gradient the last step read.
    """

    def __init__(self, sparse: SparseWeight, evidence: Evidence | OneBatch, freeze_after: int | None) -> None:
        self.sparse = sparse
        self.config = evidence
        self.freeze_after = freeze_after
        mask = sparse.mask()
        device, self.dtype = mask.device, torch.promote_types(sparse.weight.dtype, torch.float32)
        self.evidence = torch.zeros(mask.shape, device=device, dtype=self.dtype)
        if evidence.init == "weights":
            self.evidence += torch.where(mask, 0, self._blocks(sparse.weight.detach()))
        self.learning_time = torch.zeros(len(mask), device=device, dtype=self.dtype)
        self.history = FlipHistory.empty(mask)
        self.designated = torch.zeros(0, dtype=torch.int64, device=device)
        self.flips = torch.zeros((), dtype=torch.int64, device=device)
        self.last_flips = torch.zeros((), dtype=torch.int64, device=device)
        self.predicted = torch.zeros((), device=device, dtype=self.dtype)
        self.reading: BlockGradient | None = None
        self.read_share = 0.0

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
        index: Tensor | None = self.designated
        if everywhere:
            frozen = self.frozen
            index = (~frozen).nonzero().squeeze(-1) if frozen.any() else None
        self.read_share = 1.0 if index is None else len(index) / len(self.learning_time)
        self.reading = BlockGradient(index, self._blocks(gradient, index).to(self.dtype, copy=True))

    def accumulate(self, optimizer: Optimizer, steps: int, finite: Bool[Tensor, ""]) -> None:
        """Move the evidence by the reading.

        Args:
            optimizer: The optimizer that has just stepped on it.
            steps: Optimizer steps that the reading stands for, r.
            finite: False discards the reading, on the device.
        """
        if not self.config.remembers:
            self.evidence.zero_()
            self.learning_time.zero_()
        if self.reading is None:
            return
        index = self.reading.blocks
        chosen = slice(None) if index is None else index
        mask = ~self._blocks(self.sparse.pruned, index)
        rule = update_rule(optimizer, self.sparse.weight)
        moment = None if rule.second_moment is None else self._blocks(rule.second_moment, index)
        scale = steps * self.config.step_size * finite.to(self.dtype)
        rate = scale * block_rates(rule, moment, self.reading.gradient, mask, self.sparse.pattern.n)
        shrink = scale * rule.learning_rate * (rule.weight_decay + self.config.decay)
        # Selecting, not multiplying: infinity times zero is NaN. The optimizer's second moment may be poisoned as well.
        rate, gradient = torch.where(finite, rate, 0), torch.where(finite, self.reading.gradient, 0)
        self.reading = BlockGradient(index, gradient)
        self.evidence[chosen] = accumulate(self.evidence[chosen], gradient.masked_fill(mask, 0), rate, shrink)
        self.learning_time[chosen] = (1 - shrink) * self.learning_time[chosen] + rate.squeeze(-1)

    def designate(self, share: float) -> None:
        """Choose the blocks to read until the next reading of all."""
        weight = self._blocks(self.sparse.weight.detach()).to(self.dtype)
        self.designated = designate(urgency(weight, self.evidence, self.sparse.mask()), self.frozen, share)

    def adapt(self, share: float) -> None:
        """Adapt the mask: swap weights in place, and enter the swaps into the history."""
        pattern, weight, mask = self.sparse.pattern, self.sparse.weight.detach(), self.sparse.mask()
        latent = torch.where(mask, self._blocks(weight).to(self.dtype), self.evidence)
        worth = self.config.worth(latent, self.learning_time, self._gradient())
        # A block that was never read knows nothing of its pruned weights.
        adaptable = ~self.frozen & (self.learning_time > 0)
        new = adapt(latent, worth, mask, adaptable, pattern.n, share)
        weight.copy_(from_blocks(new.weight, weight.shape))
        self.sparse.pruned.copy_(~from_blocks(new.mask, weight.shape))
        self.evidence = new.evidence
        self.history = record(self.history, mask, new.mask)
        self.designated = self.designated[~self.frozen[self.designated]]
        self.last_flips = flipped_positions(mask, new.mask)
        self.flips += self.last_flips
        self.predicted = new.predicted

    def state_dict(self) -> dict[str, Any]:
        """All that evolves beside the mask, compact: evidence of pruned positions only, a bit per mask position."""
        state = {
            "evidence": self.evidence[~self.sparse.mask()],
            "learning_time": self.learning_time,
            "oscillations": self.history.oscillations,
            "pruned_before": pack_mask(self.history.pruned_before),
            "designated": self.designated.int(),
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
        self.history = FlipHistory(state["oscillations"], unpack_mask(state["pruned_before"], mask.shape))
        self.designated = state["designated"].long()
        self.flips, self.last_flips = state["flips"], state["last_flips"]
        self.predicted = state["predicted"].to(self.dtype)

    def _blocks(self, tensor: Tensor, index: Tensor | None = None) -> Tensor:
        m = self.sparse.pattern.m
        return to_blocks(tensor, m) if index is None else gather_blocks(tensor, m, index)

    def _gradient(self) -> Tensor | None:
        """The reading of this step, zero in blocks that were not read."""
        if self.reading is None or self.reading.blocks is None:
            return self.reading and self.reading.gradient
        return torch.zeros_like(self.evidence).index_copy(0, self.reading.blocks, self.reading.gradient)
