"""The view of a weight as blocks of M consecutive weights."""

from __future__ import annotations

import torch
from jaxtyping import Shaped
from torch import Tensor


def oriented(values: Shaped[Tensor, "*shape"], transposed: bool) -> Shaped[Tensor, "*oriented"]:
    """View a weight, or a tensor of its shape, as (out, in, *kernel), the form that this package expects.

    Args:
        values: Values of the weight's own shape.
        transposed: Whether the weight's own shape is (in, out), as in the `Conv1D` of transformers' GPT-2.

    Returns:
        A view; `values` themselves unless transposed. A second call undoes the first.
    """
    return values.t() if transposed else values


def to_blocks(weight: Shaped[Tensor, "out inp *kernel"], m: int) -> Shaped[Tensor, "blocks {m}"]:
    """View a weight as blocks of `m` weights that are consecutive along its input dimension.

    The input dimension is the second one: `in_features` of a linear layer and of attention's packed `in_proj_weight`,
    the input channels (of one group) of a convolution. A block lies within one filter at one kernel position, as in
    the NHWC layout that ASP and SR-STE use, and never straddles kernel positions, filters or groups.

    Args:
        weight: Weight of shape (out, in, *kernel), with `m` dividing `in`.
        m: Weights in a block.

    Returns:
        Blocks ordered by filter, kernel position, input; shape (out * kernel * in / m, m). A view if inputs lie side by
        side in memory (a contiguous two-dimensional weight, channels-last convolutions), else a copy.

    Example:
        >>> to_blocks(torch.arange(8).reshape(2, 4), 2)
        tensor([[0, 1],
                [2, 3],
                [4, 5],
                [6, 7]])
    """
    return weight.movedim(1, -1).reshape(-1, m)


def from_blocks(blocks: Shaped[Tensor, "blocks m"], shape: torch.Size) -> Shaped[Tensor, "out inp *kernel"]:
    """Undo `to_blocks`: give blocks the shape of their weight.

    Args:
        blocks: Blocks in the order of `to_blocks`.
        shape: Shape of the weight, (out, in, *kernel).

    Returns:
        A view of `blocks` with shape `shape` (not contiguous if there are kernel dimensions).
    """
    return blocks.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
