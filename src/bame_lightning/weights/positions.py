"""Single positions of many weights: where they lie in memory, and how to take and put values there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate

import torch
from jaxtyping import Int, Shaped
from torch import Tensor
from torch.distributed.tensor import DTensor

from bame_lightning.weights.layers import SparseWeight


class Positions:
    """Positions of some weights, numbered through weight by weight, in the order of `to_blocks`.

    Few values of each weight are found by their place in memory, so that no weight is laid out anew.

    Args:
        weights: The weights, at least one, all on one device.

    Attributes:
        starts: Number of the first position of each weight, and of all together at the end.
        straight: Whether positions of each weight lie in memory as they are numbered: in linear layers, pointwise and
            channels-last convolutions.

    Raises:
        ValueError: If the kernel dimensions of a convolution are not side by side in memory.
    """

    def __init__(self, weights: Sequence[SparseWeight]) -> None:
        self.weights = list(weights)
        values = [sparse.values for sparse in weights]
        self.starts = [0, *accumulate(value.numel() for value in values)]
        grids = [_grid(value, sparse.name) for value, sparse in zip(values, weights, strict=True)]
        rows = [(start, *grid) for start, grid in zip(self.starts, grids, strict=False)]
        self._table = torch.tensor(rows, device=values[0].device)
        # Strides of dimensions of one element mean nothing.
        self.straight = [(o, i) == (size * across, 1) and (size == 1 or k == across) for size, across, o, k, i in grids]
        self._starts = self._table[:, 0].contiguous()
        self._views: dict[int, Tensor] = {}

    def offsets(self, positions: Int[Tensor, chosen * some], counts: Tensor) -> Int[Tensor, chosen * some]:
        """Find positions in the memory of their weights.

        Args:
            positions: Numbered through, those of the first weight first.
            counts: How many are of each weight; shape (weights,).

        Returns:
            Distance from the first value of its weight, in values.
        """
        beside = [1] * (positions.dim() - 1)
        if all(self.straight):
            return positions - self._starts.repeat_interleave(counts, output_size=len(positions)).view(-1, *beside)
        rows = self._table.repeat_interleave(counts, dim=0, output_size=len(positions))
        columns = rows.view(len(positions), *beside, rows.shape[1]).unbind(-1)
        start, kernel, inputs, by_output, by_kernel, by_input = columns
        inside = positions - start
        pixel, channel = inside // inputs, inside % inputs
        return pixel // kernel * by_output + pixel % kernel * by_kernel + channel * by_input

    def weight(self, layer: int) -> Shaped[Tensor, " memory"]:
        """View the values of a weight that this process holds as they lie in memory; remembered until they move."""
        weight = self.weights[layer].weight
        if isinstance(weight, DTensor):
            return flat_memory(self.weights[layer].values)
        found = self._views.get(layer)
        if found is None or found.data_ptr() != weight.data_ptr():
            found = self._views[layer] = flat_memory(weight.detach())
        return found

    def memory(self) -> list[Tensor]:
        """`weight` of each."""
        return [self.weight(layer) for layer in range(len(self.weights))]

    def put(self, places: Int[Tensor, " chosen"], values: Shaped[Tensor, " chosen"], counts: list[int]) -> None:
        """Write values at places in the memory of their weights, those of the first weight first, `counts` of each."""
        parts = zip(torch.split(places, counts), torch.split(values, counts), strict=True)
        for layer, (where, what) in enumerate(parts):
            if len(where):
                self.weight(layer).index_copy_(0, where, what)


def _grid(value: Tensor, name: str) -> tuple[int, int, int, int, int]:
    """Positions of a kernel, input channels, and how far outputs, positions and channels lie apart in memory."""
    kernel, inputs = value[0, 0].numel(), value.shape[1]
    by_output, by_input, *by_kernel = value.stride()
    sizes = value.shape[2:]
    for outer, inner, size in zip(by_kernel, by_kernel[1:], sizes[1:], strict=False):
        if outer != inner * size:
            raise ValueError(
                f"`{name}` has strides {value.stride()}, whose kernel positions do not follow one another in memory. Use "
                "`weight.data = weight.data.contiguous()`, or the channels-last format, before `fit`."
            )
    return kernel, inputs, by_output, by_kernel[-1] if by_kernel else 1, by_input


def flat_memory(tensor: Tensor) -> Shaped[Tensor, " memory"]:
    """View a tensor as the stretch of memory that it lies in, in any layout."""
    return tensor.view(-1) if tensor.is_contiguous() else tensor.as_strided((extent(tensor),), (1,))


def extent(tensor: Tensor) -> int:
    """Length of the stretch of memory that a tensor lies in, in values."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def take(tensors: Iterable[Tensor], offsets: Iterable[Tensor]) -> Tensor:
    """Values at places in memory, of several tensors one after the other."""
    found = [
        tensor.take(places) if tensor.is_contiguous() else flat_memory(tensor)[places]
        for tensor, places in zip(tensors, offsets, strict=True)
    ]
    return torch.cat(found)
