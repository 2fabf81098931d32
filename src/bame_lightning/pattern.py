"""N:M patterns, and the view of a weight as blocks of M consecutive weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

_STRIDED = 16
"""How many times as long it takes to find a strided block as to lay it out among all."""
_PATTERN = re.compile(r"\s*(\d+)\s*:\s*(\d+)\s*")


@dataclass(frozen=True)
class NMPattern:
    """At most `n` non-zeros in every `m` consecutive weights of the input dimension.

    Args:
        n: Weights kept per block.
        m: Weights in a block.

    Raises:
        ValueError: If not 1 <= n <= m.

    Example:
        >>> NMPattern(1, 16).density
        0.0625
        >>> str(NMPattern.parse("2:4"))
        '2:4'
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if self.n < 1 or self.m < 1:
            raise ValueError(f"`pattern` N:M needs N >= 1 and M >= 1, a block keeps something; got {self}.")
        if self.n > self.m:
            raise ValueError(
                f"`pattern` N:M keeps at most N of M weights, so N <= M; got {self}. Did you mean '{self.m}:{self.n}'?"
            )

    @classmethod
    def parse(cls, value: object) -> NMPattern:
        """Read a pattern from "N:M", from `{n, m}`, or hand an `NMPattern` through.

        Args:
            value: What a user or a configuration file wrote.

        Returns:
            The pattern.

        Raises:
            ValueError: If `value` is anything else. Integers get a message of their own: YAML 1.1 reads an
                unquoted `2:4` as the sexagesimal number 124.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, str) and (match := _PATTERN.fullmatch(value)):
            return cls(int(match[1]), int(match[2]))
        if isinstance(value, Mapping) and set(value) == {"n", "m"} and all(_is_int(v) for v in value.values()):
            return cls(value["n"], value["m"])
        if _is_int(value):
            raise ValueError(
                f"`pattern` must be a string such as '2:4', got the integer {value}: YAML reads an unquoted 2:4 as a "
                "number to base 60. Write it in quotes."
            )
        raise ValueError(f"`pattern` must be a string 'N:M' such as '1:16', or a mapping {{n, m}}; got {value!r}.")

    @property
    def density(self) -> float:
        """Share of the weights that is kept, N / M."""
        return self.n / self.m

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


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
