"""`BAMECallback`: Block-Aware Mask Evolution in a Trainer."""

from __future__ import annotations

from collections.abc import Mapping

from bame_lightning.bame.evidence import Evidence, OneBatch
from bame_lightning.bame.schedule import Schedule
from bame_lightning.bame.table import EvolvingLayer
from bame_lightning.blocks.pattern import NMPattern
from bame_lightning.callbacks.driver import SparseCallback, shown
from bame_lightning.methods.bame import BAME
from bame_lightning.methods.execution import Compute
from bame_lightning.methods.training import Init


class BAMECallback(SparseCallback):
    """Train N:M sparse from scratch by Block-Aware Mask Evolution.

    Forward pass, input gradient and the gradient that the optimizer sees stay N:M sparse in every step. Every few steps masks
    adapt: a pruned weight takes the place of the weakest kept weight of its block if its evidence is larger than that weight.
    Most steps read the gradients of *contenders* only, the pruned weights that are closest to a swap. `docs/algorithm.md`
    describes the method, and says which part is the paper's and which is ours.

    Args:
        pattern: "N:M" or an `NMPattern`.
        layers: Rules that override the default choice of layers: module or parameter name, or a glob over such names ->
            a pattern or "dense". The last match wins.
        schedule: When to adapt; default: every 2 optimizer steps in the first 90 % of the run.
        evidence: The rule by which pruned weights come back: `Evidence` gathers gradients over many steps, `OneBatch` is
            the literal reading of the paper, which looks at one batch.
        freeze_after: Oscillations that a block may make; one more freezes its mask for good. None never freezes.
        init: Which weights the masks keep at first: "magnitude" keeps the largest, "random" any, "nonzero" those that are
            not zero in weights that are N:M sparse already.
        rescale: At a layer's first gradient, multiply what is kept by sqrt(M / N), unless a batch norm makes the scale
            irrelevant (`weights.scale.alignment`). This is right from scratch, wrong for a trained network.
        both_ways: Keep at most two weights of any four consecutive outputs of an input, so that sparse tensor cores multiply
            with the transposed weight, too. The first mask is repaired, and swaps that do not fit are refused. The pattern
            must be 1:M, or 2:M where 4 divides M.
        verify: Check all invariants after every step (slow, for debugging).
        compute: How products of sparse layers are computed: "dense" as without the callback, "auto" in the way that is measured
            to be fastest, "sparse" by sparse products only; where that is not possible, it is an error (`docs/performance.md`).

    Raises:
        ValueError: If an argument is malformed.

    Example:
        >>> callback = BAMECallback("1:16", layers={"*.stem": "dense"}, schedule=Schedule(stop=0.8))
        >>> str(callback.pattern)
        '1:16'
    """

    method: BAME
    evidence: Evidence | OneBatch = shown("method.evidence", "The rule by which pruned weights come back.")
    freeze_after: int | None = shown("method.freeze_after", "Oscillations that a block may make.")
    evolving: list[EvolvingLayer] = shown("method.layers", "The evolving state of each weight.")
    adaptations: int = shown("method.adaptations", "Adaptations so far.")

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
        both_ways: bool = False,
        verify: bool = False,
        compute: Compute = "dense",
    ) -> None:
        if freeze_after is not None and (not isinstance(freeze_after, int) or freeze_after < 0):
            raise ValueError(f"`freeze_after` must be a number of oscillations >= 0, or None; got {freeze_after!r}.")
        if not isinstance(schedule, Schedule):
            raise ValueError(f"`schedule` must be a `Schedule`, as in Schedule(stop=0.8); got {schedule!r}.")
        if not isinstance(evidence, Evidence | OneBatch):
            raise ValueError(
                f"`evidence` must be an `Evidence` or a `OneBatch`, as in Evidence(contenders=0.1); got {evidence!r}."
            )
        if both_ways and isinstance(evidence, OneBatch):
            raise ValueError(
                "`both_ways=True` refuses single swaps, which `OneBatch` does not make; use evidence=Evidence()."
            )
        method = BAME(evidence, schedule, freeze_after, rescale=rescale, both_ways=both_ways)
        super().__init__(pattern, method, layers=layers, init=init, verify=verify, compute=compute)

    @property
    def adapts(self) -> bool:
        """Whether masks adapt after the next step of any optimizer."""
        return any(holder.window.adapts(holder.steps) for holder in self.training.run.holders)
