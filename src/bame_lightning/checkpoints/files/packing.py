"""The packed layout of a weight: for every block its N values, and their places as ceil(log2 M) bits each."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Shaped, UInt8
from torch import Tensor

from bame_lightning.blocks.layout import from_blocks, to_blocks
from bame_lightning.blocks.masks import pack_mask, unpack_mask
from bame_lightning.blocks.pattern import NMPattern


def index_bits(m: int) -> int:
    """Bits that the position in a block takes, ceil(log2 m).

    Args:
        m: Weights in a block.

    Returns:
        The bits; 0 for blocks of a single weight.

    Example:
        >>> [index_bits(m) for m in (1, 2, 4, 5, 16)]
        [0, 1, 2, 3, 4]
    """
    return (m - 1).bit_length()


def pack_weight(
    weight: Shaped[Tensor, "out inp *kernel"], kept: Bool[Tensor, "out inp *kernel"], pattern: NMPattern
) -> tuple[Shaped[Tensor, "blocks n"], UInt8[Tensor, " bytes"]]:
    """Store the kept weights of every block and their positions.

    Args:
        weight: The weight, with zeros where pruned.
        kept: True at exactly N weights of every block, zeros among them or not.
        pattern: Its pattern.

    Returns:
        Kept values, shape (blocks, N), by position in their block; and the positions as one stream of bits, `index_bits(M)`
        for each, lowest bit first. The stream fills every byte from its lowest bit; zeros fill up the last byte.

    Raises:
        ValueError: If the mask does not keep exactly N, or a non-zero lies outside of it.

    Example:
        >>> weight = torch.tensor([[0.0, 5.0, 0.0, 6.0]])
        >>> values, indices = pack_weight(weight, weight != 0, NMPattern(2, 4))
        >>> values, indices.item() == 0b11_01
        (tensor([[5., 6.]]), True)
    """
    blocks, mask = to_blocks(weight.detach(), pattern.m), to_blocks(kept, pattern.m)
    if (mask.sum(-1) != pattern.n).any():
        raise ValueError(f"`kept` must keep exactly {pattern.n} of every {pattern.m} weights.")
    if ((blocks != 0) & ~mask).any():
        raise ValueError("`weight` must be zero where `kept` is False.")
    index = mask.nonzero()[:, 1].view(-1, pattern.n)
    values = blocks[mask].view(-1, pattern.n)
    width = index_bits(pattern.m)
    if width == 0:
        return values, torch.empty(0, dtype=torch.uint8)
    bits = index.to(torch.int32)[..., None] >> torch.arange(width, dtype=torch.int32) & 1
    return values, pack_mask(bits.bool())


def unpack_weight(
    values: Shaped[Tensor, "blocks n"], indices: UInt8[Tensor, " bytes"], pattern: NMPattern, shape: torch.Size
) -> Shaped[Tensor, "out inp *kernel"]:
    """Undo `pack_weight`.

    Args:
        values: Kept values of every block.
        indices: Their positions, packed.
        pattern: Pattern of the weight.
        shape: Its shape, (out, in, *kernel).

    Returns:
        The weight, contiguous, zero where pruned.

    Raises:
        ValueError: If the sizes do not fit together, or a position lies outside of its block.
    """
    if values.numel() * pattern.m != shape.numel() * pattern.n or values.shape[-1] != pattern.n:
        raise ValueError(f"{tuple(values.shape)} values do not make a {pattern} weight of shape {tuple(shape)}.")
    width = index_bits(pattern.m)
    bits = unpack_mask(indices, torch.Size((*values.shape, width)))
    index = (bits.to(torch.int64) << torch.arange(width)).sum(-1)
    if (index >= pattern.m).any():
        raise ValueError(f"A position lies outside of its block of {pattern.m} weights.")
    blocks = values.new_zeros(len(values), pattern.m)
    # Indexing copies bits. `scatter` would change the payload of a NaN, and lacks types of eight bits.
    blocks[torch.arange(len(values))[:, None], index] = values
    return from_blocks(blocks, shape).contiguous()
