"""Which blocks to read until the next reading of all: those that are closest to a swap."""

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
    urgency: Float[Tensor, " blocks"], frozen: Bool[Tensor, " blocks"], share: float
) -> Int[Tensor, " chosen"]:
    """Choose the blocks to read until the next reading of all.

    Args:
        urgency: How close each block is to a swap.
        frozen: Blocks whose mask is final; never chosen.
        share: Share of the unfrozen blocks to choose, rounded up.

    Returns:
        The most urgent unfrozen blocks' indices, ascending; a tie keeps the lower index.
    """
    count = blocks_in_share(share, int((~frozen).sum()))
    ranked = urgency.masked_fill(frozen, -1).argsort(descending=True, stable=True)
    return ranked[:count].sort().values


def blocks_in_share(share: float, blocks: int) -> int:
    """Number of blocks in a share of them, rounded up, whatever floating point makes of the product.

    Example:
        >>> blocks_in_share(0.07, 100), math.ceil(0.07 * 100)
        (7, 8)
    """
    return math.ceil(round(share * blocks, 9))
