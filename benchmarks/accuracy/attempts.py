"""What was tried and is not in the default, as small changes of it; `study.py` runs them and `docs/results.md` lists them.

Each is a callback that `bame-train` takes as `method._target_=benchmarks.accuracy.attempts.NAME` in the project's folder.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from bame_lightning import BAMECallback
from bame_lightning.designation import designate, urgency
from bame_lightning.evidence import Evidence, Reading
from bame_lightning.evolution import ALL, BlockGradient, EvolvingWeight
from bame_lightning.schedule import Window


class SmoothedWeight(EvolvingWeight):
    """Gradients are smoothed as by momentum 0.9 before evidence follows them: a float more for each pruned weight."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.momentum = torch.zeros_like(self.evidence)

    @override
    def accumulate(self, optimizer: Optimizer, reading: Reading, finite: Tensor, window: int) -> None:
        if self.reading is not None:
            index, gradient = self.reading
            mask = ~self._blocks(self.sparse.pruned, index)
            self._raw = gradient.masked_fill(mask, 0)
            # What has just been revived or pruned starts anew.
            self.momentum[index] = torch.lerp(self._raw, self.momentum[index], 0.9).masked_fill(mask, 0)
            self.reading = BlockGradient(index, self.momentum[index].clone())
        super().accumulate(optimizer, reading, finite, window)

    @override
    def _measure(self, pruned_gradient: Tensor, finite: Tensor) -> None:
        super()._measure(self._raw, finite)


class CalmFirstWeight(EvolvingWeight):
    """Blocks are designated jointly by urgency and by how seldom they oscillated: urgency / (1 + oscillations)."""

    @override
    def designate(self, share: float) -> None:
        weight = self._blocks(self.sparse.weight.detach(), ALL).to(self.dtype)
        rank = urgency(weight, self.evidence, self.sparse.mask()) / (1 + self.history.oscillations)
        self.designated = designate(rank, self.frozen, share)


class RandomWeight(EvolvingWeight):
    """Blocks are designated at random."""

    @override
    def designate(self, share: float) -> None:
        self.designated = designate(torch.rand_like(self.learning_time), self.frozen, share)


class HalfPrecisionWeight(EvolvingWeight):
    """Evidence is rounded to bfloat16 after every reading, as if it were stored so."""

    @override
    def accumulate(self, optimizer: Optimizer, reading: Reading, finite: Tensor, window: int) -> None:
        super().accumulate(optimizer, reading, finite, window)
        self.evidence = self.evidence.bfloat16().to(self.dtype)


class BlockNoiseWeight(EvolvingWeight):
    """The unit of evidence is that of each block, not of the layer: its kept weights and its own gradients."""

    @override
    def accumulate(self, optimizer: Optimizer, reading: Reading, finite: Tensor, window: int) -> None:
        if self.reading is not None:
            index, gradient = self.reading
            mask = ~self._blocks(self.sparse.pruned, index)
            square = gradient.masked_fill(mask, 0).square().sum(-1) / (mask.shape[-1] - self.sparse.pattern.n)
            if not hasattr(self, "squares"):
                self.squares = square.clone()  # the first reading is one of all blocks
            self.squares[index] = torch.lerp(square, self.squares[index], 0.9)
            weights = self._blocks(self.sparse.weight.detach(), index).masked_fill(~mask, 0).square().sum(-1)
            units = (weights / self.sparse.pattern.n / self.squares[index].clamp_min(1e-30)).sqrt()
            super().accumulate(optimizer, reading, finite, window)
            layer = self.unit.clamp_min(1e-30)
            before = self.reading
            assert before is not None
            # The layer's step has been taken; what is missing to the block's own follows.
            step = reading.steps / math.sqrt(2 * window * math.log(self.sparse.pattern.m)) * (units - layer)
            self.evidence[index] -= step[:, None] * before.gradient.masked_fill(mask, 0)


class UncappedWeight(EvolvingWeight):
    """A revived weight starts at its evidence, however far that went since the last adaptation."""

    @override
    def adapt(self, share: float) -> None:
        index = ALL if self.due else self.designated
        latent = self.evidence[index].clone()
        old = ~self._blocks(self.sparse.pruned, index)
        super().adapt(share)
        revived = ~self._blocks(self.sparse.pruned, index) & ~old
        weight = self.sparse.weight.detach()
        self._put(weight, index, torch.where(revived, latent.to(weight.dtype), self._blocks(weight, index)))


