"""What was tried and is not in the default, as small changes of it; `study.py` runs them and `docs/results.md` lists them.

Each is a callback that `bame-train` takes as `method._target_=benchmarks.accuracy.attempts.NAME` in the project's folder.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from bame_lightning import BAMECallback
from bame_lightning.blocks import to_blocks
from bame_lightning.designation import designate, urgency
from bame_lightning.evidence import Evidence, Reading
from bame_lightning.evolution import ALL, EvolvingWeight
from bame_lightning.schedule import Window


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
        self.designated = designate(torch.rand(len(self.evidence), device=self.evidence.device), self.frozen, share)


class HalfPrecisionWeight(EvolvingWeight):
    """Evidence is rounded to bfloat16 after every reading, as if it were stored so."""

    @override
    def accumulate(self, optimizer: Optimizer, reading: Reading, finite: Tensor, window: int) -> None:
        super().accumulate(optimizer, reading, finite, window)
        self.evidence = self.evidence.bfloat16().to(self.dtype)


class HalfMeanWeight(EvolvingWeight):
    """The mean of gradients is rounded to bfloat16 after every reading, as if it were stored so."""

    @override
    def _average(self, index: Tensor | slice, pruned_gradient: Tensor, mean: Tensor, finite: Tensor) -> Tensor:
        moved = super()._average(index, pruned_gradient, mean, finite).clone()
        mean.copy_(moved.bfloat16())
        return moved


class BlockNoiseWeight(EvolvingWeight):
    """The unit of evidence is that of each block, not of the layer: its kept weights and its own gradients."""

    @override
    def _average(self, index: Tensor | slice, pruned_gradient: Tensor, mean: Tensor, finite: Tensor) -> Tensor:
        n, m = self.sparse.pattern.n, self.sparse.pattern.m
        square = pruned_gradient.square().sum(-1) / (m - n)
        if not hasattr(self, "squares"):
            self.squares = torch.zeros(len(self.evidence), device=square.device)
        before = self.squares[index]
        self.squares[index] = torch.where(before > 0, torch.lerp(square, before, 0.9), square)
        weights = to_blocks(self.sparse.values, m)[index].masked_fill(~self.mask[index], 0).square().sum(-1)
        unit = (weights / n / self.squares[index].clamp_min(1e-30)).sqrt()
        mean = super()._average(index, pruned_gradient, mean, finite)
        return mean * (unit / self.unit.clamp_min(1e-30))[:, None]


class UncappedWeight(EvolvingWeight):
    """A revived weight starts at its evidence, however far that went since the last adaptation."""

    @override
    def adapt(self, share: float) -> None:
        index = ALL if self.due else self.designated
        latent = self.evidence[index].clone()
        old = self._blocks(self.sparse.kept, index, copy=True)
        super().adapt(share)
        revived = self._blocks(self.sparse.kept, index) & ~old
        weight = self.sparse.weight.detach()
        self._put(weight, index, torch.where(revived, latent.to(weight.dtype), self._blocks(weight, index)))


class CoolingWeight(EvolvingWeight):
    """A block that oscillates rests for a fifth of the window, instead of freezing for good."""

    @override
    def accumulate(self, optimizer: Optimizer, reading: Reading, finite: Tensor, window: int) -> None:
        super().accumulate(optimizer, reading, finite, window)
        self.rest = window // 5
        self.clock = getattr(self, "clock", 0) + 1

    @override
    def _adaptable(self, index: Tensor | slice) -> Tensor:
        return super()._adaptable(index) & (self.until[index] <= self.clock)

    @override
    def adapt(self, share: float) -> None:
        if not hasattr(self, "until"):
            self.until = torch.zeros(len(self.evidence), device=self.evidence.device)
        before = self.history.oscillations.clone()
        super().adapt(share)
        self.until[self.history.oscillations > before] = self.clock + self.rest


class DesignatedOnlyWeight(EvolvingWeight):
    """Evidence is held in designated blocks only: others start anew at the next reading of all."""

    @override
    def designate(self, share: float) -> None:
        super().designate(share)
        others = torch.ones(len(self.evidence), dtype=torch.bool, device=self.evidence.device)
        others[self.designated] = False
        self.evidence[others] = 0


class ForgetfulSwapWeight(EvolvingWeight):
    """A block that swaps forgets its evidence."""

    @override
    def adapt(self, share: float) -> None:
        before = self.sparse.mask().clone()
        super().adapt(share)
        self.evidence[(self.sparse.mask() != before).any(-1)] = 0


class OneSwapABlockWeight(EvolvingWeight):
    """At most one swap a block and adaptation, where N > 1 would allow several."""

    @override
    def _worth(self, latent: Tensor, index: Tensor | slice) -> Tensor:
        worth = super()._worth(latent, index)
        kept = self._blocks(self.sparse.kept, index)
        best = torch.zeros_like(kept).scatter_(-1, worth.masked_fill(kept, -1).argmax(-1, keepdim=True), True)
        return worth * (kept | best)


class AdamWeight(EvolvingWeight):
    """Evidence follows Adam's direction, m / sqrt(s), of each pruned weight: a float more for each."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.second = torch.zeros_like(self.evidence)
        self.count = torch.zeros(len(self.evidence), 1, device=self.evidence.device)

    @override
    def _average(self, index: Tensor | slice, pruned_gradient: Tensor, mean: Tensor, finite: Tensor) -> Tensor:
        first = super()._average(index, pruned_gradient, mean, finite)
        self.count[index] += 1
        self.second[index] = torch.lerp(pruned_gradient.square(), self.second[index], 0.999)
        first = first / (1 - self.config.momentum ** self.count[index])
        second = self.second[index] / (1 - 0.999 ** self.count[index])
        # In units of the layer's noise, by which the step of evidence divides.
        return first / (second.sqrt() + 1e-12) * self.noise.sqrt()


