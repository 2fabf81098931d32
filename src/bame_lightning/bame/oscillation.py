"""Flip history: how often a block's mask has oscillated, and which blocks are frozen for it.

[paper] Oscillation-aware Block Freezing restricts updates to blocks whose mask oscillates often. What counts as an
oscillation, and permanent freezing after a number of them, are ours.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int32
from torch import Tensor


class FlipHistory(NamedTuple):
    """What adaptations have done to the blocks of one weight.

    Args:
        oscillations: Adaptations so far in which a block oscillated; shape (blocks,).
        pruned_before: Positions that an earlier adaptation pruned; shape (blocks, m).
    """

    oscillations: Int32[Tensor, " blocks"]
    pruned_before: Bool[Tensor, "blocks m"]

    @classmethod
    def empty(cls, mask: Bool[Tensor, "blocks m"]) -> FlipHistory:
        """History of blocks that have never changed."""
        return cls(torch.zeros(len(mask), dtype=torch.int32, device=mask.device), torch.zeros_like(mask))


def record(history: FlipHistory, old: Bool[Tensor, "blocks m"], new: Bool[Tensor, "blocks m"]) -> FlipHistory:
    """Enter one adaptation into the history.

    A block oscillates when it revives a position that it pruned in an earlier adaptation. It counts once per adaptation,
    however many positions come back.

    Args:
        history: History before the adaptation.
        old: Mask before.
        new: Mask after.

    Returns:
        History after the adaptation.
    """
    returned = (new & ~old & history.pruned_before).any(-1)
    return FlipHistory(history.oscillations + returned, history.pruned_before | (old & ~new))


def mask_ages(
    ages: Int32[Tensor, " blocks"], old: Bool[Tensor, "blocks m"], new: Bool[Tensor, "blocks m"]
) -> Int32[Tensor, " blocks"]:
    """Count the adaptations that the mask of each block has outlived.

    Args:
        ages: Before an adaptation: adaptations since the mask last changed, or all so far if it never did.
        old: Mask before.
        new: Mask after.

    Returns:
        Ages after the adaptation: 0 where the mask changed, one more elsewhere.
    """
    return (ages + 1).masked_fill((old ^ new).any(-1), 0)


def frozen_blocks(oscillations: Int32[Tensor, " blocks"], freeze_after: int | None) -> Bool[Tensor, " blocks"]:
    """Blocks whose mask is final because they oscillated more than `freeze_after` times.

    Args:
        oscillations: Oscillations per block.
        freeze_after: Oscillations that a block may make; None freezes nothing.

    Returns:
        True where frozen.
    """
    if freeze_after is None:
        return torch.zeros_like(oscillations, dtype=torch.bool)
    return oscillations > freeze_after


def oscillation_frequency(oscillations: Int32[Tensor, " blocks"], adaptations: int) -> Float[Tensor, " blocks"]:
    """Accumulated oscillation frequency: oscillations so far / adaptations so far, per block; 0 before the first.

    Args:
        oscillations: Oscillations per block.
        adaptations: Adaptations so far, the paper's counter c.

    Returns:
        Frequency in [0, 1] per block.
    """
    return oscillations / max(adaptations, 1)
