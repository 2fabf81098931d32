"""Which blocks come first, those that are closest to a swap: to be read until the next reading of all, and to swap."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def urgency(
    weight: Float[Tensor, "blocks m"], evidence: Float[Tensor, "blocks m"], mask: Bool[Tensor, "blocks m"]
) -> Float[Tensor, " blocks"]:
    r"""How close a block is to a swap: $\max_{j\,\text{pruned}} |v_j| / \min_{i\,\text{kept}} |w_i|$ (ours).

    Args:
        weight: The weights, w.
        evidence: The evidence, v.
        mask: True where kept.

    Returns:
        One ratio per block; above 1 the block would swap.
    """
    strongest = evidence.abs().masked_fill(mask, 0).amax(-1)
    weakest = weight.abs().masked_fill(~mask, math.inf).amin(-1)
    return strongest / weakest.clamp_min(torch.finfo(weight.dtype).tiny)


def designate(
    urgency: Float[Tensor, " blocks"], frozen: Bool[Tensor, " blocks"] | None, share: float
) -> Int[Tensor, " chosen"]:
    """Choose the blocks to read until the next reading of all.

    Args:
        urgency: How close each block is to a swap.
        frozen: Blocks whose mask is final; never chosen. None knows of none, and asks the device nothing.
        share: Share of the unfrozen blocks to choose, rounded up.

    Returns:
        The most urgent unfrozen blocks' indices, ascending; a tie keeps the lower index.
    """
    blocks = len(urgency)
    if frozen is not None:
        blocks, urgency = int((~frozen).sum()), urgency.masked_fill(frozen, -1)
    count = blocks_in_share(share, blocks)
    ranked = urgency.argsort(descending=True, stable=True)
    return ranked[:count].sort().values


def most_urgent(urgency: Float[Tensor, " chosen"], rows: Int[Tensor, " chosen"], count: int) -> Bool[Tensor, " chosen"]:
    """Choose the most urgent block of each output row.

    Args:
        urgency: How close each block is to a swap, at least 0.
        rows: The row of each block, below `count`.
        count: Number of rows.

    Returns:
        True for one block of each row that has any; a tie keeps the first.

    Example:
        >>> most_urgent(torch.tensor([0.5, 2.0, 2.0, 0.1]), torch.tensor([0, 0, 0, 2]), count=3)
        tensor([False,  True, False,  True])
    """
    best = urgency.new_zeros(count).scatter_reduce(0, rows, urgency, "amax")
    place = torch.arange(len(rows), device=rows.device)
    behind = torch.where(urgency == best[rows], place, len(rows))
    first = rows.new_full((count,), len(rows)).scatter_reduce(0, rows, behind, "amin")
    return place == first[rows]


def blocks_in_share(share: float, blocks: int) -> int:
    """Number of blocks in a share of them, rounded up, whatever floating point makes of the product.

    Example:
        >>> blocks_in_share(0.07, 100), math.ceil(0.07 * 100)
        (7, 8)
    """
    return math.ceil(round(share * blocks, 9))
