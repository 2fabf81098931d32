"""Which pruned positions contend, the same number in each output row of a weight, and where they lie in memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int, Int16, Shaped
from torch import Tensor

from bame_lightning.bame.contenders import first
from bame_lightning.weights.layers import SparseWeight
from bame_lightning.weights.positions import Positions


class Contenders:
    """The contenders: the pruned positions that a step reads when it does not read everything.

    Args:
        weights: The weights, of one pattern.
        positions: How their positions are numbered.

    Attributes:
        m: Positions in a block.
        positions: The contenders, weight by weight and row by row, equally many in each row of a weight; shape (contenders,).
        counts: How many are in each weight, on the device; shape (weights,).
        split: The same as plain numbers.
    """

    def __init__(self, weights: Sequence[SparseWeight], positions: Positions) -> None:
        self._weights, self._numbering, self.m = weights, positions, weights[0].pattern.m
        self.split: list[int] = []
        # Where contenders and the kept weights of their blocks lie, until one of them changes.
        self._places: Tensor | None = None
        device = weights[0].kept.device
        self.rows = [len(sparse.kept) for sparse in weights]
        lengths = [sparse.kept.numel() // rows for sparse, rows in zip(weights, self.rows, strict=True)]
        length = torch.tensor(lengths, device=device).repeat_interleave(torch.tensor(self.rows, device=device))
        self._row_starts = length.cumsum(0) - length
        self.choose([torch.zeros(rows, 0, dtype=torch.int64, device=device) for rows in self.rows])

    def choose(self, chosen: Sequence[Tensor]) -> None:
        """Choose new contenders, for each weight given as places in each row; shape (rows, count)."""
        self._places = None
        split = [own.numel() for own in chosen]
        if split != self.split:
            self.split = split
            device = self._row_starts.device
            self.counts = torch.tensor(split, device=device)
            # Rows without a contender, as in a weight that has just joined, challenge no kept weight.
            self._row_split = [len(own) if own.shape[1] else 0 for own in chosen]
            rows, layers = (torch.tensor(v, device=device) for v in (self._row_split, range(len(chosen))))
            per_row = torch.tensor([own.shape[1] for own in chosen], device=device)
            self._row_layer, self._per_row = layers.repeat_interleave(rows), per_row.repeat_interleave(rows)
            self._counts_of_rows = per_row.repeat_interleave(torch.tensor(self.rows, device=device))
        places = torch.cat([own.flatten() for own in chosen])
        self.positions = places.add_(self._row_starts.repeat_interleave(self._counts_of_rows, output_size=len(places)))

    def replace(self, slots: Int[Tensor, " rows"], positions: Int[Tensor, " rows"]) -> None:
        """Put other positions into slots."""
        self.positions.index_copy_(0, slots, positions)

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

    def contested(self, kept_places: Int16[Tensor, "blocks n"]) -> Int[Tensor, "places contenders"]:
        """The place of each contender, and of its block's kept weights, in the memory of its weight; kept until `forget`."""
        if self._places is None:
            block, numbering = self.blocks, self._numbering
            kept = kept_places.index_select(0, block).t().long()
            places = torch.cat((numbering.within(self.positions)[None], kept))
            self._places = numbering.offsets(block, places, self.counts)
        return self._places

    def forget(self) -> None:
        """Call when blocks keep other positions."""
        self._places = None

    def first_of_rows(
        self, near: Float[Tensor, " contenders"]
    ) -> tuple[Int[Tensor, " rows"], Bool[Tensor, " rows"], Int[Tensor, " rows"], list[int]]:
        """For each row the contender closest to a swap (slot, may it swap, its weight), and the rows of each weight."""
        rows = len(self._row_layer)
        group = torch.arange(rows, device=near.device).repeat_interleave(self._per_row, output_size=len(near))
        return *first(near, group, rows), self._row_layer, self._row_split

    def first_of_blocks(
        self, near: Float[Tensor, " contenders"]
    ) -> tuple[Int[Tensor, " blocks"], Bool[Tensor, " blocks"], Int[Tensor, " blocks"], list[int]]:
        """The same for each block that has a contender which may swap; waits for the device."""
        starts = self._numbering.starts
        slot, may = first(near, self.blocks, starts[-1] // self.m)
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
        self.choose(own)