class CurvedWeight(EvolvingWeight):
    """A latent weight is worth sqrt(h) |x|, h an estimate of the loss's curvature along it: half h x² is its second order."""

    curvature: Tensor | None = None
    """Shaped like the blocks; None as long as nothing is known."""

    @override
    def _worth(self, latent: Tensor, index: Tensor | slice) -> Tensor:
        worth = super()._worth(latent, index)
        return worth if self.curvature is None else worth * self.curvature[index].sqrt()


class CalmFirst(BAMECallback):
    """See `CalmFirstWeight`."""

    weight_type = CalmFirstWeight


class AtRandom(BAMECallback):
    """See `RandomWeight`."""

    weight_type = RandomWeight


class HalfPrecision(BAMECallback):
    """See `HalfPrecisionWeight`."""

    weight_type = HalfPrecisionWeight


class HalfMean(BAMECallback):
    """See `HalfMeanWeight`."""

    weight_type = HalfMeanWeight


class BlockNoise(BAMECallback):
    """See `BlockNoiseWeight`."""

    weight_type = BlockNoiseWeight


class Uncapped(BAMECallback):
    """See `UncappedWeight`."""

    weight_type = UncappedWeight


class Cooling(BAMECallback):
    """See `CoolingWeight`."""

    weight_type = CoolingWeight


class DesignatedOnly(BAMECallback):
    """See `DesignatedOnlyWeight`."""

    weight_type = DesignatedOnlyWeight


class ForgetfulSwap(BAMECallback):
    """See `ForgetfulSwapWeight`."""

    weight_type = ForgetfulSwapWeight


class OneSwapABlock(BAMECallback):
    """See `OneSwapABlockWeight`."""

    weight_type = OneSwapABlockWeight


class AdamMoments(BAMECallback):
    """See `AdamWeight`."""

    weight_type = AdamWeight


class SampledFisher(BAMECallback):
    """Second order by the Fisher information with labels sampled from the network, at readings of all blocks.

    The mean gradient over a batch of B has the square F / B in expectation if labels are the network's own; those of the data
    would give the empirical Fisher information, which is biased. Costs a backward pass at each such reading.
    """

    weight_type = CurvedWeight

    @override
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if not hasattr(self, "_hook"):
            self._hook = pl_module.model.register_forward_hook(self._keep)

    def _keep(self, module: Any, inputs: Any, outputs: Tensor) -> None:
        self._logits = outputs

    @override
    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        super().on_before_backward(trainer, pl_module, loss)
        reading = self.evidence.reading(self.steps, self._window)
        if reading is None or not reading.everywhere:
            return
        logits = self._logits
        sampled = torch.distributions.Categorical(logits=logits.detach()).sample()
        guess = torch.nn.functional.cross_entropy(logits, sampled)
        gradients = torch.autograd.grad(guess, [w.sparse.weight for w in self.evolving], retain_graph=True)
        for weight, gradient in zip(self.evolving, gradients, strict=True):
            assert isinstance(weight, CurvedWeight)
            fisher = len(logits) * weight._blocks(gradient, ALL).square()
            weight.curvature = fisher if weight.curvature is None else torch.lerp(fisher, weight.curvature, 0.9)

    @override
    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        super().on_train_end(trainer, pl_module)
        self._hook.remove()


