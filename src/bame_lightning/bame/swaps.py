"""Who challenges whom: the contender of each row, or of each block, that is closest to a swap."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from bame_lightning.bame.contending import Contenders


class Challenge(NamedTuple):
    """The contender of each output row that is closest to a swap, and the kept weight that it challenges.

    Args:
        slot: Which contender.
        position: Its position.
        evidence: Its evidence.
        block: Its block.
        place: Which of the block's kept positions it challenges, in the order of `KeptWeights.places`; shape (rows, 1).
        weakest: The weight there, the smallest that the block keeps.
        size: Its size.
        entered: Where the contender lies in the memory of its weight.
        dropped: Where the weight lies that it challenges.
        may_swap: Whether it may take its place.
        of: Its weight.
        counts: Number of challenges in each weight.
    """

    slot: Int64[Tensor, " rows"]
    position: Int64[Tensor, " rows"]
    evidence: Float[Tensor, " rows"]
    block: Int64[Tensor, " rows"]
    place: Int64[Tensor, "rows 1"]
    weakest: Float[Tensor, " rows"]
    size: Float[Tensor, " rows"]
    entered: Int64[Tensor, " rows"]
    dropped: Int64[Tensor, " rows"]
    may_swap: Bool[Tensor, " rows"]
    of: Int64[Tensor, " rows"]
    counts: list[int]


def challenge(
    contenders: Contenders,
    evidence: Float[Tensor, " contenders"],
    kept: Float[Tensor, "contenders n"],
    kept_offsets: Int64[Tensor, "n contenders"],
    may: Bool[Tensor, " contenders"] | None,
    *,
    one_per_row: bool,
) -> Challenge:
    """Find who challenges whom.

    Args:
        contenders: The contenders.
        evidence: Their evidence.
        kept: Weights that the blocks of each keep.
        kept_offsets: Where these lie in memory.
        may: Who may challenge at all; None for all.
        one_per_row: One of each row, rather than of each block.
    """
    # Who is not comparable, of infinite evidence and an infinite weight, may not either.
    near = ratio(evidence, kept.abs().amin(1)).nan_to_num_(-1, math.inf)
    if may is not None:
        near = torch.where(may, near, -1)
    find = contenders.first_of_rows if one_per_row else contenders.first_of_blocks
    slot, may_swap, of, counts = find(near)
    own = kept.index_select(0, slot)
    size, place = own.abs().min(1, keepdim=True)
    position = contenders.positions.index_select(0, slot).long()
    return Challenge(
        slot,
        position,
        evidence=evidence.index_select(0, slot),
        block=position // contenders.m,
        place=place,
        weakest=own.gather(1, place).view(-1),
        size=size.view(-1),
        entered=contenders.offsets.index_select(0, slot),
        dropped=kept_offsets.index_select(1, slot).gather(0, place.t()).view(-1),
        may_swap=may_swap,
        of=of,
        counts=counts,
    )


def ratio(evidence: Float[Tensor, " some"], sizes: Float[Tensor, " some"]) -> Float[Tensor, " some"]:
    """Measure how close contenders are to a swap with weights of some sizes; never divides by zero."""
    return evidence.abs() / sizes.clamp_min(torch.finfo(sizes.dtype).tiny)
