"""Contenders: the pruned positions that are closest to a swap, and which of them swaps first."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Integer
from torch import Tensor

from bame_lightning.blocks.masks import as_integers


def closeness(
    evidence: Float[Tensor, "blocks m"], weakest: Float[Tensor, "blocks 1"], kept: Integer[Tensor, "blocks n"]
) -> Float[Tensor, "blocks m"]:
    r"""Measure how close every pruned position is to a swap: $|v_j| / \min_{i\,\text{kept}} |w_i|$ of its block (ours).

    Args:
        evidence: The evidence, v.
        weakest: Size of the smallest weight that each block keeps.
        kept: Places of the kept weights in their blocks.

    Returns:
        One ratio per position: above 1 if evidence is larger than the block's weakest kept weight; -1 where kept.
    """
    # Never zero, because it is divided by.
    ratios = evidence.abs().div_(weakest.clamp_min(torch.finfo(evidence.dtype).tiny))
    first = torch.arange(0, ratios.numel(), ratios.shape[1], device=ratios.device)
    ratios.view(-1).index_fill_(0, (first[:, None] + kept).view(-1), -1)
    return ratios


def choose(closeness: Float[Tensor, "rows positions"], count: int) -> Int[Tensor, "rows count"]:
    """Choose the contenders of every output row: the same number in each, so that rows need nothing of each other.

    Args:
        closeness: How close the positions of each row are to a swap.
        count: Contenders of a row.

    Returns:
        Places in their rows, ascending. A tie keeps the lower ones.

    Example:
        >>> choose(torch.tensor([[0.5, -1.0, 0.5, 0.9], [-1.0, 2.0, 0.0, 0.0]]), 2)
        tensor([[0, 3],
                [1, 2]])
    """
    rows, positions = closeness.shape
    if not count:
        return torch.zeros(rows, 0, dtype=torch.int64, device=closeness.device)
    # The bits of positive numbers are in their order; NaN comes last, negative numbers first. Lower places break ties.
    lower = torch.arange(positions, device=closeness.device)
    order = as_integers(closeness.float()).long().mul_(2**32).sub_(lower)
    if positions % APART == 0 and 2 * APART * count <= positions:
        # What is chosen is among the `count` columns whose best are best: half as many to put in order, twice.
        columns = order.view(rows, APART, -1)
        best = columns.amax(1, keepdim=True).topk(count, sorted=False).indices
        order = columns.gather(2, best.expand(-1, APART, -1)).view(rows, -1)
    found = order.topk(count, sorted=False).values
    return found.neg_().bitwise_and_(2**32 - 1).sort().values


PIECE = 2**21
"""The most positions among which contenders are chosen at once: larger memory is requested from the system each time."""
APART = 4
"""Positions of a column: about the root of 1 over the share of contenders."""


class First(NamedTuple):
    """The contender that swaps first in each of some groups: output rows, or blocks.

    Args:
        slot: The contender, as a place among all contenders; any one for a group without contenders.
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
    equal = torch.where(closeness == best.index_select(0, group), slots, len(slots))
    slot = slots.new_full((groups,), len(slots)).scatter_reduce_(0, group, equal, "amin")
    return First(torch.where(slot < len(slots), slot, 0), best >= 0)


def count_in_share(share: float, total: int) -> int:
    """Compute a share of a total, rounded up, without errors of floating point.

    Example:
        >>> count_in_share(0.07, 100), math.ceil(0.07 * 100)
        (7, 8)
    """
    return math.ceil(round(share * total, 9))
