"""The literal criterion of one batch: the rule `OneBatch`, weight by weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from bame_lightning.bame.contenders import count_in_share
from bame_lightning.bame.criterion import first_order_worth, select_mask
from bame_lightning.bame.evolving import EvolvingBlocks
from bame_lightning.bame.reading import Reading
from bame_lightning.blocks.layout import from_blocks, to_blocks
from bame_lightning.blocks.masks import zero_pruned_, zeroed
from bame_lightning.weights.layers import SparseWeight
from bame_lightning.weights.optimizer_step import block_rates, update_rule
from bame_lightning.weights.sharding import ALL_ROWS, Rows, local


class OneBatchBlocks(EvolvingBlocks):
    """Blocks whose evidence is the step that the optimizer would have taken for one gradient, forgotten afterwards.

    Args:
        weights: The weights.
        freeze_after: Oscillations that a block may make; one more freezes its mask. None never freezes.
    """

    def __init__(self, weights: Sequence[SparseWeight], freeze_after: int | None) -> None:
        super().__init__(weights, freeze_after)
        self._read: list[Float[Tensor, "blocks m"] | None] = [None] * len(weights)

    @override
    def read(self, gradients: Sequence[Tensor | None], *, everywhere: bool, adapts: bool) -> None:
        found = [
            None if gradient is None else self.table.blocks(gradient, layer).to(self.table.dtype, copy=True)
            for layer, gradient in enumerate(gradients)
        ]
        unfrozen = (
            float((~self.table.frozen_of(layer)).float().mean()) if self.table.freeze_after is not None else 1.0
            for layer in range(len(found))
        )
        self._read, self.extremes = found, [bound for read in found if read is not None for bound in read.aminmax()]
        self.read_shares = [0.0 if read is None else share for read, share in zip(found, unfrozen, strict=True)]

    @override
    def accumulate(self, optimizer: Optimizer, reading: Reading, finite: Bool[Tensor, ""], window: int) -> None:
        self.table.evidence.zero_()
        for layer, (sparse, gradient) in enumerate(zip(self.weights, self._read, strict=True)):
            if gradient is None:
                continue
            zero_pruned_(gradient, finite)
            mask = sparse.mask()
            rule = update_rule(optimizer, sparse.weight)
            moment = None if rule.second_moment is None else self.table.blocks(local(rule.second_moment), layer)
            rate = reading.steps * block_rates(rule, moment, gradient, mask, self.pattern.n)
            # The optimizer's second moment may not be finite either.
            rate = torch.where(finite, rate, 0).expand(len(gradient), 1)
            may = ~mask & ~self.table.frozen_of(layer)[:, None]
            self.table.of(layer, self.table.evidence).addcmul_(zeroed(gradient, may), rate, value=-1)

    @override
    def adapt(self, share: float = 1.0) -> list[Tensor] | None:
        before = [sparse.mask().clone() for sparse in self.weights]
        after = [self._adapt(layer, share) for layer in range(len(self.weights))]
        self.table.history.record(torch.cat(before), torch.cat(after))
        return None

    def _adapt(self, layer: int, share: float) -> Bool[Tensor, "blocks m"]:
        """Adapt one weight; returns its new mask."""
        sparse, gradient = self.weights[layer], self._read[layer]
        mask = sparse.mask().clone()
        if gradient is None or not sparse.weight.requires_grad:
            self.table.masks.change(layer, sparse.kept.clone())
            self.table.predicted[layer] = 0
            return mask
        # The optimizer may have moved pruned weights; they are zeroed only later.
        old = zeroed(to_blocks(sparse.values, self.pattern.m).to(self.table.dtype), mask)
        evidence = self.table.of(layer, self.table.evidence)
        new = choose_masks(
            first_order_worth(old + evidence, gradient),
            mask,
            ~self.table.frozen_of(layer),
            self.pattern.n,
            share=share,
            rows=sparse.rows,
        )
        weight = zeroed(old + evidence, new)
        self.table.predicted[layer] = -torch.dot(gradient.flatten(), (weight - old).flatten())
        evidence.copy_(zeroed(old + evidence, ~new))
        sparse.values.copy_(from_blocks(weight, sparse.values.shape))
        self.table.masks.change(layer, from_blocks(new, sparse.kept.shape))
        return new

    @override
    def end_step(self) -> None:
        self._read, self.extremes = [None] * len(self.weights), []


def choose_masks(
    worth: Float[Tensor, "blocks m"],
    mask: Bool[Tensor, "blocks m"],
    adaptable: Bool[Tensor, "#blocks"] | None,
    n: int,
    *,
    share: float = 1.0,
    rows: Rows = ALL_ROWS,
) -> Bool[Tensor, "blocks m"]:
    """Swap in those blocks of one weight that gain most: a share of them.

    Args:
        worth: What each latent weight is worth; those of the greatest worth are kept.
        mask: The mask in force, exactly `n` kept per block.
        adaptable: Blocks that may change; None for all.
        n: Weights kept per block.
        share: Confine the swaps to this share of all blocks (rounded up), those that gain most.
        rows: The rows of the blocks; the share refers to the blocks of all rows.

    Returns:
        The new mask.
    """
    proposed = select_mask(worth, mask, n, adaptable=adaptable)
    if share >= 1:
        return proposed
    # Summed over a block: the worth of revived weights minus that of pruned ones.
    gain = (worth * (proposed.to(worth.dtype) - mask.to(worth.dtype))).sum(-1)
    ranked = rows.gather(gain).argsort(descending=True, stable=True)
    best = rows.own_index(ranked[: count_in_share(share, len(ranked))], len(mask))
    chosen = torch.zeros(len(mask), dtype=torch.bool, device=mask.device).index_fill(0, best, True)
    return torch.where(chosen[:, None], proposed, mask)
