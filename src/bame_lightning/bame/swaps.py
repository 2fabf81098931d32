"""Who challenges whom: the contender of each row, or of each block, that is closest to a swap."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bame_lightning.bame.contending import Contenders


class Challenge(NamedTuple):
    """The contender of each output row that is closest to a swap, and the kept weight that it challenges.

    Args:
        slot: Which contender.
        position: Its position.
        evidence: Its evidence.
        block: Its block.
        place: The kept position of the block that it challenges, as a column of `KeptWeights.places`.
        weakest: The weight there, the smallest that the block keeps.
        may_swap: Whether it may take the place of that weight.
        of: Its weight.
        counts: Number of challenges in each weight.
    """

    slot: Int[Tensor, " rows"]
    position: Int[Tensor, " rows"]
    evidence: Float[Tensor, " rows"]
    block: Int[Tensor, " rows"]
    place: Int[Tensor, " rows"]
    weakest: Float[Tensor, " rows"]
    may_swap: Bool[Tensor, " rows"]
    of: Int[Tensor, " rows"]
    counts: list[int]


def challenge(
    contenders: Contenders,
    evidence: Float[Tensor, " contenders"],
    kept: Float[Tensor, "n contenders"],
    may: Bool[Tensor, " contenders"],
    *,
    one_per_row: bool,
) -> Challenge:
    """Find who challenges whom.

    Args:
        contenders: The contenders.
        evidence: Their evidence.
        kept: Weights that their blocks keep.
        may: Which contenders may challenge.
        one_per_row: Whether one contender of each row challenges, or one of each block.
    """
    sizes, place = kept.abs().min(0)
    near = ratio(evidence, sizes)
    near = torch.where(may & (near == near), near, -1)
    find = contenders.first_of_rows if one_per_row else contenders.first_of_blocks
    slot, may_swap, of, counts = find(near)
    place = place[slot]
    position, weakest = contenders.positions[slot], kept[place, slot]
    block = position // contenders.m
    return Challenge(slot, position, evidence[slot], block, place, weakest, may_swap, of, counts)


def ratio(evidence: Float[Tensor, " some"], sizes: Float[Tensor, " some"]) -> Float[Tensor, " some"]:
    """Measure how close contenders are to a swap with weights of some sizes; never divides by zero."""
    return evidence.abs() / sizes.clamp_min(torch.finfo(sizes.dtype).tiny)
