"""The positions that each block keeps, and the weights there."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int, Int16
from torch import Tensor

from bame_lightning.bame.table import BlockTable
from bame_lightning.blocks.masks import kept_places
from bame_lightning.weights.positions import take


class KeptWeights:
    """Follow the positions that the blocks of a table keep; only the start waits for the device.

    Args:
        table: The blocks.

    Attributes:
        places: The places that each block keeps, ascending; shape (blocks, n).
    """

    def __init__(self, table: BlockTable) -> None:
        self._table, n = table, table.pattern.n
        self.places: Int16[Tensor, "blocks n"] = torch.cat([kept_places(s.mask(), n) for s in table.weights])
        self._split = table.counts.tolist()
        # Of the current step.
        self._weights: Tensor | None = None

    def weights(self) -> Float[Tensor, "blocks n"]:
        """The kept weights, remembered until `forget`. Others may not be zero: an optimizer may have moved them."""
        if self._weights is None:
            table = self._table
            blocks = torch.arange(table.firsts[-1], device=table.device)
            places = table.positions.offsets(blocks, self.places.t(), table.counts)
            self._weights = take(table.positions.memory(), torch.split(places, self._split, dim=1)).t().to(table.dtype)
        return self._weights

    def weakest(self) -> Float[Tensor, "blocks 1"]:
        """Size of the smallest weight that each block keeps."""
        return self.weights().abs().amin(-1, keepdim=True)

    def positions(self, blocks: Int[Tensor, " some"], place: Int[Tensor, " some"]) -> Int[Tensor, " some"]:
        """The positions that blocks keep in one of their places, in the order of `places`."""
        return blocks * self._table.pattern.m + self.places[blocks, place]

    def replace(
        self, blocks: Int[Tensor, " some"], place: Int[Tensor, " some"], position: Int[Tensor, " some"]
    ) -> None:
        """Let each of some blocks keep another position in place of one that it keeps."""
        entered = (position % self._table.pattern.m).to(self.places.dtype)
        kept = self.places[blocks].scatter_(1, place[:, None], entered[:, None])
        self.places.index_copy_(0, blocks, kept.sort(-1).values)
        self.forget()

    def restore(self, layer: int) -> None:
        """Read the mask of a weight again; waits for the device."""
        self._table.of(layer, self.places).copy_(kept_places(self._table.weights[layer].mask(), self._table.pattern.n))
        self.forget()

    def forget(self) -> None:
        """Call when a step ends, because weights move."""
        self._weights = None
