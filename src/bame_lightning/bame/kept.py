"""The positions that each block keeps, and the weights there."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int, Int64, Integer
from torch import Tensor

from bame_lightning.bame.table import BlockTable
from bame_lightning.blocks.masks import kept_places


class KeptWeights:
    """Follow the positions that the blocks of a table keep; only the start waits for the device.

    Args:
        table: The blocks.

    Attributes:
        places: The places that each block keeps, ascending; shape (blocks, n).
    """

    def __init__(self, table: BlockTable) -> None:
        self._table, n = table, table.pattern.n
        self.places: Integer[Tensor, "blocks n"] = torch.cat([kept_places(s.mask(), n) for s in table.weights])
        self._split = table.counts.tolist()
        # Of the current step.
        self._positions: Tensor | None = None
        self._weights: Tensor | None = None

    def positions(self) -> Int64[Tensor, " kept"]:
        """The positions that all blocks keep, numbered through; remembered until `forget`."""
        if self._positions is None:
            m = self._table.pattern.m
            first = torch.arange(0, len(self.places) * m, m, device=self.places.device)
            self._positions = (first[:, None] + self.places).view(-1)
        return self._positions

    def weights(self) -> Float[Tensor, "blocks n"]:
        """The kept weights, remembered until `forget`. Others may not be zero: an optimizer may have moved them."""
        if self._weights is None:
            table, n = self._table, self._table.pattern.n
            found = table.positions.offsets(self.positions(), table.counts * n)
            kept = table.positions.values(found, [n * count for count in self._split])
            # Column by column, so that the smallest of each block is found by comparing columns.
            self._weights = kept.view(-1, n).t().contiguous().t().to(table.dtype)
        return self._weights

    def weakest(self) -> Float[Tensor, "blocks 1"]:
        """Size of the smallest weight that each block keeps."""
        return self.weights().abs().amin(-1, keepdim=True)

    def replace(self, blocks: Int[Tensor, " some"], places: Integer[Tensor, "some n"]) -> None:
        """Let each of some blocks keep other places, given in any order."""
        self.places.index_copy_(0, blocks, places.sort(-1).values)
        self.forget()

    def restore(self, layer: int) -> None:
        """Read the mask of a weight again; waits for the device."""
        self._table.of(layer, self.places).copy_(kept_places(self._table.weights[layer].mask(), self._table.pattern.n))
        self.forget()

    def forget(self) -> None:
        """Call when a step ends, because weights move."""
        self._positions = self._weights = None
