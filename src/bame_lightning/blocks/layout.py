"""The view of a weight as blocks of M consecutive weights."""

from __future__ import annotations

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

_STRIDED = 16
"""How many times as long it takes to find a strided block as to lay it out among all."""


def oriented(values: Shaped[Tensor, "*shape"], transposed: bool) -> Shaped[Tensor, "*oriented"]:
    """View a weight, or what is shaped like it, as (out, in, *kernel), as all of this package sees weights.

    Args:
        values: Values of the weight's own shape.
        transposed: Whether that is (in, out), as in the `Conv1D` of transformers' GPT-2.

    Returns:
        A view; `values` themselves unless transposed. Its own inverse.
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


def gather_blocks(
    weight: Shaped[Tensor, "out inp *kernel"], m: int, index: Int[Tensor, " chosen"]
) -> Shaped[Tensor, "chosen {m}"]:
    """Copy some blocks out of a weight.

    Equal to `to_blocks(weight, m)[index]`; for convolutions, a few blocks are found without laying out all of them.

    Args:
        weight: Weight of shape (out, in, *kernel), with `m` dividing `in`.
        m: Weights in a block.
        index: Which blocks, in the order of `to_blocks`.

    Returns:
        The chosen blocks, shape (chosen, m).
    """
    grid = _grid(weight, m)
    if grid.is_contiguous():
        return grid.view(-1, m).index_select(0, index)
    if len(index) * m * _STRIDED > weight.numel():
        return to_blocks(weight, m).index_select(0, index)
    return grid[_unravel(index, grid.shape[:-1])]


def gather_positions(
    weight: Shaped[Tensor, "out inp *kernel"], index: Int[Tensor, " chosen"]
) -> Shaped[Tensor, " chosen"]:
    """Copy single weights out, numbered in the order of `to_blocks`: by filter, kernel position, input.

    Args:
        weight: Weight of shape (out, in, *kernel), however it lies in memory.
        index: Which weights.

    Returns:
        The chosen weights.
    """
    inputs_last = weight.movedim(1, -1)
    if inputs_last.is_contiguous():
        return inputs_last.view(-1).index_select(0, index)
    return inputs_last[_unravel(index, inputs_last.shape)]


def scatter_blocks_(
    weight: Shaped[Tensor, "out inp *kernel"], index: Int[Tensor, " chosen"], blocks: Shaped[Tensor, "chosen m"]
) -> None:
    """Put some blocks back into a weight, in place: the inverse of `gather_blocks`.

    Args:
        weight: Weight of shape (out, in, *kernel), however it lies in memory.
        index: Which blocks, in the order of `to_blocks`, each at most once.
        blocks: Their new values.
    """
    grid = _grid(weight, blocks.shape[-1])
    if grid.is_contiguous():
        grid.view(-1, blocks.shape[-1]).index_copy_(0, index, blocks.to(weight.dtype))
        return
    grid[_unravel(index, grid.shape[:-1])] = blocks.to(weight.dtype)


def _grid(weight: Tensor, m: int) -> Tensor:
    """A view of shape (out, *kernel, in / m, m): flattened but for the last dimension, the order of `to_blocks`."""
    inputs_last = weight.movedim(1, -1)
    return inputs_last.view(*inputs_last.shape[:-1], -1, m)


def _unravel(index: Int[Tensor, " chosen"], shape: torch.Size) -> tuple[Tensor, ...]:
    """`torch.unravel_index` for a few blocks, whose checks of the shape take several times as long as the divisions."""
    places = []
    for size in reversed(shape):
        places.append(index % size)
        index = index // size
    return tuple(reversed(places))
