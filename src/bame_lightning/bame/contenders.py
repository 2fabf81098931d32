"""Contenders: the pruned positions that are closest to a swap, and which of them swaps first."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bame_lightning.blocks.masks import as_integers, pieces


def closeness(
    weight: Float[Tensor, "blocks m"], evidence: Float[Tensor, "blocks m"], mask: Bool[Tensor, "blocks m"]
) -> Float[Tensor, "blocks m"]:
    r"""How close every pruned position is to a swap: $|v_j| / \min_{i\,\text{kept}} |w_i|$ of its block (ours).

    Args:
        weight: The weights, w, whatever they are where pruned.
        evidence: The evidence, v, zero where kept.
        mask: True where kept.

    Returns:
        One ratio per position, in the type of the evidence: above 1 evidence outgrew the block's weakest kept weight, and -1
        where kept.
    """
    ratios = torch.empty_like(evidence)
    for w, v, kept, ratio in pieces(weight, evidence, mask, ratios):
        torch.div(v.abs(), weakest(w.to(evidence.dtype), kept)[:, None], out=ratio)
        ratio.masked_fill_(kept, -1)
    return ratios


def weakest(weight: Float[Tensor, "blocks m"], mask: Bool[Tensor, "blocks m"]) -> Float[Tensor, " blocks"]:
    """Size of the smallest kept weight of every block, and never quite zero, so that one can divide by it.

    Args:
        weight: The weights, whatever they are where pruned.
        mask: True where kept.

    Returns:
        One size per block.
    """
    bits = as_integers(weight)
    sign = torch.iinfo(bits.dtype).min
    # Bits of magnitudes are in the order of the magnitudes, and integers are compared several times as fast. With the sign
    # set they are all below zero, which stands for what is pruned.
    smallest = bits.bitwise_or(sign).mul_(mask.view(torch.int8)).amin(-1).bitwise_and_(~sign)
    return smallest.view(weight.dtype).clamp_min_(torch.finfo(weight.dtype).tiny)


def choose(closeness: Float[Tensor, "rows positions"], count: int) -> Int[Tensor, "rows count"]:
    """Choose the contenders of every output row: as many in each, so that rows need not know of each other.

    Args:
        closeness: How close the positions of a row are to a swap.
        count: Contenders of a row.

    Returns:
        Which positions of all rows, row by row, numbered through; ascending. A tie keeps the lower ones.

    Example:
        >>> choose(torch.tensor([[0.5, -1.0, 0.5, 0.9], [-1.0, 2.0, 0.0, 0.0]]), 2)
        tensor([[0, 3],
                [5, 6]])
    """
    rows, positions = closeness.shape
    device = closeness.device
    if not count:
        return torch.zeros(rows, 0, dtype=torch.int64, device=device)
    # Bits of positive numbers are in their order, NaN comes last, and all that is negative before.
    order = as_integers(closeness.float())
    last = order.kthvalue(positions - count + 1, dim=1, keepdim=True).values
    chosen, tied = order > last, order == last
    chosen |= tied & (tied.cumsum(1, dtype=torch.int32) <= count - chosen.sum(1, keepdim=True))
    # As `nonzero` has it, but that asks the device how many there are; not every device has `nonzero_static`.
    place = torch.where(chosen, chosen.cumsum(1, dtype=torch.int32) - 1, count).long()
    numbers = torch.arange(rows * positions, device=device).view(rows, positions)
    return place.new_empty(rows, count + 1).scatter_(1, place, numbers)[:, :count]


class First(NamedTuple):
    """The contender that swaps first in each of some groups: output rows, or blocks.

    Args:
        slot: Which contender, as a place among all of them; the first of all for a group without any.
        may_swap: Whether it may.
    """

    slot: Int[Tensor, " groups"]
    may_swap: Bool[Tensor, " groups"]


def first(closeness: Float[Tensor, " contenders"], group: Int[Tensor, " contenders"], groups: int) -> First:
    """Find the contender of each group that is closest to a swap.

    Args:
        closeness: How close the contenders are; negative for those that may not swap.
        group: Group of each, from 0 on.
        groups: Number of groups.

    Returns:
        One of each group; a tie keeps the first.

    Example:
        >>> first(torch.tensor([1.5, 2.0, 2.0, -1.0]), torch.tensor([0, 0, 0, 2]), groups=3)
        First(slot=tensor([1, 0, 3]), may_swap=tensor([ True, False, False]))
    """
    best = closeness.new_full((groups,), -1).scatter_reduce_(0, group, closeness, "amax")
    slots = torch.arange(len(closeness), device=closeness.device)
    equal = torch.where(closeness == best[group], slots, len(slots))
    slot = slots.new_full((groups,), len(slots)).scatter_reduce_(0, group, equal, "amin")
    return First(torch.where(slot < len(slots), slot, 0), best >= 0)


def count_in_share(share: float, total: int) -> int:
    """Number in a share of a total, rounded up, whatever floating point makes of the product.

    Example:
        >>> count_in_share(0.07, 100), math.ceil(0.07 * 100)
        (7, 8)
    """
    return math.ceil(round(share * total, 9))
