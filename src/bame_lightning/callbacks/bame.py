"""BAME: masks that evolve in designated blocks, by evidence of what pruned weights would have become."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from bame_lightning.bame.evidence import Evidence, OneBatch, Reading
from bame_lightning.bame.evolution import EvolvingWeight
from bame_lightning.bame.oscillation import oscillation_frequency
from bame_lightning.bame.schedule import Schedule
from bame_lightning.blocks.pattern import NMPattern
from bame_lightning.blocks.statistics import percentiles, pooled_mean
from bame_lightning.callbacks.base import Init
from bame_lightning.callbacks.masked import MaskedCallback
from bame_lightning.callbacks.ranks import Copy
from bame_lightning.callbacks.run_length import resolve_window
from bame_lightning.ledger.flops import Shares
from bame_lightning.weights.layers import SparseWeight


class BAMECallback(MaskedCallback):
    """Train N:M sparse from scratch by Block-Aware Mask Evolution.

    Forward, input gradient and the gradient that the optimizer sees stay N:M sparse in every step. Now and then masks
    adapt: in blocks that are not frozen, pruned weights whose evidence outgrew the weakest kept weight take its place.
    Between readings of all, gradients of contenders only are used: the pruned positions that are closest to a swap. See
    `docs/algorithm.md` for the method, and for what is the paper's and what is ours.

    Args:
        pattern: "N:M" or an `NMPattern`.
        layers: Rules that override the default choice of layers: module or parameter name, or a glob over such names ->
            a pattern or "dense". The last match wins.
        schedule: When to adapt; default: every 2 optimizer steps in the first 90 % of the run.
        evidence: What is known of pruned weights: `Evidence`, gathered over many steps, or `OneBatch`, the literal
            one-batch criterion.
        freeze_after: Oscillations that a block may make; one more freezes its mask for good. None never freezes.
        init: Which weights the masks keep at first: of the largest "magnitude", at "random", or the "nonzero" ones of
            weights that are N:M sparse already.
        rescale: At a layer's first gradient, multiply what is kept by sqrt(M / N), unless a batch norm makes the scale
            irrelevant (`scale.alignment`). Right from scratch, wrong for a trained network.
        verify: Check all invariants after every step (slow, for debugging).

    Raises:
        ValueError: If an argument is malformed.

    Example:
        >>> callback = BAMECallback("1:16", layers={"*.stem": "dense"}, schedule=Schedule(stop=0.8))
        >>> str(callback.pattern)
        '1:16'
    """

    weight_type: type[EvolvingWeight] = EvolvingWeight
    """What holds the state of a weight; an experiment with the evolution derives from it."""

    schedule: Schedule

    def __init__(
        self,
        pattern: str | NMPattern,
        *,
        layers: Mapping[str, str | NMPattern] | None = None,
        schedule: Schedule = Schedule(),  # noqa: B008 frozen
        evidence: Evidence | OneBatch = Evidence(),  # noqa: B008 frozen
        freeze_after: int | None = None,
        init: Init = "magnitude",
        rescale: bool = True,
        verify: bool = False,
    ) -> None:
        super().__init__(pattern, layers=layers, init=init, rescale=rescale, verify=verify)
        if freeze_after is not None and (not isinstance(freeze_after, int) or freeze_after < 0):
            raise ValueError(f"`freeze_after` must be a number of oscillations >= 0, or None; got {freeze_after!r}.")
        if not isinstance(schedule, Schedule):
            raise ValueError(f"`schedule` must be a `Schedule`, as in Schedule(stop=0.8); got {schedule!r}.")
        if not isinstance(evidence, Evidence | OneBatch):
            raise ValueError(
                f"`evidence` must be an `Evidence` or a `OneBatch`, as in Evidence(contenders=0.1); got {evidence!r}."
            )
        self.schedule = schedule
        self.evidence = evidence
        self.freeze_after = freeze_after
        self.adaptations = 0
        self.evolving: list[EvolvingWeight] = []
        self.discarded = torch.zeros((), dtype=torch.int64)
        self.around_adaptation: Callable[[], AbstractContextManager[None]] = nullcontext
        """What to do before and after masks change, for those who want to compare."""

    @property
    def adapts(self) -> bool:
        """Whether masks adapt after the optimizer step of some optimizer that comes next."""
        return any((followed.window or self._window).adapts(followed.steps) for followed in self._followed)

    @property
    def _reading(self) -> Reading | None:
        """What to read of the gradients of the step that is going on."""
        return self.evidence.reading(self.now.steps, self.window)

    @override
    def plan(self, trainer: L.Trainer) -> None:
        self._window = resolve_window(trainer, self.schedule, "BAME will never adapt a mask")

    @override
    def start_method(self, restored: Mapping[str, Any] | None) -> None:
        going_on = restored is None and self.steps and {w.sparse for w in self.evolving} & set(self.weights)
        if not going_on:
            self.evolving = []
        self._follow_weights()
        if going_on:
            return  # a second fit goes on where the first one ended
        self.adaptations = 0
        self.discarded = torch.zeros((), dtype=torch.int64, device=self.weights[0].weight.device)
        if restored is not None:
            self.adaptations = int(restored["adaptations"])
            self.discarded += restored["discarded"].to(self.discarded.device)
            for weight in self.evolving:
                weight.load_state_dict(restored["layers"][weight.sparse.name])

    @override
    def regroup(self) -> None:
        self._follow_weights()
        super().regroup()

    def _follow_weights(self) -> None:
        known = {weight.sparse: weight for weight in self.evolving}
        # Those that are new are still dense.
        self.evolving = [
            known.get(sparse) or self.weight_type(sparse, self.evidence, self.freeze_after) for sparse in self.weights
        ]

    @override
    def rescaled(self, sparse: SparseWeight, factor: float) -> None:
        for weight in self.evolving:
            if weight.sparse is sparse:
                weight.evidence.mul_(factor)

    @override
    def reads_gradients(self) -> bool:
        return self._reading is not None

    @override
    def read_gradients(self) -> None:
        reading = self._reading
        for weight in self.moving(self.evolving):
            if reading is None:
                weight.read_share = 0.0
            else:
                weight.read(reading.everywhere, self.window.adapts(self.now.steps))

    @override
    def evolve(self, optimizer: Optimizer) -> bool:
        reading, evolving = self._reading, self.moving(self.evolving)
        if reading is not None:
            # One poisoned value would stay in the evidence for good, so all of a step's readings stand or fall together.
            extremes = [bound for weight in evolving for bound in weight.extremes()]
            finite = torch.stack(extremes).isfinite().all() if extremes else torch.ones_like(self.discarded) > 0
            finite = self._ranks.all(finite)
            self.discarded += ~finite
            for weight in evolving:
                weight.accumulate(optimizer, reading, finite, len(self.window))
                if reading.everywhere and isinstance(self.evidence, Evidence):
                    weight.contend(self.evidence.contenders)
        adapts = self.window.adapts(self.now.steps)
        if adapts:
            with self.around_adaptation():
                for weight in evolving:
                    weight.adapt(self.evidence.adaptable_share(self.now.steps, self.window))
            self.adaptations += 1
        for weight in evolving:
            weight.reading = None
        return adapts

    @override
    def shares(self) -> dict[str, Shares]:
        return {w.sparse.name: Shares.bame(w.sparse.pattern.density, w.read_share) for w in self.moving(self.evolving)}

    @override
    def method_statistics(self) -> dict[str, Tensor]:
        positions = sum(weight.mask.numel() for weight in self.evolving)
        frequencies = [oscillation_frequency(w.history.oscillations, self.adaptations) for w in self.evolving]
        urgencies = [weight.closeness().amax(-1).clamp_min(0) for weight in self.evolving]
        # A sum over rows, written so that its mean over ranks is right.
        predicted = [weight.predicted * weight.sparse.rows.parts for weight in self.evolving]
        # Nothing contends any more once the window is over.
        inside = float(self.steps in self._window)
        pruned = sum(weight.pruned_positions for weight in self.evolving)
        contenders = sum(weight.contenders.numel() for weight in self.evolving)
        statistics = {
            "bame/flip_rate": torch.stack([weight.last_flips for weight in self.evolving]).sum() / positions,
            "bame/oscillation_frequency": pooled_mean(frequencies),
            "bame/frozen_fraction": pooled_mean(weight.frozen for weight in self.evolving),
            "bame/designated_fraction": inside * pooled_mean(weight.designated for weight in self.evolving),
            "bame/contender_fraction": torch.tensor(inside * contenders / max(1, pruned)),
            "bame/predicted_loss_reduction": torch.stack(predicted).sum(),
            "bame/discarded_readings": self.discarded.float(),
            "bame/mask_age": pooled_mean(weight.ages for weight in self.evolving),
        }
        for name, values, percents in (
            ("oscillation_frequency", frequencies, (50, 90, 99)),
            ("evidence_to_weight", urgencies, (50, 90)),
        ):
            # Over all rows: a mean of percentiles is none.
            whole = [w.sparse.rows.gather(value) for w, value in zip(self.evolving, values, strict=True)]
            found = percentiles(whole, percents)
            statistics |= {f"bame/{name}_p{p}": value for p, value in zip(percents, found, strict=True)}
        for weight, frequency in zip(self.evolving, frequencies, strict=True):
            layer = f"bame/layer/{weight.sparse.label}"
            statistics[f"{layer}/flip_rate"] = weight.last_flips / weight.mask.numel()
            statistics[f"{layer}/oscillation_frequency"] = frequency.mean()
            statistics[f"{layer}/frozen_fraction"] = weight.frozen.float().mean()
        return statistics

    @override
    def copies(self) -> Iterator[Copy]:
        yield from super().copies()
        for weight in self.evolving:
            # Statistics of the whole layer, even where its rows are spread.
            yield Copy("size of gradients", weight.sparse.label, weight.noise)
            if weight.sparse.rows.whole:
                yield Copy("evidence", weight.sparse.label, weight.evidence)
                yield Copy("contenders", weight.sparse.label, weight.contenders)
                if weight.mean_gradient is not None:
                    yield Copy("mean gradient", weight.sparse.label, weight.mean_gradient)
                yield Copy("flip history", weight.sparse.label, weight.history.oscillations)

    @override
    def save(self, state: dict[str, Any]) -> None:
        for weight in self.evolving:
            state["layers"][weight.sparse.name] |= weight.state_dict()
        state |= {"adaptations": self.adaptations, "discarded": self.discarded.cpu().clone()}

    @override
    def forget(self) -> None:
        super().forget()
        self.evolving = []

    @override
    def _summary(self) -> dict[str, Any]:
        """What the run did, in plain types.

        Returns:
            The summary of `SparseCallback`, and adaptations, mask positions flipped, final share of frozen blocks, mean
            oscillation frequency, discarded readings.
        """
        summary = super()._summary()
        totals = {
            "adaptations": self.adaptations,
            "flips": sum(int(weight.sparse.rows.total(weight.flips)) for weight in self.evolving),
            "discarded_readings": int(self.discarded),
        }
        # Nothing that looks at the weights: Lightning has moved them to the CPU by now.
        frequencies = [oscillation_frequency(w.history.oscillations, self.adaptations) for w in self.evolving]
        frozen = [weight.frozen for weight in self.evolving]
        means = {"oscillation_frequency": pooled_mean(frequencies), "frozen_fraction": pooled_mean(frozen)}
        return summary | totals | {name: float(mean) for name, mean in self._mean(means).items()}
