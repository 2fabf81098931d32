"""How many steps a run has: from the Trainer, or under manual optimization from the steps so far."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn

from bame_lightning.bame.schedule import Schedule, Window
from bame_lightning.callbacks.packages import accumulation_schedulers
from bame_lightning.methods.holder import Holder
from bame_lightning.methods.method import Method
from bame_lightning.methods.pace import Pace


def plan_windows(trainer: L.Trainer, method: Method) -> None:
    """Resolve a method's schedule against the length of the run, or refuse it."""
    if method.schedule is not None:
        method.run.window = _window(trainer, method.schedule, method.never)
    for holder in method.run.holders:
        holder.window = method.run.window


def keep_pace(trainer: L.Trainer, method: Method, holder: Holder) -> None:
    """Resolve the schedule anew for an optimizer that steps at a pace of its own."""
    # Under automatic optimization the Trainer knows how many steps there will be.
    if method.schedule is not None and not trainer.lightning_module.automatic_optimization:
        holder.window = _window_at_pace(trainer, method.schedule, holder.pace) or method.run.window


def clip_writes(trainer: L.Trainer) -> int:
    """How often clipping writes to a gradient: by norm in one operation, by value in two."""
    if not trainer.gradient_clip_val:
        return 0
    return 2 if trainer.gradient_clip_algorithm == "value" else 1


def _window(trainer: L.Trainer, schedule: Schedule, never: str) -> Window:
    """The window of a schedule in optimizer steps; if it is too short, warn of what will `never` happen."""
    if trainer.limit_train_batches == 0:
        return Window(0, 0, schedule.every)  # nothing will be trained, so no window is too short
    window = schedule.window(total_steps(trainer, schedule))
    if not window.adaptations:
        rank_zero_warn(
            f"{never}: its window of {len(window)} optimizer steps is shorter than `schedule.every` = {schedule.every}. The "
            "network trains with a static mask."
        )
    return window


def total_steps(trainer: L.Trainer, schedule: Schedule) -> float | int:
    """Optimizer steps of the run; infinite if unknown, or if the schedule does not need them."""
    if not _asks(schedule):
        return math.inf  # not needed, and counting may need the data
    steps = trainer.estimated_stepping_batches
    batches = trainer.num_training_batches
    for callback in accumulation_schedulers(trainer):
        if trainer.max_epochs != -1 and math.isfinite(batches):
            # Lightning has counted as if accumulation never changed.
            epochs = range(trainer.max_epochs or 1)
            counted = sum(math.ceil(batches / callback.get_accumulate_grad_batches(epoch)) for epoch in epochs)
            steps = counted if trainer.max_steps == -1 else min(counted, trainer.max_steps)
    return math.inf if steps == -1 else steps


def _window_at_pace(trainer: L.Trainer, schedule: Schedule, pace: Pace) -> Window | None:
    """The window of a schedule for an optimizer with its own pace; None if that is one step a batch."""
    if not _asks(schedule) or not pace.known:
        return None
    epochs, batches = trainer.max_epochs, trainer.num_training_batches
    ends = (
        math.inf if epochs in (None, -1) else batches * (epochs or 0),
        math.inf if trainer.max_steps == -1 else trainer.max_steps,
    )
    try:
        return schedule.window(pace.total(ends))
    except ValueError:
        return None  # one bound is in steps, the other a fraction, and so far they cross


def _asks(schedule: Schedule) -> bool:
    return not (isinstance(schedule.start, int) and isinstance(schedule.stop, int))


def progress(trainer: L.Trainer) -> tuple[int, int]:
    """Batches that training has begun, less one, and steps of all optimizers."""
    loop: Any = trainer.fit_loop.epoch_loop
    return loop.total_batch_idx, trainer.global_step
