"""Flip history: how often a block's mask has oscillated, and which blocks are frozen for it.

[paper] Oscillation-aware Block Freezing restricts updates to blocks whose mask oscillates often. What counts as an
oscillation, and permanent freezing after a number of them, are ours.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int, Int32, UInt8
from torch import Tensor

from bame_lightning.blocks.masks import pack_mask, unpack_mask


class FlipHistory:
    """What adaptations have done to blocks.

    A block oscillates when it revives a position that it pruned in an earlier adaptation. It counts once per adaptation,
    however many positions come back.

    Args:
        blocks: Number of blocks.
        m: Weights in a block.
        device: Where the history is kept.

    Attributes:
        adaptations: Adaptations so far.
        oscillations: Adaptations in which a block oscillated; shape (blocks,).
        last: The adaptation in which it did so last, counted from 1; 0 or less if it never did. Shape (blocks,).
    """

    def __init__(self, blocks: int, m: int, device: torch.device | None = None) -> None:
        self.adaptations = 0
        self.oscillations: Int32[Tensor, " blocks"] = torch.zeros(blocks, dtype=torch.int32, device=device)
        self.last: Int32[Tensor, " blocks"] = torch.zeros_like(self.oscillations)
        # Positions that an earlier adaptation pruned, as bits: each block has bytes of its own.
        self._bits = _pack(torch.eye(m, dtype=torch.bool, device=device))
        self._pruned_before = torch.zeros(blocks, self._bits.shape[1], dtype=torch.uint8, device=device)

    def quiet(self, blocks: slice = slice(None)) -> Int32[Tensor, " some"]:
        """Adaptations since some blocks last oscillated, or all so far if one never did."""
        return self.adaptations - self.last[blocks]

    def pruned_before(self, blocks: slice = slice(None)) -> Bool[Tensor, "some m"]:
        """Positions of some blocks that an earlier adaptation pruned."""
        own, m = self._pruned_before[blocks], len(self._bits)
        return unpack_mask(own.flatten(), torch.Size((len(own), 8 * own.shape[1])))[:, :m]

    def restore(
        self,
        blocks: slice,
        oscillations: Int[Tensor, " some"],
        quiet: Int[Tensor, " some"],
        pruned_before: Bool[Tensor, "some m"],
    ) -> None:
        """Go on with what was known of some blocks."""
        self.oscillations[blocks] = oscillations
        self.last[blocks] = self.adaptations - quiet
        self._pruned_before[blocks] = _pack(pruned_before)

    def record(self, old: Bool[Tensor, "blocks m"], new: Bool[Tensor, "blocks m"]) -> None:
        """Enter an adaptation of all blocks.

        Args:
            old: Mask before.
            new: Mask after.
        """
        self.adaptations += 1
        oscillates = (new & ~old & self.pruned_before()).any(-1)
        self.oscillations += oscillates
        self.last.masked_fill_(oscillates, self.adaptations)
        self._pruned_before |= _pack(old & ~new)

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
            revived: The place in its block that is kept from now on.
            pruned: The one that is pruned, likewise.
            swapped: Whether they were swapped.
        """
        self.adaptations += 1
        before = self._pruned_before.index_select(0, blocks)
        oscillates = swapped & ((before & self._bits.index_select(0, revived)).amax(1) > 0)
        after = torch.where(swapped[:, None], before | self._bits.index_select(0, pruned), before)
        self._pruned_before.index_copy_(0, blocks, after)
        self.oscillations.index_add_(0, blocks, oscillates.int())
        last = self.last.index_select(0, blocks).masked_fill_(oscillates, self.adaptations)
        self.last.index_copy_(0, blocks, last)


def _pack(mask: Bool[Tensor, "blocks m"]) -> UInt8[Tensor, "blocks bytes"]:
    """Bits of blocks, each in bytes of its own."""
    blocks, m = mask.shape
    whole = torch.nn.functional.pad(mask, (0, -m % 8))
    return pack_mask(whole).view(blocks, whole.shape[1] // 8)


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
        quiet: Adaptations since then, as `FlipHistory.quiet` tells.
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
