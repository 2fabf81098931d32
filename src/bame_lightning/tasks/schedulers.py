"""Learning-rate schedules, as functions of an optimizer and the number of its steps."""

from __future__ import annotations

from torch.optim import Optimizer
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR


def constant(optimizer: Optimizer, total_steps: int, *, warmup_steps: int | float = 0) -> LRScheduler:
    """Keep the learning rate, after a linear warm-up.

    Args:
        optimizer: The optimizer whose learning rates are set.
        total_steps: Optimizer steps of the run.
        warmup_steps: Optimizer steps of the warm-up (int), or its fraction of the run (float). It begins at
            1 / (`warmup_steps` + 1) of the learning rate and ends at all of it.

    Returns:
        The scheduler; step it after every optimizer step.
    """
    steps = _count(warmup_steps, total_steps)
    return _warmed_up(optimizer, ConstantLR(optimizer, factor=1.0), steps)


def cosine(optimizer: Optimizer, total_steps: int, *, warmup_steps: int | float = 0) -> LRScheduler:
    """Anneal the learning rate to 0 along half a cosine, after a linear warm-up.

    Args:
        optimizer: The optimizer whose learning rates are set.
        total_steps: Optimizer steps of the run.
        warmup_steps: Optimizer steps of the warm-up (int), or its fraction of the run (float). It begins at
            1 / (`warmup_steps` + 1) of the learning rate and ends at all of it.

    Returns:
        The scheduler; step it after every optimizer step.
    """
    steps = _count(warmup_steps, total_steps)
    return _warmed_up(optimizer, CosineAnnealingLR(optimizer, T_max=max(1, total_steps - steps)), steps)


def _count(warmup_steps: int | float, total_steps: int) -> int:
    if isinstance(warmup_steps, bool) or not isinstance(warmup_steps, int | float):
        raise ValueError(f"`warmup_steps` must be a number of steps, or a fraction of them; got {warmup_steps}.")
    if not 0 <= warmup_steps < (1 if isinstance(warmup_steps, float) else total_steps):
        raise ValueError(
            f"`warmup_steps` must lie in [0, {total_steps}) for {total_steps} steps, or in [0.0, 1.0) as a fraction of "
            f"them; got {warmup_steps}."
        )
    return round(warmup_steps * total_steps) if isinstance(warmup_steps, float) else warmup_steps


def _warmed_up(optimizer: Optimizer, main: LRScheduler, warmup_steps: int) -> LRScheduler:
    if warmup_steps == 0:
        return main
    warmup = LinearLR(optimizer, start_factor=1 / (warmup_steps + 1), total_iters=warmup_steps)
    return SequentialLR(optimizer, [warmup, main], milestones=[warmup_steps])
