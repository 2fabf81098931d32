"""`RigL`: drop and grow inside blocks, in a Trainer."""

from __future__ import annotations

from collections.abc import Mapping

from bame_lightning.bame.schedule import Schedule
from bame_lightning.blocks.pattern import NMPattern
from bame_lightning.callbacks.driver import SparseCallback, shown
from bame_lightning.methods.execution import Compute
from bame_lightning.methods.rigl import DropAndGrow
from bame_lightning.methods.training import Init


class RigL(SparseCallback):
    r"""Drop the smallest kept weights and grow the pruned weights of the largest gradient, inside blocks.

    Weights swap after every `schedule.every` optimizer steps, in a share of each layer's blocks that falls along a cosine
    from rho to 0: $\frac{\rho}{2}(1 + \cos(\pi\,\text{progress}))$. Grown weights start at zero, without optimizer state.
    The dense gradient is that of the same step; if it is not finite, nothing changes.

    Args:
        pattern: "N:M" or an `NMPattern`.
        layers: Rules that override the default choice of layers, as in `BAMECallback`.
        schedule: When to swap; default: every 100 optimizer steps in the first 75 % of the run.
        share: Share of blocks that swap at the start, rho.
        init: Which weights the masks keep at first, as in `BAMECallback`.
        rescale: Whether to rescale what is kept at first, as in `BAMECallback`.
        both_ways: Keep at most two weights of any four consecutive outputs of an input, so that sparse tensor cores multiply
            with the transposed weight, too. The first mask is repaired, and swaps that do not fit are refused. The pattern
            must be 1:M, or 2:M where 4 divides M.
        verify: Check all invariants after every step (slow, for debugging).
        compute: How products of sparse layers are computed, as in `BAMECallback`.

    Raises:
        ValueError: If an argument is malformed.
    """

    method: DropAndGrow
    share: float = shown("method.share", "Share of blocks that swap at the start.")

    def __init__(
        self,
        pattern: str | NMPattern,
        *,
        layers: Mapping[str, str | NMPattern] | None = None,
        schedule: Schedule = Schedule(stop=0.75, every=100),  # noqa: B008 frozen
        share: float = 0.3,
        init: Init = "magnitude",
        rescale: bool = True,
        both_ways: bool = False,
        verify: bool = False,
        compute: Compute = "dense",
    ) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"`share` is a share of blocks in (0, 1]; got {share}.")
        method = DropAndGrow(schedule, share, rescale=rescale, both_ways=both_ways)
        super().__init__(pattern, method, layers=layers, init=init, verify=verify, compute=compute)
