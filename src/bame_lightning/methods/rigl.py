"""RigL inside blocks: drop by magnitude, grow by gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import override

from bame_lightning.bame.contenders import count_in_share
from bame_lightning.bame.room import admitted, group_of
from bame_lightning.bame.schedule import Schedule
from bame_lightning.blocks.layout import from_blocks, to_blocks
from bame_lightning.blocks.pattern import NMPattern
from bame_lightning.blocks.transposable import column_counts
from bame_lightning.ledger.cost import PRODUCTS, Cost
from bame_lightning.methods.holder import Holder
from bame_lightning.methods.masked import Masked
from bame_lightning.weights.layers import SparseWeight
from bame_lightning.weights.mask_set import MaskSet, flip_rates


def drop_and_grow(
    weight: Float[Tensor, "blocks m"],
    gradient: Float[Tensor, "blocks m"],
    mask: Bool[Tensor, "blocks m"],
    share: float,
    rows: int | None = None,
) -> Bool[Tensor, "blocks m"]:
    """Swap one weight in some blocks: the kept one of smallest |w| for the pruned one of largest |g|.

    Evci et al., "Rigging the Lottery: Making All Tickets Winners" (ICML 2020), confined to blocks so that each keeps its
    number of weights (ours). The blocks that swap are those whose smallest kept weight is smallest in the layer (ours).

    Args:
        weight: The weights.
        gradient: Their dense gradient.
        mask: True where kept; at least one kept and one pruned per block.
        share: Share of the blocks that swap, rounded up.
        rows: Rows of the weight, to refuse swaps that put a third kept weight into four consecutive rows of a column.

    Returns:
        The new mask, as many kept per block as before.
    """
    smallest, drop = weight.abs().masked_fill(~mask, math.inf).min(-1)
    grow = gradient.abs().masked_fill(mask, -1).argmax(-1)
    chosen = smallest.argsort(stable=True)[: count_in_share(share, len(mask))]
    new = mask.clone()
    swaps = _fitting(chosen, grow[chosen], mask, rows) if rows else torch.ones_like(chosen, dtype=torch.bool)
    new[chosen, drop[chosen]] = ~swaps
    new[chosen, grow[chosen]] = swaps
    return new


def _fitting(
    blocks: Int[Tensor, " swaps"], places: Int[Tensor, " swaps"], mask: Bool[Tensor, "blocks m"], rows: int
) -> Bool[Tensor, " swaps"]:
    """Choose swaps that fit together, given the places that they grow in their blocks; earlier swaps go first."""
    counts = column_counts(mask, rows)
    group = group_of(blocks * mask.shape[1] + places, counts.shape[1])
    urgency = torch.arange(len(blocks), 0, -1, dtype=torch.float32, device=mask.device)
    return admitted(group, counts.view(-1)[group], urgency, torch.ones_like(blocks, dtype=torch.bool))


class DropAndGrow(Masked):
    """Swap weights now and then by `drop_and_grow`, in a share of each layer's blocks that falls along a cosine.

    Args:
        schedule: When to swap.
        share: Share of blocks that swap at the start, rho.
        rescale: As in `Masked`.
        both_ways: As in `Masked`; swaps that do not fit are refused.
    """

    name = "RigL"
    never = "RigL will never swap a weight"
    cost = Cost("RigL", PRODUCTS, reads=True)
    schedule: Schedule

    def __init__(self, schedule: Schedule, share: float, *, rescale: bool = False, both_ways: bool = False) -> None:
        super().__init__(rescale=rescale, both_ways=both_ways)
        self.schedule = schedule
        self.share = share
        self.masks = MaskSet(())
        self._gradients: dict[str, Tensor] = {}
        self._swapped = False
        self.refused = torch.zeros((), dtype=torch.int64)
        """Swaps refused so far, in all rows, also those of other processes."""

    @override
    def begin(self, restored: Mapping[str, Any] | None) -> None:
        if restored is not None or not self.run.steps:
            self.masks, self.refused = MaskSet(()), torch.tensor((restored or {}).get("refused", 0))
        self.refused = self.refused.to(self.run.weights[0].kept.device)
        self.masks = self.masks.following(self.run.weights)
        if restored is not None:
            self.masks.load_states(restored["layers"])
        self.masks.unchanged()

    @override
    def regroup(self) -> None:
        self.masks = self.masks.following(self.run.weights)
        names = {sparse.name for sparse in self.run.weights}
        self._gradients = {name: gradient for name, gradient in self._gradients.items() if name in names}
        super().regroup()

    @override
    def reads(self, holder: Holder) -> bool:
        return holder.window.adapts(holder.steps)

    @override
    def read(self, holder: Holder, gradients: Mapping[str, Tensor]) -> None:
        self.run.suspect(holder.weights)  # all that is pruned will be zeroed
        for sparse in holder.weights:
            self._gradients.pop(sparse.name, None)
            if sparse.name in gradients:
                gradient = sparse.oriented(gradients[sparse.name])
                self._gradients[sparse.name] = to_blocks(gradient, sparse.pattern.m).clone()

    @override
    def evolve(self, holder: Holder) -> bool:
        self._swapped = holder.window.adapts(holder.steps)
        read = {sparse.name: self._gradients.pop(sparse.name, None) for sparse in holder.weights}
        found = [gradient for gradient in read.values() if gradient is not None]
        if not found:
            return False
        self.enforce(holder.weights)  # what is grown starts at zero
        before = holder.masks_of_copies(holder.weights)
        finite = self.run.everywhere(torch.stack([gradient.isfinite().all() for gradient in found]).all())
        share = self.window_share(holder)
        for sparse in holder.weights:
            gradient = read[sparse.name]
            if gradient is not None and sparse.pattern.n < sparse.pattern.m:
                self._swap(sparse, gradient, share, finite)
        holder.restart_copies(before)
        self.enforce(holder.weights)
        return True

    def window_share(self, holder: Holder) -> float:
        """Share of blocks that swap after the current step."""
        return holder.window.annealed(self.share, holder.steps)

    def _swap(self, sparse: SparseWeight, gradient: Tensor, share: float, finite: Tensor) -> None:
        # The share refers to the blocks of all rows.
        rows, old, blocks = sparse.rows, sparse.mask(), to_blocks(sparse.values, sparse.pattern.m)
        before, confined = rows.gather(old), len(sparse.kept) * rows.parts if self.both_ways else None
        after = drop_and_grow(rows.gather(blocks), rows.gather(gradient), before, share, confined)
        if self.both_ways:
            wanted, swapped = count_in_share(share, len(before)), (after & ~before).sum()
            self.refused += torch.where(finite, wanted - swapped, 0)
        kept = from_blocks(torch.where(finite, rows.own(after), old), sparse.kept.shape)
        self.masks.change(self.masks.weights.index(sparse), kept)

    @override
    def read_shares(self, holder: Holder) -> Mapping[str, float]:
        return {sparse.name: float(self._swapped) for sparse in holder.weights}

    @override
    def mean_read_share(self, pattern: NMPattern, steps: int) -> float:
        return sum(map(self.schedule.window(steps).adapts, range(steps))) / steps

    @override
    def metrics(self) -> dict[str, Tensor]:
        refused = {"bame/refused_swaps": self.refused.float()} if self.both_ways else {}
        return flip_rates([self.masks]) | refused

    @override
    def state(self) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
        return self.masks.states(), {"refused": int(self.refused)} if self.both_ways else {}

    @override
    def summary(self, mean: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]) -> dict[str, Any]:
        refused = {"refused_swaps": int(self.refused)} if self.both_ways else {}
        return {"flips": self.masks.total(), **refused}
