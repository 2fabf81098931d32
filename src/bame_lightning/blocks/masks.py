"""Build, check and store masks: which weights of every block are kept."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Int, Integer, Shaped, UInt8
from torch import Tensor

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
CHUNK = 2**18
"""Values in a piece on a CPU: of 2**14 to 2**19 the fastest for one thread and for two."""


def top_n_mask(scores: Shaped[Tensor, "blocks m"], n: int) -> Bool[Tensor, "blocks m"]:
    r"""Keep the `n` highest-scoring weights of every block.

    For a block with scores $s \in \mathbb{R}^m$, returns the $b \in \{0,1\}^m$ that maximises $b^\top s$ subject to
    $\|b\|_0 = n$. A tie keeps the lower index, so every rank and device picks the same mask.

    Args:
        scores: One score per weight; higher means keep.
        n: Weights kept per block.

    Returns:
        Mask shaped like `scores`, with exactly `n` true entries per block.

    Raises:
        ValueError: If `n` is outside [1, m].

    Example:
        >>> top_n_mask(torch.tensor([[0.1, 0.9, 0.9, 0.9]]), n=2)
        tensor([[False,  True,  True, False]])
    """
    m = scores.shape[-1]
    if not 1 <= n <= m:
        raise ValueError(f"`n` must lie in [1, {m}] for blocks of {m} weights; got n={n}.")
    # `topk` leaves the order of equal scores unspecified; a stable sort does not.
    kept = scores.argsort(dim=-1, descending=True, stable=True)[:, :n]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, kept, True)


def zero_pruned_(values: Shaped[Tensor, "*shape"], kept: Bool[Tensor, "*#shape"]) -> None:
    """Zero values in place where a mask prunes, infinity and NaN included.

    Bits are multiplied as integers by 0 or 1. On a CPU that takes a quarter of the time of `masked_fill_`. A product of
    floating-point numbers would make NaN of infinities.

    Args:
        values: Numbers of at most 8 bytes.
        kept: True where values stay; a mask of their shape, or a scalar.
    """
    bits, factor = as_integers(values), kept.view(torch.int8)
    if kept.dim() == 0:
        bits.mul_(factor)
        return
    # On a CPU torch copies a factor of another type into integers. In pieces the copy stays in the cache.
    for part, by in pieces(bits, factor):
        part.mul_(by)


def zeroed(values: Shaped[Tensor, "*shape"], kept: Bool[Tensor, "*#shape"]) -> Shaped[Tensor, "*shape"]:
    """Copy values and zero the copy as `zero_pruned_` does."""
    return torch.mul(as_integers(values), kept.view(torch.int8)).view(values.dtype)


def as_integers(values: Shaped[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """View the bits of numbers of at most 8 bytes as integers. Positive numbers and their integers have the same order."""
    return values.view(_INTEGERS[values.element_size()])


def pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Cut tensors along their first dimension into pieces so small that they and temporaries stay in a CPU's cache.

    Args:
        tensors: Of the same length, at least one dimension each. The first one decides: a piece of it holds `CHUNK` values.

    Yields:
        A view of each tensor; on devices other than a CPU the whole tensors at once.
    """
    first = tensors[0]
    rows = max(1, CHUNK * len(first) // max(1, first.numel()))
    if not first.is_cpu or rows >= len(first):
        yield tensors
    else:
        yield from zip(*(torch.split(tensor, rows) for tensor in tensors), strict=True)


def kept_places(mask: Bool[Tensor, "blocks m"], n: int) -> Integer[Tensor, "blocks {n}"]:
    """Find the places that each block keeps, `n` of them, ascending; waits for the device.

    They are of one byte where that suffices.

    Example:
        >>> kept_places(torch.tensor([[True, False, False, True], [False, True, True, False]]), 2)
        tensor([[0, 3],
                [1, 2]], dtype=torch.uint8)
    """
    return mask.nonzero()[:, 1].view(len(mask), n).to(torch.uint8 if mask.shape[1] <= 256 else torch.int16)


def random_mask(blocks: Shaped[Tensor, "blocks m"], n: int) -> Bool[Tensor, "blocks m"]:
    """Keep `n` weights of every block at random.

    The generator is private and seeded by the weights' own bits: it leaves the global random state alone, ranks that
    hold the same weights draw the same mask, and a run with another seed (other initial weights) draws another one.

    Args:
        blocks: The weights.
        n: Weights kept per block.

    Returns:
        Mask shaped like `blocks`, with exactly `n` true entries per block.
    """
    seed = blocks.detach().float().contiguous().view(torch.int32).sum(dtype=torch.int64).item()
    generator = torch.Generator().manual_seed(int(seed))
    return top_n_mask(torch.rand(blocks.shape, generator=generator).to(blocks.device), n)


def nonzero_mask(blocks: Shaped[Tensor, "blocks m"], n: int) -> Bool[Tensor, "blocks m"]:
    """Read the mask off weights that are N:M sparse already.

    A kept weight may happen to be zero, so a block with fewer than `n` non-zeros also keeps its first zeros.

    Args:
        blocks: Weights with at most `n` non-zeros per block.
        n: Weights kept per block.

    Returns:
        Mask shaped like `blocks`, with exactly `n` true entries per block, all non-zeros among them.

    Raises:
        ValueError: If a block holds more than `n` non-zeros.
    """
    excess = (blocks != 0).sum(-1) > n
    if excess.any():
        first = int(excess.nonzero()[0, 0])
        raise ValueError(
            f"`init='nonzero'` reads the mask from weights that are N:M sparse already, with at most {n} non-zeros per "
            f"block of {blocks.shape[-1]}; {int(excess.sum())} of {len(blocks)} blocks hold more, the first is block "
            f"{first}. Use `init='magnitude'` to prune dense weights."
        )
    return top_n_mask(blocks.abs(), n)


def pack_mask(mask: Bool[Tensor, "*shape"]) -> UInt8[Tensor, " bytes"]:
    """Store a mask as one bit per weight, the first weight in the lowest bit.

    Args:
        mask: Mask of any shape.

    Returns:
        Its bits in row-major order, the last byte filled up with zeros.

    Example:
        >>> pack_mask(torch.tensor([True, False, True]))
        tensor([5], dtype=torch.uint8)
    """
    bits = torch.nn.functional.pad(mask.flatten().to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(-1, dtype=torch.uint8)


def unpack_mask(packed: UInt8[Tensor, " bytes"], shape: torch.Size) -> Bool[Tensor, "*shape"]:
    """Undo `pack_mask`.

    Args:
        packed: Bits of a mask.
        shape: Shape of the mask.

    Returns:
        The mask, on the device of `packed`.

    Raises:
        ValueError: If `packed` does not hold as many bits as `shape` needs.
    """
    if packed.numel() != -(-shape.numel() // 8):
        raise ValueError(f"A mask of shape {tuple(shape)} takes {-(-shape.numel() // 8)} bytes; got {packed.numel()}.")
    bits = packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1
    return bits.flatten()[: shape.numel()].bool().view(shape)
