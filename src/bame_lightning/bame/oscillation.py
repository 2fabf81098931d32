"""Flip history: how often a block's mask has oscillated, and which blocks are frozen for it.

[paper] Oscillation-aware Block Freezing restricts updates to blocks whose mask oscillates often. What counts as an
oscillation, and permanent freezing after a number of them, are ours.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int, Int32
from torch import Tensor


class FlipHistory:
    """What adaptations have done to blocks.

    A block oscillates when it revives a position that it pruned in an earlier adaptation. It counts once per adaptation,
    however many positions come back.

    Args:
        blocks: Number of blocks.
        m: Weights in a block.
        device: Where the history is kept.

    Attributes:
        oscillations: Adaptations so far in which a block oscillated; shape (blocks,).
        pruned_before: Positions that an earlier adaptation pruned; shape (blocks, m).
        quiet: Adaptations since a block last oscillated, or all so far if it never did; shape (blocks,).
    """

    def __init__(self, blocks: int, m: int, device: torch.device | None = None) -> None:
        self.oscillations: Int32[Tensor, " blocks"] = torch.zeros(blocks, dtype=torch.int32, device=device)
        self.pruned_before: Bool[Tensor, "blocks m"] = torch.zeros(blocks, m, dtype=torch.bool, device=device)
        self.quiet: Int32[Tensor, " blocks"] = torch.zeros(blocks, dtype=torch.int32, device=device)

    def record(self, old: Bool[Tensor, "blocks m"], new: Bool[Tensor, "blocks m"]) -> None:
        """Enter an adaptation of all blocks.

        Args:
            old: Mask before.
            new: Mask after.
        """
        oscillates = (new & ~old & self.pruned_before).any(-1)
        self.oscillations += oscillates
        self.pruned_before |= old & ~new
        self.quiet += 1
        self.quiet.masked_fill_(oscillates, 0)

    def record_swaps(
        self,
        blocks: Int[Tensor, " swaps"],
        revived: Int[Tensor, " swaps"],
        pruned: Int[Tensor, " swaps"],
        swapped: Bool[Tensor, " swaps"],
    ) -> None:
        """Enter an adaptation that swaps at most one pair of positions in a block.

        Args:
            blocks: The blocks, each at most once; all others stay as they are.
            revived: The position that is kept from now on, block * m + place.
            pruned: The one that is pruned, likewise.
            swapped: Whether they were swapped.
        """
        before = self.pruned_before.view(-1)
        oscillates = swapped & before[revived]
        self.oscillations.index_add_(0, blocks, oscillates.int())
        before.index_copy_(0, pruned, before[pruned] | swapped)
        self.quiet += 1
        self.quiet.index_copy_(0, blocks, self.quiet[blocks].masked_fill(oscillates, 0))


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


def oscillated_lately(
    oscillations: Int32[Tensor, " blocks"], quiet: Int32[Tensor, " blocks"], adaptations: int
) -> Bool[Tensor, " blocks"]:
    """Blocks that oscillated in one of the latest adaptations.

    Args:
        oscillations: Oscillations per block.
        quiet: Adaptations since then, as `FlipHistory` keeps them.
        adaptations: How many adaptations count as the latest.

    Returns:
        True where a block did.

    Example:
        >>> one, two = torch.tensor([0, 1, 3], dtype=torch.int32), torch.tensor([0, 0, 5], dtype=torch.int32)
        >>> oscillated_lately(one, two, adaptations=5)
        tensor([False,  True, False])
    """
    return (oscillations > 0) & (quiet < adaptations)


def oscillation_frequency(oscillations: Int32[Tensor, " blocks"], adaptations: int) -> Float[Tensor, " blocks"]:
    """Accumulated oscillation frequency: oscillations so far / adaptations so far, per block; 0 before the first.

    Args:
        oscillations: Oscillations per block.
        adaptations: Adaptations so far, the paper's counter c.

    Returns:
        Frequency in [0, 1] per block.
    """
    return oscillations / max(adaptations, 1)
