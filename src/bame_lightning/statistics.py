"""Statistics of masks and their evolution: pure functions, on the device of their arguments."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def flipped_positions(old: Bool[Tensor, "*shape"], new: Bool[Tensor, "*shape"]) -> Int[Tensor, ""]:
    """Positions whose mask changed; a swap changes two.

    Args:
        old: Mask before.
        new: Mask after.

    Returns:
        Their number.
    """
    return (old ^ new).sum()


def nonzero_share(weights: Iterable[Tensor]) -> Float[Tensor, ""]:
    """Share of non-zero weights over several tensors.

    Args:
        weights: At least one tensor.

    Returns:
        Non-zeros / weights; a kept weight that happens to be zero does not count.
    """
    counts, sizes = zip(*((weight.count_nonzero(), weight.numel()) for weight in weights), strict=True)
    return torch.stack(counts).sum() / float(sum(sizes))


def pooled_mean(values: Iterable[Tensor]) -> Float[Tensor, ""]:
    """Mean over the elements of several tensors, each element counting the same.

    Args:
        values: Tensors of numbers or booleans; at least one element in all.

    Returns:
        Their mean.
    """
    return torch.cat([value.flatten().float() for value in values]).mean()
