"""Learning-rate schedules, as functions of an optimizer and the number of its steps."""

from __future__ import annotations

from torch.optim import Optimizer
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR


def constant(optimizer: Optimizer, total_steps: int, *, warmup_steps: int = 0) -> LRScheduler:
    """Keep the learning rate, after a linear warm-up.

    Args:
        optimizer: Whose learning rates to set.
        total_steps: Optimizer steps of the run.
        warmup_steps: Optimizer steps from 1 / (`warmup_steps` + 1) of the learning rate up to all of it.

    Returns:
        The scheduler, to be stepped after every optimizer step.
    """
    return _warmed_up(optimizer, ConstantLR(optimizer, factor=1.0), total_steps, warmup_steps)


def cosine(optimizer: Optimizer, total_steps: int, *, warmup_steps: int = 0) -> LRScheduler:
    """Anneal the learning rate to 0 along half a cosine, after a linear warm-up.

    Args:
        optimizer: Whose learning rates to set.
        total_steps: Optimizer steps of the run.
        warmup_steps: Optimizer steps from 1 / (`warmup_steps` + 1) of the learning rate up to all of it.

    Returns:
        The scheduler, to be stepped after every optimizer step.
    """
    annealing = CosineAnnealingLR(optimizer, T_max=max(1, total_steps - warmup_steps))
    return _warmed_up(optimizer, annealing, total_steps, warmup_steps)


def _warmed_up(optimizer: Optimizer, main: LRScheduler, total_steps: int, warmup_steps: int) -> LRScheduler:
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(f"`warmup_steps` must lie in [0, {total_steps}) for {total_steps} steps; got {warmup_steps}.")
    if warmup_steps == 0:
        return main
    warmup = LinearLR(optimizer, start_factor=1 / (warmup_steps + 1), total_iters=warmup_steps)
    return SequentialLR(optimizer, [warmup, main], milestones=[warmup_steps])
