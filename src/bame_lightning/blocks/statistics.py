"""Statistics of masks and their evolution: pure functions, on the device of their arguments."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor


def flipped_positions(old: Bool[Tensor, "*shape"], new: Bool[Tensor, "*shape"]) -> Int[Tensor, ""]:
    """Count positions whose mask changed; a swap changes two.

    Args:
        old: Mask before.
        new: Mask after.

    Returns:
        Their number.
    """
    return (old ^ new).sum()


def nonzero_share(weights: Iterable[Tensor]) -> Float[Tensor, ""]:
    """Share of weights that are not zero, over several tensors.

    Args:
        weights: At least one tensor.

    Returns:
        Non-zeros / weights; a kept weight that happens to be zero does not count.
    """
    counts, sizes = zip(*((weight.count_nonzero(), weight.numel()) for weight in weights), strict=True)
    return torch.stack(counts).sum() / float(sum(sizes))


def survival(masks: Iterable[tuple[Tensor, Tensor]]) -> Float[Tensor, ""]:
    """Share of the positions kept at first that are kept now, whether or not they were pruned in between.

    Args:
        masks: Mask now and mask at first, of several weights.

    Returns:
        Kept both times / kept at first, over all weights.
    """
    both, first = zip(*(((now & then).sum(), then.sum()) for now, then in masks), strict=True)
    return torch.stack(both).sum() / torch.stack(first).sum()


def percentiles(values: Iterable[Tensor], percents: Sequence[int]) -> Shaped[Tensor, " percents"]:
    """Percentiles of all elements of several tensors together, by the nearest rank: each is one of the elements.

    Args:
        values: Tensors of one type, at least one element in all.
        percents: Each in (0, 100].

    Returns:
        For each percentage the least element that at least this share of all elements does not exceed.

    Example:
        >>> percentiles([torch.tensor([3, 0, 0]), torch.tensor([1])], [50, 75, 76])
        tensor([0, 1, 3])
    """
    elements = torch.cat([value.flatten() for value in values])
    ranks = [-(-percent * len(elements) // 100) for percent in percents]
    # Finding a few of them is cheaper than sorting all.
    return torch.stack([elements.kthvalue(rank).values for rank in ranks])


def pooled_mean(values: Iterable[Tensor]) -> Float[Tensor, ""]:
    """Mean over the elements of several tensors, each element counting the same.

    Args:
        values: Tensors of numbers or booleans.

    Returns:
        Their mean; 0 if there are none.
    """
    flat = [value.flatten().float() for value in values]
    return torch.cat(flat).mean() if flat else torch.zeros(())