class OneSwapARowWeight(EvolvingWeight):
    """At most one block of each output row (a filter) is adapted at a time, the most urgent: a budget for a shared residual."""

    @override
    def adapt(self, share: float) -> None:
        rows = len(self.sparse.weight)
        weight = self._blocks(self.sparse.weight.detach(), ALL).to(self.dtype)
        rank = urgency(weight, self.evidence, self.sparse.mask()).view(rows, -1)
        best = torch.zeros_like(rank, dtype=torch.bool).scatter_(1, rank.argmax(1, keepdim=True), True).flatten()
        designated, self.designated = self.designated, best.nonzero().squeeze(-1)
        self.due = False
        super().adapt(share)
        self.designated = designated


class CoolingWeight(EvolvingWeight):
    """A block that oscillates rests for a fifth of the window, instead of freezing for good."""

    @override
    def accumulate(self, optimizer: Optimizer, reading: Reading, finite: Tensor, window: int) -> None:
        super().accumulate(optimizer, reading, finite, window)
        self.rest = window // 5
        self.clock = getattr(self, "clock", 0) + 1

    @override
    def adapt(self, share: float) -> None:
        if not hasattr(self, "until"):
            self.until = torch.zeros_like(self.learning_time)
        before = self.history.oscillations.clone()
        resting = self.until > self.clock
        time = self.learning_time.clone()
        self.learning_time[resting] = 0  # what was never read does not adapt
        super().adapt(share)
        self.learning_time[resting] = time[resting]
        self.until[self.history.oscillations > before] = self.clock + self.rest


class Smoothed(BAMECallback):
    """See `SmoothedWeight`."""

    weight_type = SmoothedWeight


class CalmFirst(BAMECallback):
    """See `CalmFirstWeight`."""

    weight_type = CalmFirstWeight


class AtRandom(BAMECallback):
    """See `RandomWeight`."""

    weight_type = RandomWeight


class HalfPrecision(BAMECallback):
    """See `HalfPrecisionWeight`."""

    weight_type = HalfPrecisionWeight


class BlockNoise(BAMECallback):
    """See `BlockNoiseWeight`."""

    weight_type = BlockNoiseWeight


class Uncapped(BAMECallback):
    """See `UncappedWeight`."""

    weight_type = UncappedWeight


class OneSwapARow(BAMECallback):
    """See `OneSwapARowWeight`."""

    weight_type = OneSwapARowWeight


class Cooling(BAMECallback):
    """See `CoolingWeight`."""

    weight_type = CoolingWeight


class _Reread(BAMECallback):
    """Evidence with other readings; `change` maps the default's reading and the progress through the window."""

    def __init__(self, *args: Any, evidence: Evidence, **kwargs: Any) -> None:
        super().__init__(*args, evidence=_Changed(**dataclasses.asdict(evidence), by=type(self)), **kwargs)

    @staticmethod
    def change(reading: Reading, anneal: float, progress: float) -> Reading:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class _Changed(Evidence):
    by: Any = None

    @override
    def reading(self, step: int, window: Window) -> Reading | None:
        reading = super().reading(step, window)
        return reading and cast(Reading, self.by.change(reading, window.annealed(1.0, step), window.progress(step)))


class ConstantStep(_Reread):
    """The step of evidence is not annealed."""

    @staticmethod
    def change(reading: Reading, anneal: float, progress: float) -> Reading:
        """Undo the annealing."""
        return reading._replace(steps=reading.steps / max(anneal, 1e-9))


class Unforgetting(_Reread):
    """Evidence forgets nothing."""

    @staticmethod
    def change(reading: Reading, anneal: float, progress: float) -> Reading:
        """Leave the past alone."""
        return reading._replace(forgets=0.0)


class Forgetful(_Reread):
    """Evidence forgets three times as fast."""

    @staticmethod
    def change(reading: Reading, anneal: float, progress: float) -> Reading:
        """Forget more."""
        return reading._replace(forgets=3 * reading.forgets)


class WarmedUp(_Reread):
    """The step of evidence grows from 0 over the first tenth of the window."""

    @staticmethod
    def change(reading: Reading, anneal: float, progress: float) -> Reading:
        """Shrink early steps."""
        return reading._replace(steps=reading.steps * min(1.0, progress / 0.1))
