"""What was tried and is not in the default, as small changes of it; `study.py` runs them and `docs/results.md` lists them.

Each is a callback that `bame-train` takes as `method._target_=benchmarks.accuracy.attempts.NAME` in the project's folder.
What was tried on the first version, which read blocks instead of positions, is in this file's history.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from bame_lightning import BAMECallback
from bame_lightning.bame.contenders import choose
from bame_lightning.bame.evidence import Evidence
from bame_lightning.bame.evolution import ALL, EvolvingWeight


class BlockContendersWeight(EvolvingWeight):
    """One contender in every block."""

    @override
    def contend(self, share: float) -> None:
        self.contenders = choose(self.closeness(), 1).view(len(self.sparse.kept), -1)


class RandomContendersWeight(EvolvingWeight):
    """Contenders drawn at random among the pruned positions of a row."""

    @override
    def closeness(self) -> Tensor:
        return torch.rand_like(self.evidence).masked_fill(self.mask, -1)


class MeanOfContendersWeight(EvolvingWeight):
    """A mean of gradients for contenders only: evidence of all others follows the gradient itself."""

    @override
    def _move_all(self, gradient: Tensor, finite: Tensor, rate: Tensor, keep: Tensor) -> None:
        mean = self.mean_gradient
        assert mean is not None
        held = torch.zeros_like(self.mask).view(-1).index_fill_(0, self.contenders.flatten(), True).view_as(mean)
        seen = torch.where(self.mask, 0, gradient)
        mean.copy_(torch.where(held, torch.lerp(seen, mean, self.config.momentum), 0))
        self.evidence.mul_(keep).sub_(rate * torch.where(held, mean, seen))


class HalfStartWeight(EvolvingWeight):
    """A revived weight starts half as large, and so does the evidence of the weight it replaces."""

    @override
    def adapt(self, share: float) -> None:
        before = self.mask.clone()
        super().adapt(share)
        weight = self._blocks(self.sparse.values, ALL)
        self._put(self.sparse.values, ALL, torch.where(self.mask & ~before, weight / 2, weight))
        self.evidence.copy_(torch.where(before & ~self.mask, self.evidence / 2, self.evidence))


class BlockContenders(BAMECallback):
    """See `BlockContendersWeight`."""

    weight_type = BlockContendersWeight


class RandomContenders(BAMECallback):
    """See `RandomContendersWeight`."""

    weight_type = RandomContendersWeight


class MeanOfContenders(BAMECallback):
    """See `MeanOfContendersWeight`."""

    weight_type = MeanOfContendersWeight


class HalfStart(BAMECallback):
    """See `HalfStartWeight`."""

    weight_type = HalfStartWeight


class AnnealedContenders(BAMECallback):
    """The share of contenders falls along a cosine from twice the default to nothing."""

    @override
    def evolve(self, optimizer: Optimizer) -> bool:
        assert isinstance(self.evidence, Evidence)
        evidence, share = self.evidence, self._window.annealed(2 * self.evidence.contenders, self.steps)
        self.evidence = dataclasses.replace(evidence, contenders=min(1.0, max(1e-9, share)))
        try:
            return super().evolve(optimizer)
        finally:
            self.evidence = evidence


class Heir(BAMECallback):
    """A revived weight takes over what the optimizer keeps of the squares of the gradients of the weight that it replaces."""

    @override
    def evolve(self, optimizer: Optimizer) -> bool:
        before = [weight.mask.clone() for weight in self.evolving]
        evolved = super().evolve(optimizer)
        for weight, old in zip(self.evolving, before, strict=True):
            state: dict[str, Any] = optimizer.state[weight.sparse.weight]
            for key in {"exp_avg_sq", "square_avg", "momentum_buffer"} & state.keys():
                values = weight._blocks(weight.sparse.oriented(state[key]), ALL)
                heritage = torch.where(old & ~weight.mask, values, 0).sum(-1, keepdim=True)
                weight._put(state[key], ALL, torch.where(weight.mask & ~old, heritage, values))
        return evolved
