"""Which pruned positions contend, the same number in each output row of a weight, and where they lie in memory."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter

import torch
from jaxtyping import Bool, Float, Int, Int64, Integer, Shaped
from torch import Tensor

from bame_lightning.bame.contenders import first
from bame_lightning.weights.layers import SparseWeight
from bame_lightning.weights.positions import Positions


class Contenders:
    """The contenders: the pruned positions that a step reads when it does not read everything.

    A swap puts a position in the place of another one of its block, so that the block of each slot stays the same.

    Args:
        weights: The weights, of one pattern.
        positions: How their positions are numbered.

    Attributes:
        m: Positions in a block.
        positions: The contenders, weight by weight and row by row, equally many in each row of a weight; shape (contenders,).
        counts: How many are in each weight, on the device; shape (weights,).
        split: The same as plain numbers.
        rows: Rows of each weight.
        lengths: Positions of a row of each weight.
    """

    def __init__(self, weights: Sequence[SparseWeight], positions: Positions) -> None:
        self._weights, self._numbering, self.m = weights, positions, weights[0].pattern.m
        self.split: list[int] = []
        self._offsets: Tensor | None = None
        self._kept_offsets: Tensor | None = None
        device = weights[0].kept.device
        self.rows = [len(sparse.kept) for sparse in weights]
        self.lengths = [sparse.kept.shape[1:].numel() for sparse in weights]
        length = torch.tensor(self.lengths, device=device).repeat_interleave(torch.tensor(self.rows, device=device))
        self._row_starts = length.cumsum(0) - length
        self.choose(torch.zeros(0, dtype=torch.int64, device=device), [0] * len(weights))

    def choose(self, places: Int64[Tensor, " contenders"], counts: Sequence[int]) -> None:
        """Choose new contenders.

        Args:
            places: Places in their rows, row by row; used up.
            counts: How many are in each row of each weight.
        """
        self._offsets = self._kept_offsets = None
        split = [rows * count for rows, count in zip(self.rows, counts, strict=True)]
        if split != self.split:
            self.split = split
            device = self._row_starts.device
            self.counts = torch.tensor(split, device=device)
            per_row = torch.tensor(counts, device=device)
            self._per_row = per_row.repeat_interleave(torch.tensor(self.rows, device=device))
            # Rows without a contender, as in a weight that has just joined, challenge no kept weight.
            self._row_split = [rows if count else 0 for rows, count in zip(self.rows, counts, strict=True)]
            rows = torch.tensor(self._row_split, device=device)
            self._row_layer = torch.arange(len(split), device=device).repeat_interleave(rows)
            per_row = per_row.repeat_interleave(rows)
            self._first_slots = per_row.cumsum(0) - per_row
            # Neighbours with as many in each row: how many, in rows of how many.
            runs = groupby(filter(all, zip(counts, split, strict=True)), key=itemgetter(0))
            self._runs = [(sum(size for _, size in run), count) for count, run in runs]
        places.add_(self._row_starts.repeat_interleave(self._per_row, output_size=len(places)))
        self.positions = places.to(self._numbering.integers)

    def replace(
        self, slots: Int64[Tensor, " rows"], positions: Int[Tensor, " rows"], offsets: Int64[Tensor, " rows"]
    ) -> None:
        """Put other positions of the same blocks into slots; they lie at `offsets` in the memory of their weights."""
        self._kept_offsets = None
        self.positions.index_copy_(0, slots, positions.to(self.positions.dtype))
        self.offsets.index_copy_(0, slots, offsets)

    @property
    def blocks(self) -> Int[Tensor, " contenders"]:
        """The block of each contender."""
        return self._numbering.blocks(self.positions)

    def by_weight(self) -> list[Tensor]:
        """The contenders of each weight."""
        return list(torch.split(self.positions, self.split))

    def within(self) -> list[Tensor]:
        """The contenders of each weight, numbered within it."""
        starts = torch.tensor(self._numbering.starts[:-1], device=self.positions.device)
        return list(torch.split(self.positions - self.spread(starts), self.split))

    def spread(self, values: Shaped[Tensor, " weights"]) -> Shaped[Tensor, " contenders"]:
        """For each contender the value of its weight."""
        return values.repeat_interleave(self.counts, output_size=len(self.positions))

    @property
    def offsets(self) -> Int64[Tensor, " contenders"]:
        """Where each lies in the memory of its weight."""
        if self._offsets is None:
            self._offsets = self._numbering.offsets(self.positions, self.counts)
        return self._offsets

    def kept_offsets(self, kept_places: Integer[Tensor, "blocks n"]) -> Int64[Tensor, "n contenders"]:
        """Where the weights lie that the block of each keeps; remembered until some are replaced."""
        if self._kept_offsets is None:
            numbering, positions = self._numbering, self.positions
            by = kept_places.index_select(0, numbering.blocks(positions)).t() - numbering.within(positions)
            self._kept_offsets = numbering.moved(self.offsets, by, self.counts)
        return self._kept_offsets

    def first_of_rows(
        self, near: Float[Tensor, " contenders"]
    ) -> tuple[Int64[Tensor, " rows"], Bool[Tensor, " rows"], Int64[Tensor, " rows"], list[int]]:
        """For each row the contender closest to a swap (slot, may it swap, its weight), and the rows of each weight."""
        parts = torch.split(near, [size for size, _ in self._runs])
        best = [part.view(-1, count).max(1) for part, (_, count) in zip(parts, self._runs, strict=True)]
        slot = torch.cat([found.indices for found in best]).add_(self._first_slots)
        return slot, torch.cat([found.values for found in best]) >= 0, self._row_layer, self._row_split

    def first_of_blocks(
        self, near: Float[Tensor, " contenders"]
    ) -> tuple[Int64[Tensor, " blocks"], Bool[Tensor, " blocks"], Int64[Tensor, " blocks"], list[int]]:
        """The same for each block that has a contender which may swap; waits for the device."""
        starts = self._numbering.starts
        slot, may = first(near, self.blocks.long(), starts[-1] // self.m)
        slot, may = slot[may], may[may]
        of = torch.bucketize(self.positions[slot], torch.tensor(starts[1:], device=slot.device), right=True)
        return slot, may, of, of.bincount(minlength=len(self._weights)).tolist()

    def saved(self, layer: int) -> Int[Tensor, "rows count"]:
        """The contenders of a weight, as places in its rows, of all processes."""
        first = sum(self.rows[:layer])
        own = self.by_weight()[layer].view(self.rows[layer], -1)
        return own - self._row_starts[first : first + self.rows[layer], None]

    def restore(self, layer: int, saved: Int[Tensor, "rows count"]) -> None:
        """Restore the contenders of a weight from what `saved` returned."""
        own = [self.saved(place) for place in range(len(self._weights))]
        own[layer] = saved.to(self.positions.device).long()
        self.choose(torch.cat([each.flatten() for each in own]), [each.shape[1] for each in own])
