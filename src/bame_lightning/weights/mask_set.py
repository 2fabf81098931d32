"""The masks of some weights. They change only here, and the changes are counted here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from bame_lightning.blocks.statistics import flipped_positions, nonzero_share, survival
from bame_lightning.weights.layers import SparseWeight
from bame_lightning.weights.positions import extent


class MaskSet:
    """Change masks, and count the positions that change; a swap changes two.

    Args:
        weights: The weights. Their masks move into one tensor, so that one operation changes the masks of all. Each mask
            lies in memory as its weight does, so that a position means the same in both.

    Attributes:
        flips: Mask positions changed so far, by weight; shape (weights,).
        last_flips: Positions changed by the last change of each mask; shape (weights,).
    """

    def __init__(self, weights: Sequence[SparseWeight]) -> None:
        self.weights = list(weights)
        device = self.weights[0].kept.device if self.weights else None
        self.flips = torch.zeros(len(self.weights), dtype=torch.int64, device=device)
        self.last_flips = torch.zeros_like(self.flips)
        values = [sparse.values for sparse in self.weights]
        starts = [0, *accumulate(map(extent, values))]
        self._starts = torch.tensor(starts, device=device)
        self._kept = torch.zeros(starts[-1], dtype=torch.bool, device=device)
        for sparse, value, start in zip(self.weights, values, starts, strict=False):
            # In the memory layout of its weight.
            kept = self._kept.as_strided(value.shape, value.stride(), start)
            sparse.kept = kept.copy_(sparse.kept)

    def following(self, weights: Sequence[SparseWeight]) -> MaskSet:
        """Make the set for other weights; weights that stay keep their counts."""
        if self.weights == list(weights):
            return self
        masks, known = MaskSet(weights), {id(sparse): place for place, sparse in enumerate(self.weights)}
        for place, sparse in enumerate(weights):
            if id(sparse) in known:
                masks.load_state(place, self.state(known[id(sparse)]))
        return masks

    def change(self, place: int, kept: Bool[Tensor, "out inp *kernel"]) -> None:
        """Replace the mask of a weight, which is given by its place in the set."""
        sparse = self.weights[place]
        self.last_flips[place] = flipped_positions(sparse.kept, kept)
        self.flips[place] += self.last_flips[place]
        sparse.kept.copy_(kept)

    def swap(
        self,
        revived: Int[Tensor, " swaps"],
        pruned: Int[Tensor, " swaps"],
        swapped: Bool[Tensor, " swaps"],
        of: Int[Tensor, " swaps"],
    ) -> None:
        """Swap positions: keep one and prune another. No position is in two swaps.

        Args:
            revived: Place in the memory of its weight of the position to keep from now on.
            pruned: Place of the position to prune.
            swapped: Whether to swap. If not, the first must be pruned already and the second kept.
            of: Place in the set of each swap's weight.
        """
        starts = self._starts.index_select(0, of)
        places = torch.cat((revived + starts, pruned + starts))
        self._kept.index_copy_(0, places, torch.cat((swapped, ~swapped)))
        self.last_flips = torch.zeros_like(self.flips).index_add_(0, of, swapped.long(), alpha=2)
        self.flips += self.last_flips

    def unchanged(self) -> None:
        """Tell the set that this step changed no mask."""
        self.last_flips = torch.zeros_like(self.flips)

    def state(self, place: int) -> dict[str, Tensor]:
        """Copy the counts of a weight, over all rows, into main memory."""
        rows, counts = self.weights[place].rows, {"flips": self.flips, "last_flips": self.last_flips}
        return {name: rows.total(values[place]).cpu().clone() for name, values in counts.items()}

    def load_state(self, place: int, state: Mapping[str, Any]) -> None:
        """Go on counting from what `state` returned."""
        rows = self.weights[place].rows
        for name, counts in (("flips", self.flips), ("last_flips", self.last_flips)):
            counts[place] = rows.part_of(state[name].to(counts.device))

    def states(self) -> dict[str, dict[str, Any]]:
        """The `state` of each weight, by name."""
        return {sparse.name: self.state(place) for place, sparse in enumerate(self.weights)}

    def load_states(self, states: Mapping[str, Mapping[str, Any]]) -> None:
        """Go on counting from what `states` returned; other keys in it are ignored."""
        for place, sparse in enumerate(self.weights):
            self.load_state(place, states[sparse.name])

    def total(self) -> int:
        """Mask positions changed so far, in all weights and rows; waits for the device."""
        return sum(int(sparse.rows.total(flips)) for sparse, flips in zip(self.weights, self.flips, strict=True))


def flip_rates(sets: Iterable[MaskSet]) -> dict[str, Tensor]:
    """Share of mask positions that the last change has changed, over all weights and layer by layer.

    Returns:
        Metrics, on the device of the masks; none without weights.
    """
    found = [(sparse, flips) for each in sets for sparse, flips in zip(each.weights, each.last_flips, strict=True)]
    if not found:
        return {}
    total = torch.stack([flips for _, flips in found]).sum() / sum(sparse.kept.numel() for sparse, _ in found)
    layers = {f"bame/layer/{sparse.label}/flip_rate": flips / sparse.kept.numel() for sparse, flips in found}
    return {"bame/flip_rate": total, **layers}


def mask_statistics(weights: Sequence[SparseWeight]) -> dict[str, Tensor]:
    """Share of non-zeros, and share of the positions kept at first that are kept now; 1 without sparse weights."""
    if not weights:
        return {"bame/density": torch.ones(()), "bame/survival": torch.ones(())}
    return {
        "bame/density": nonzero_share(sparse.values for sparse in weights),
        "bame/survival": survival((sparse.kept, sparse.initial) for sparse in weights),
    }
