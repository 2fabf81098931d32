"""Which blocks come first, those that are closest to a swap: to be read until the next reading of all, and to swap."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bame_lightning.masks import as_integers, pieces


class MostUrgent(NamedTuple):
    """A block of each output row.

    Args:
        blocks: Their indices.
        may_swap: Whether there is any that may swap; otherwise the block is an arbitrary one.
    """

    blocks: Int[Tensor, " rows"]
    may_swap: Bool[Tensor, " rows"]


def urgency(
    weight: Float[Tensor, "blocks m"], evidence: Float[Tensor, "blocks m"], mask: Bool[Tensor, "blocks m"]
) -> Float[Tensor, " blocks"]:
    r"""How close a block is to a swap: $\max_{j\,\text{pruned}} |v_j| / \min_{i\,\text{kept}} |w_i|$ (ours).

    Args:
        weight: The weights, w, whatever they are where pruned.
        evidence: The evidence, v, zero where kept.
        mask: True where kept.

    Returns:
        One ratio per block, in the type of the evidence; above 1 the block would swap.
    """
    ratios, number = evidence.new_empty(len(evidence)), evidence.dtype
    for w, v, kept, ratio in pieces(weight, evidence, mask, ratios):
        bits = as_integers(v)
        sign = torch.iinfo(bits.dtype).min
        # Bits of magnitudes are in the order of the magnitudes, and integers are compared several times as fast. With the
        # sign set they are all below zero, which stands for what is pruned.
        strongest = bits.bitwise_and(~sign).amax(-1)
        weakest = as_integers(w.to(number)).bitwise_or(sign).mul_(kept.view(torch.int8)).amin(-1).bitwise_and_(~sign)
        torch.div(strongest.view(number), weakest.view(number).clamp_min_(torch.finfo(number).tiny), out=ratio)
    return ratios


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
    blocks = unfrozen = len(urgency)
    if frozen is not None:
        unfrozen, urgency = int((~frozen).sum()), urgency.masked_fill(frozen, -1)
    count = blocks_in_share(share, unfrozen)
    if not count:
        return torch.zeros(0, dtype=torch.int64, device=urgency.device)
    # Bits are in order whatever the ratios are, NaN as well, and integers are compared faster.
    order = as_integers(urgency.float())
    last = order.kthvalue(blocks - count + 1).values
    above, tied = order > last, order == last
    chosen = above | (tied & (tied.cumsum(0, dtype=torch.int32) <= count - above.sum()))
    # As `nonzero` has it, but that asks the device how many there are; not every device has `nonzero_static`.
    place = torch.where(chosen, chosen.cumsum(0, dtype=torch.int32) - 1, count).long()
    index = place.new_empty(count + 1).scatter_(0, place, torch.arange(blocks, device=place.device))
    return index[:count]


def most_urgent(
    urgency: Float[Tensor, " chosen"], blocks: Int[Tensor, " chosen"] | None, rows: int, per_row: int
) -> MostUrgent:
    """Choose the most urgent block of each output row.

    Args:
        urgency: How close blocks are to a swap; negative for those that may not.
        blocks: Which blocks these are, of `rows` times `per_row` that lie row by row; None for all.
        rows: Number of rows.
        per_row: Blocks in each row.

    Returns:
        One block of each row, a tie keeps the first; and whether it may swap.

    Example:
        >>> most_urgent(torch.tensor([2.0, 2.0, 0.1]), torch.tensor([1, 2, 7]), rows=3, per_row=3)
        MostUrgent(blocks=tensor([1, 3, 7]), may_swap=tensor([ True, False,  True]))
    """
    if blocks is not None:
        urgency = urgency.new_full((rows * per_row,), -1).index_copy_(0, blocks, urgency)
    best = urgency.view(rows, per_row).max(-1)
    first = torch.arange(0, rows * per_row, per_row, device=urgency.device)
    return MostUrgent(first + best.indices, best.values >= 0)


def blocks_in_share(share: float, blocks: int) -> int:
    """Number of blocks in a share of them, rounded up, whatever floating point makes of the product.

    Example:
        >>> blocks_in_share(0.07, 100), math.ceil(0.07 * 100)
        (7, 8)
    """
    return math.ceil(round(share * blocks, 9))
