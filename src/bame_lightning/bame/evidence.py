"""What pruned weights would have become, from the dense gradients that are read.

A pruned weight has no value in the network. Its evidence $v$ is the value that it would have if descent had moved it along the
dense gradients that were read. Evidence decides which weights come back. It is ours, not the paper's (see `docs/algorithm.md`);
the paper's abstract only speaks of the expected loss reduction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from bame_lightning.bame.evolution import ContendingBlocks
from bame_lightning.bame.evolving import EvolvingBlocks
from bame_lightning.bame.one_batch import OneBatchBlocks
from bame_lightning.bame.reading import Reading
from bame_lightning.bame.schedule import Window
from bame_lightning.weights.layers import SparseWeight


@dataclass(frozen=True)
class Evidence:
    r"""Gather evidence over many readings; the default.

    Every `read_every` steps all unfrozen blocks are read. Each output row (a filter) then chooses its *contenders*, the pruned
    positions that are closest to a swap, and the steps in between read only these. A reading of all blocks stands for
    $r = \sqrt{\text{read\_every}}$ steps, rounded: more than one step, because most steps do not read these positions, but not
    for all steps, because that would multiply the noise of one batch.

    The length of the window, the weights and the gradients decide how far evidence moves (`noise_step`). Neither the optimizer
    nor the scale of a layer matters. The step shrinks along a cosine to 0 at the end of the window. A reading also forgets a
    share of the older evidence: at first 1 / n, where n are the steps of the window, then less along the same cosine. Evidence
    follows a running mean of the gradients of its position, which starts anew when a weight is pruned.

    Args:
        read_every: Optimizer steps between two readings of all unfrozen blocks.
        contenders: Share of an output row's pruned positions that the steps in between read, in (0, 1]; rounded up.
        step_size: Multiplies the step that evidence takes, k.
        momentum: Weight of the past in the running mean of gradients, beta, in [0, 1); 0 needs no memory for a mean.
        init: Where the evidence of a pruned weight starts: at "zero", or at its initial value ("weights").
        margin: Share of a kept weight by which evidence must exceed it to replace it.
        one_per_row: Let an adaptation swap in only one block of each output row, the most urgent one. All blocks of a row
            correct the same error of its output, so that together they would overshoot.
        share: Not in use any more; setting it is an error that names the new argument.

    Raises:
        ValueError: If an argument is outside its range.
    """

    read_every: int = 20
    contenders: float = 0.05
    step_size: float = 1.5
    momentum: float = 0.97
    init: Literal["zero", "weights"] = "weights"
    margin: float = 0.2
    one_per_row: bool = True
    share: None = None

    def __post_init__(self) -> None:
        if self.share is not None:
            raise ValueError(
                f"`evidence.share` = {self.share!r} was a share of blocks. Steps read single positions now: say "
                "`evidence.contenders`, a share of a row's pruned positions, such as 0.05."
            )
        for name in ("contenders", "step_size", "momentum", "margin"):
            value = getattr(self, name)
            if not isinstance(value, int | float):
                raise ValueError(f"`evidence.{name}` must be a number; got {value!r}.")
        if not isinstance(self.read_every, int) or self.read_every < 1:
            raise ValueError(
                f"`evidence.read_every` must be a whole number of optimizer steps, at least 1; got {self.read_every!r}."
            )
        if not 0 < self.contenders <= 1:
            raise ValueError(
                f"`evidence.contenders` is a share of a row's pruned positions in (0, 1]; got {self.contenders}."
            )
        if not self.step_size > 0:
            raise ValueError(f"`evidence.step_size` must be positive; got {self.step_size}.")
        if not 0 <= self.momentum < 1:
            raise ValueError(
                f"`evidence.momentum` is the weight of the past in a mean, in [0, 1); got {self.momentum}."
            )
        if self.init not in ("zero", "weights"):
            raise ValueError(f"`evidence.init` must be 'zero' or 'weights'; got {self.init!r}.")
        if not 0 <= self.margin < math.inf:
            raise ValueError(f"`evidence.margin` must be a share of a weight, at least 0; got {self.margin}.")

    def reading(self, step: int, window: Window) -> Reading | None:
        """Decide what to read of the dense gradient of `step`."""
        if step not in window:
            return None
        rest = window.annealed(1.0, step)
        length = self.step_size * rest
        if (step - window.start) % self.read_every == 0:
            return Reading(everywhere=True, steps=round(math.sqrt(self.read_every)) * length, forgets=rest)
        return Reading(everywhere=False, steps=length, forgets=rest, share=self.contenders)

    def adaptable_share(self, step: int, window: Window) -> float:
        """Share of a layer's blocks that may adapt after `step`: all of them."""
        return 1.0

    def begin(self, weights: Sequence[SparseWeight], freeze_after: int | None) -> EvolvingBlocks:
        """Make the evolving blocks of some weights of one pattern and type, which are still dense."""
        return ContendingBlocks(weights, self, freeze_after)


@dataclass(frozen=True)
class OneBatch:
    r"""Evidence of a single batch, forgotten after every adaptation: the literal reading of the paper's abstract.

    Only steps before an adaptation read, and they read all unfrozen blocks. Only those blocks of a layer swap that promise the
    largest loss reduction: a share of them that falls along a cosine, from `share` at the window's start to 0 at its end.

    Args:
        share: Share of a layer's blocks that may adapt at the start, rho.

    Raises:
        ValueError: If `share` is outside (0, 1].
    """

    share: float = 0.3

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(
                f"`evidence.share` of a one-batch criterion is a share of blocks in (0, 1]; got {self.share}."
            )

    def reading(self, step: int, window: Window) -> Reading | None:
        """Decide what to read of the dense gradient of `step`."""
        return Reading(everywhere=True, steps=1) if window.adapts(step) else None

    def adaptable_share(self, step: int, window: Window) -> float:
        """Share of blocks that may adapt, annealed from `share` to 0."""
        return window.annealed(self.share, step)

    def begin(self, weights: Sequence[SparseWeight], freeze_after: int | None) -> EvolvingBlocks:
        """Make the evolving blocks of some weights of one pattern and type."""
        return OneBatchBlocks(weights, freeze_after)