class InputMoments(BAMECallback):
    """Second order by the second moments of inputs: h of a weight is the mean square of what it multiplies (0.9 running)."""

    weight_type = CurvedWeight

    @override
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_train_start(trainer, pl_module)
        by_weight = {id(weight.sparse.weight): weight for weight in self.evolving}
        self._hooks = [
            module.register_forward_pre_hook(functools.partial(_watch, by_weight[id(module.weight)]))
            for module in pl_module.modules()
            if id(getattr(module, "weight", None)) in by_weight
        ]

    @override
    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        super().on_train_end(trainer, pl_module)
        for hook in self._hooks:
            hook.remove()


def _watch(weight: EvolvingWeight, module: Any, inputs: tuple[Tensor]) -> None:
    assert isinstance(weight, CurvedWeight)
    shape = weight.sparse.weight.shape
    # Features are last for linear layers, second for convolutions.
    dim = -1 if len(shape) == 2 else 1
    square = inputs[0].detach().square().movedim(dim, -1).flatten(0, -2).mean(0)
    square = square.view(-1, shape[1]).mean(0)  # over the groups of a convolution
    square = square.view(1, -1, *(1 for _ in shape[2:])).expand(shape)
    blocks = weight._blocks(square, ALL).to(weight.dtype)
    weight.curvature = blocks.clone() if weight.curvature is None else torch.lerp(blocks, weight.curvature, 0.9)


class AnnealedShare(BAMECallback):
    """The designated share falls along a cosine from twice the default to nothing."""

    @override
    def evolve(self, optimizer: Optimizer) -> bool:
        assert isinstance(self.evidence, Evidence)
        evidence, share = self.evidence, self._window.annealed(2 * self.evidence.share, self.steps)
        self.evidence = dataclasses.replace(evidence, share=min(1.0, share))
        try:
            return super().evolve(optimizer)
        finally:
            self.evidence = evidence


class ClippedEvidence(BAMECallback):
    """Evidence follows the gradient after clipping by norm: a reading is multiplied by the factor of its step."""

    @override
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_train_start(trainer, pl_module)
        self._most, self._parameters = trainer.gradient_clip_val, list(pl_module.parameters())

    @override
    def handle_gradients(self) -> None:
        super().handle_gradients()
        norm = torch.nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        factor = (self._most / norm).clamp(max=1.0)
        for weight in self.evolving:
            if weight.reading is not None:
                weight.reading.gradient.mul_(factor)


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


class HalfLife(_Reread):
    """Evidence halves every quarter of the window, to the end."""

    @staticmethod
    def change(reading: Reading, anneal: float, progress: float) -> Reading:
        """Forget at a constant rate."""
        return reading._replace(forgets=4 * math.log(2))


@dataclasses.dataclass(frozen=True)
class _RarerAndRarer(Evidence):
    @override
    def reading(self, step: int, window: Window) -> Reading | None:
        reading = super().reading(step, window)
        if reading is None:
            return None
        # The density of readings falls in a straight line from twice the default's to nothing.
        done, next_done = (_readings(window.progress(s)) * len(window) / self.read_every for s in (step, step + 1))
        everywhere = step == window.start or math.floor(next_done) > math.floor(done)
        length = self.step_size * window.annealed(1.0, step)
        if everywhere:
            stands_for = round(math.sqrt(min(len(window), self.read_every / (2 * (1 - window.progress(step))))))
            return reading._replace(everywhere=True, steps=max(1, stands_for) * length)
        return reading._replace(everywhere=False, steps=length)


def _readings(progress: float) -> float:
    return 1 - (1 - min(1.0, progress)) ** 2


class RarerAndRarer(BAMECallback):
    """All blocks are read more and more rarely, every fifth step at first."""

    def __init__(self, *args: Any, evidence: Evidence, **kwargs: Any) -> None:
        super().__init__(*args, evidence=_RarerAndRarer(**dataclasses.asdict(evidence)), **kwargs)


@dataclasses.dataclass(frozen=True)
class _LookFirst(Evidence):
    @override
    def reading(self, step: int, window: Window) -> Reading | None:
        reading = super().reading(step, window)
        if reading is None or window.progress(step) >= 0.05:
            return reading
        return reading._replace(everywhere=True, steps=self.step_size * window.annealed(1.0, step))

    @override
    def adaptable_share(self, step: int, window: Window) -> float:
        return float(window.progress(step) >= 0.05)


class LookFirst(BAMECallback):
    """A warm-up before t_i: in the first 5 % of the window all blocks are read at every step, and none adapts."""

    def __init__(self, *args: Any, evidence: Evidence, **kwargs: Any) -> None:
        super().__init__(*args, evidence=_LookFirst(**dataclasses.asdict(evidence)), **kwargs)
