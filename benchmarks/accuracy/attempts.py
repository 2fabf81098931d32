"""What was tried and is not in the default, as rules of evidence; `study.py` runs them and `docs/results.md` lists them.

Each is a rule that `bame-train` takes as `method.evidence._target_=benchmarks.accuracy.attempts.NAME` in the project's folder.
What was tried on the first version, which read blocks instead of positions, is in this file's history.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from bame_lightning import Evidence
from bame_lightning.bame.contenders import choose
from bame_lightning.bame.evolution import ContendingBlocks
from bame_lightning.bame.evolving import EvolvingBlocks
from bame_lightning.bame.swaps import Challenge
from bame_lightning.blocks.layout import from_blocks
from bame_lightning.blocks.masks import zero_pruned_
from bame_lightning.weights.layers import SparseWeight


class BlockContenders(Evidence):
    """One contender in every block."""

    def begin(self, weights: Sequence[SparseWeight], freeze_after: int | None) -> EvolvingBlocks:
        return _BlockContenders(weights, self, freeze_after)


class _BlockContenders(ContendingBlocks):
    @override
    def choose(self, ratios: Tensor, count: int) -> Tensor:
        blocks = choose(ratios.view(-1, self.pattern.m), 1).view(len(ratios), -1)
        return blocks + torch.arange(0, ratios.shape[1], self.pattern.m, device=ratios.device)


class RandomContenders(Evidence):
    """Contenders drawn at random among the pruned positions of a row."""

    def begin(self, weights: Sequence[SparseWeight], freeze_after: int | None) -> EvolvingBlocks:
        return _RandomContenders(weights, self, freeze_after)


class _RandomContenders(ContendingBlocks):
    @override
    def choose(self, ratios: Tensor, count: int) -> Tensor:
        return choose(torch.where(ratios < 0, ratios, torch.rand_like(ratios)), count)


class AnnealedContenders(Evidence):
    """The share of contenders falls along a cosine from twice the rule's own to nothing."""

    def begin(self, weights: Sequence[SparseWeight], freeze_after: int | None) -> EvolvingBlocks:
        return _AnnealedContenders(weights, self, freeze_after)


class _AnnealedContenders(ContendingBlocks):
    share: float | None = None

    @override
    def accumulate(self, optimizer: Any, reading: Any, finite: Tensor, window: int) -> None:
        super().accumulate(optimizer, reading, finite, window)
        # What is forgotten falls along the same cosine, from 1.
        self.share = min(1.0, max(1e-9, 2 * self.config.contenders * reading.forgets))

    @override
    def contend(self, share: float | None = None) -> None:
        super().contend(self.share if share is None else share)


class MeanOfContenders(Evidence):
    """A mean of gradients for contenders only: that of all others starts anew at each reading."""

    def begin(self, weights: Sequence[SparseWeight], freeze_after: int | None) -> EvolvingBlocks:
        return _MeanOfContenders(weights, self, freeze_after)


class _MeanOfContenders(ContendingBlocks):
    @override
    def accumulate(self, optimizer: Any, reading: Any, finite: Tensor, window: int) -> None:
        mean = self.table.accumulated.mean
        if reading.everywhere and mean is not None:
            contends = torch.zeros(mean.numel(), dtype=torch.bool).index_fill_(
                0, self.contenders.positions.long(), True
            )
            zero_pruned_(mean, contends.view_as(mean))
        super().accumulate(optimizer, reading, finite, window)


class HalfStart(Evidence):
    """A revived weight starts half as large, and so does the evidence of the weight it replaces."""

    def begin(self, weights: Sequence[SparseWeight], freeze_after: int | None) -> EvolvingBlocks:
        return _HalfStart(weights, self, freeze_after)


class _HalfStart(ContendingBlocks):
    @override
    def starts(self, found: Challenge, size: Tensor) -> tuple[Tensor, Tensor]:
        revived, left = super().starts(found, size)
        return revived / 2, left / 2


class Heir(Evidence):
    """A revived weight takes over what the optimizer keeps of the squares of the gradients of the weight that it replaces."""

    def begin(self, weights: Sequence[SparseWeight], freeze_after: int | None) -> EvolvingBlocks:
        return _Heir(weights, self, freeze_after)


class _Heir(ContendingBlocks):
    @override
    def accumulate(self, optimizer: Any, reading: Any, finite: Tensor, window: int) -> None:
        super().accumulate(optimizer, reading, finite, window)
        self.optimizer = optimizer

    @override
    def adapt(self, share: float = 1.0) -> list[Tensor] | None:
        before = [sparse.mask().clone() for sparse in self.weights]
        swaps = super().adapt(share)
        for layer, (sparse, old) in enumerate(zip(self.weights, before, strict=True)):
            state: dict[str, Any] = self.optimizer.state[sparse.weight]
            for key in {"exp_avg_sq", "square_avg", "momentum_buffer"} & state.keys():
                values, new = self.table.blocks(state[key], layer), sparse.mask()
                heritage = torch.where(old & ~new, values, 0).sum(-1, keepdim=True)
                inherited = torch.where(new & ~old, heritage, values)
                sparse.oriented(state[key]).copy_(from_blocks(inherited, sparse.kept.shape))
        return swaps
