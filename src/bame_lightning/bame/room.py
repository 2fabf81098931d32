"""Room in the columns of weights: which swaps keep every mask 2:4 along the output dimension, too (`both_ways`)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from jaxtyping import Bool, Float, Int, Int8
from torch import Tensor

from bame_lightning.blocks.transposable import MOST, ROWS, column_counts
from bame_lightning.weights.layers import SparseWeight


def admitted(
    group: Int[Tensor, " swaps"],
    kept: Int8[Tensor, " swaps"],
    urgency: Float[Tensor, " swaps"],
    wanted: Bool[Tensor, " swaps"],
) -> Bool[Tensor, " swaps"]:
    """Admit swaps of a step as long as each group keeps at most two weights; the most urgent swaps come first.

    A weight that another swap takes out of a group makes room only in the next step.

    Args:
        group: Group that each swap enters: a column of four consecutive rows.
        kept: Weights that the group keeps.
        urgency: How urgent the swap is, at least 0; a tie admits the one that stands first.
        wanted: Whether the swap is wanted; other swaps take no room.

    Returns:
        Which swaps are wanted and fit.

    Example:
        >>> one_is_kept, urgency = torch.ones(3, dtype=torch.int8), torch.tensor([1.0, 3.0, 2.0])
        >>> admitted(torch.tensor([7, 7, 8]), one_is_kept, urgency, torch.tensor([True, True, True]))
        tensor([False,  True,  True])
    """
    order = torch.where(wanted, urgency, -1).argsort(descending=True, stable=True)
    order = order[group[order].argsort(stable=True)]
    ordered, places = group[order], torch.arange(len(order), device=order.device)
    begins = torch.ones_like(wanted)
    begins[1:] = ordered[1:] != ordered[:-1]
    ahead = places - torch.where(begins, places, 0).cummax(0).values
    fits = torch.empty_like(wanted).scatter_(0, order, ahead + kept[order] < MOST)
    return wanted & fits


def group_of(position: Int[Tensor, " some"], columns: int | Tensor) -> Int[Tensor, " some"]:
    """Number of the group of a position, in the order of `column_counts`.

    Args:
        position: Positions within the weight, numbered in the order of `to_blocks`.
        columns: Columns of the weight.

    Example:
        >>> group_of(torch.tensor([0, 5, 9, 13, 18]), 4)  # rows 0 to 3 of columns 0 and 1, row 4 of column 2
        tensor([0, 1, 1, 1, 6])
    """
    return position // columns // ROWS * columns + position % columns


class Room:
    """Count the weights that every group keeps. A group are four consecutive rows of a column, numbered weight after weight.

    Nothing here waits for the device.

    Args:
        weights: The weights, whose masks keep at most two in each group.

    Attributes:
        kept: Weights that each group keeps; shape (groups,).
        refused: Swaps refused so far for lack of room, by weight; shape (weights,).
    """

    def __init__(self, weights: Sequence[SparseWeight]) -> None:
        self.weights = list(weights)
        shapes = [(len(sparse.kept), sparse.kept[0].numel()) for sparse in weights]
        self._firsts = [0, *accumulate(-(-rows // ROWS) * columns for rows, columns in shapes)]
        starts = [0, *accumulate(rows * columns for rows, columns in shapes)]
        device = weights[0].kept.device
        table = [
            (start, columns, first) for start, (_, columns), first in zip(starts, shapes, self._firsts, strict=False)
        ]
        self._table = torch.tensor(table, device=device)
        self.kept = torch.zeros(self._firsts[-1], dtype=torch.int8, device=device)
        self.refused = torch.zeros(len(weights), dtype=torch.int64, device=device)
        for layer in range(len(weights)):
            self.recount(layer)

    def recount(self, layer: int) -> None:
        """Count anew for one weight."""
        sparse = self.weights[layer]
        self.of(layer).copy_(column_counts(sparse.mask(), len(sparse.kept)))

    def of(self, layer: int) -> Int8[Tensor, "groups columns"]:
        """The counts of the groups of a weight."""
        counts = self.kept[self._firsts[layer] : self._firsts[layer + 1]]
        return counts.view(-1, self.weights[layer].kept[0].numel())

    def full(self, layer: int) -> Bool[Tensor, "blocks m"]:
        """Positions of a weight whose group has no room."""
        sparse = self.weights[layer]
        rows = (self.of(layer) >= MOST).repeat_interleave(ROWS, dim=0)[: len(sparse.kept)]
        return rows.reshape(-1, sparse.pattern.m)

    def has(
        self, positions: Int[Tensor, " some"], layer: Int[Tensor, " some"], wanted: Bool[Tensor, " some"]
    ) -> Bool[Tensor, " some"]:
        """Whether the groups of positions have room; a wanted swap without room counts as refused.

        Args:
            positions: Pruned positions, numbered as in `Positions`.
            layer: Place of the weight of each.
            wanted: Whether it would swap.
        """
        has = self.kept[self._group(positions, layer)] < MOST
        self.refused.index_add_(0, layer, (wanted & ~has).long())
        return has

    def admit(
        self,
        revived: Int[Tensor, " swaps"],
        pruned: Int[Tensor, " swaps"],
        layer: Int[Tensor, " swaps"],
        urgency: Float[Tensor, " swaps"],
        wanted: Bool[Tensor, " swaps"],
    ) -> Bool[Tensor, " swaps"]:
        """Admit the swaps of a step that fit together (`admitted`), and follow them.

        Args:
            revived: Positions that would be kept from now on.
            pruned: Those that would be pruned for them.
            layer: Place of the weight of each.
            urgency: The most urgent come first.
            wanted: Whether to swap at all.
        """
        entered, left = self._group(revived, layer), self._group(pruned, layer)
        swapped = admitted(entered, self.kept[entered], urgency, wanted)
        self.refused.index_add_(0, layer, (wanted & ~swapped).long())
        change = swapped.to(torch.int8)
        self.kept.index_add_(0, torch.cat((entered, left)), torch.cat((change, -change)))
        return swapped

    def _group(self, positions: Int[Tensor, " some"], layer: Int[Tensor, " some"]) -> Int[Tensor, " some"]:
        start, columns, first = self._table[layer].unbind(1)
        return first + group_of(positions - start, columns)
