"""Single positions of many weights: where they lie in memory, and how to take and put values there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from jaxtyping import Int, Int64, Shaped
from torch import Tensor
from torch.distributed.tensor import DTensor

from bame_lightning.weights.layers import SparseWeight
from bame_lightning.weights.views import Views


class Positions:
    """Positions of some weights, numbered weight after weight, in the order of `to_blocks`.

    A few values of each weight are found by their place in memory, so that no weight needs to be copied in blocks.

    Args:
        weights: The weights, at least one, of one pattern, all on one device.

    Attributes:
        m: Positions in a block.
        starts: Number of the first position of each weight, and of all together at the end.
        integers: Type that numbers them: of 4 bytes where these suffice.
        straight: Whether positions of each weight lie in memory as they are numbered: in linear layers, pointwise and
            channels-last convolutions.

    Raises:
        ValueError: If the kernel dimensions of a convolution are not side by side in memory.
    """

    def __init__(self, weights: Sequence[SparseWeight]) -> None:
        self.weights = list(weights)
        self.m = weights[0].pattern.m
        values = [sparse.values for sparse in weights]
        device = values[0].device
        self.starts = [0, *accumulate(value.numel() for value in values)]
        self.integers = torch.int32 if self.starts[-1] < 2**31 else torch.int64
        grids = [_grid(value, sparse.name) for value, sparse in zip(values, weights, strict=True)]
        # The stride of a dimension with one element has no meaning.
        self.straight = [(o, i) == (size * across, 1) and (size == 1 or k == across) for size, across, o, k, i in grids]
        self._starts = torch.tensor(self.starts[:-1], device=device)
        self._inputs = torch.tensor([grid.by_input for grid in grids], device=device)
        # Where each block begins, in a table: divisions would take as long as everything else.
        found = [_bases(grid, len(value), self.m, device) for grid, value in zip(grids, values, strict=True)]
        self._bases = None if all(self.straight) else torch.cat(found)
        self._memory = Views(flat_memory)

    def blocks(self, positions: Int[Tensor, *some]) -> Int[Tensor, *some]:
        """The blocks of positions."""
        return positions // self.m if self.m & (self.m - 1) else positions >> (self.m.bit_length() - 1)

    def within(self, positions: Int[Tensor, *some]) -> Int[Tensor, *some]:
        """The places of positions in their blocks."""
        return positions % self.m if self.m & (self.m - 1) else positions & (self.m - 1)

    def offsets(self, positions: Int[Tensor, " some"], counts: Int[Tensor, " weights"]) -> Int64[Tensor, " some"]:
        """Find positions in the memory of their weights.

        Args:
            positions: Numbers of positions, those of the first weight first.
            counts: How many belong to each weight.

        Returns:
            Distance of each place from the first value of its weight, in values.
        """
        by_weight = self._starts if self._bases is None else self._inputs
        spread = by_weight.repeat_interleave(counts, output_size=len(positions))
        if self._bases is None:
            return positions - spread
        # `index_select` takes a seventh of the time of an index in brackets.
        return self._bases.index_select(0, self.blocks(positions)) + self.within(positions) * spread

    def moved(
        self, offsets: Int64[Tensor, " some"], by: Int[Tensor, "k some"], counts: Int[Tensor, " weights"]
    ) -> Int64[Tensor, "k some"]:
        """Go from places in memory to others of the same blocks, some positions further on; `counts` as in `offsets`."""
        if self._bases is not None:
            by = by * self._inputs.repeat_interleave(counts, output_size=len(offsets))
        return offsets + by

    def weight(self, layer: int) -> Shaped[Tensor, " memory"]:
        """View the values of a weight that this process holds as a stretch of memory; the view is kept until they move."""
        weight = self.weights[layer].weight
        if isinstance(weight, DTensor):
            return flat_memory(self.weights[layer].values)
        return self._memory.of(layer, weight)

    def values(self, offsets: Int64[Tensor, " some"], counts: list[int]) -> Shaped[Tensor, " some"]:
        """Values at places in the memory of their weights, those of the first weight first, `counts` of each."""
        parts = enumerate(torch.split(offsets, counts))
        return torch.cat([self.weight(layer).index_select(0, where) for layer, where in parts])

    def put(self, places: Int[Tensor, " chosen"], values: Shaped[Tensor, " chosen"], counts: list[int]) -> None:
        """Write values at places in the memory of their weights: those of the first weight first, `counts` for each weight."""
        parts = zip(torch.split(places, counts), torch.split(values, counts), strict=True)
        for layer, (where, what) in enumerate(parts):
            if len(where):
                self.weight(layer).index_copy_(0, where, what)


class Grid(NamedTuple):
    """Numbers of kernel positions and input channels, and the distances of outputs, positions and channels in memory."""

    kernel: int
    inputs: int
    by_output: int
    by_kernel: int
    by_input: int


def _grid(value: Tensor, name: str) -> Grid:
    by_output, by_input, *by_kernel = value.stride()
    sizes = value.shape[2:]
    for outer, inner, size in zip(by_kernel, by_kernel[1:], sizes[1:], strict=False):
        if outer != inner * size:
            raise ValueError(
                f"`{name}` has strides {value.stride()}, whose kernel positions do not follow one another in memory. Use "
                "`weight.data = weight.data.contiguous()`, or the channels-last format, before `fit`."
            )
    kernel, inputs = value[0, 0].numel(), value.shape[1]
    return Grid(kernel, inputs, by_output, by_kernel[-1] if by_kernel else 1, by_input)


def _bases(grid: Grid, outputs: int, m: int, device: torch.device) -> Int[Tensor, " blocks"]:
    """Find where each block of a weight begins in memory."""

    def along(count: int, stride: int) -> Tensor:
        return torch.arange(count, device=device) * stride

    output, kernel = along(outputs, grid.by_output), along(grid.kernel, grid.by_kernel)
    channel = along(grid.inputs // m, m * grid.by_input)
    bases = (output[:, None, None] + kernel[:, None] + channel).flatten()
    return bases.int() if len(bases) and int(bases[-1]) < 2**31 - m * grid.by_input else bases


def flat_memory(tensor: Tensor) -> Shaped[Tensor, " memory"]:
    """View a tensor as the stretch of memory that it lies in, in any layout."""
    return tensor.view(-1) if tensor.is_contiguous() else tensor.as_strided((extent(tensor),), (1,))


def extent(tensor: Tensor) -> int:
    """Length of the stretch of memory that a tensor lies in, in values."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def take(tensors: Iterable[Tensor], offsets: Iterable[Tensor]) -> Tensor:
    """Take values at places in the memory of several tensors, one tensor after the other along the last dimension of places."""
    found = [
        (tensor if tensor.is_contiguous() else flat_memory(tensor)).take(places)
        for tensor, places in zip(tensors, offsets, strict=True)
    ]
    return torch.cat(found, dim=-1)
