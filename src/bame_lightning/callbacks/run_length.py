"""How many steps a run has: as the Trainer tells, and as the steps so far show under manual optimization."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn

from bame_lightning.bame.schedule import Schedule, Window
from bame_lightning.callbacks.packages import accumulation_schedulers


def resolve_window(trainer: L.Trainer, schedule: Schedule, never: str) -> Window:
    """The window of a schedule in optimizer steps; says what will `never` happen where it is too short."""
    if trainer.limit_train_batches == 0:
        return Window(0, 0, schedule.every)  # nothing will be trained, so nothing can be too short
    window = schedule.window(total_steps(trainer, schedule))
    if not window.adaptations:
        rank_zero_warn(
            f"{never}: its window of {len(window)} optimizer steps is shorter than `schedule.every` = {schedule.every}. The "
            "network trains with a static mask."
        )
    return window


def total_steps(trainer: L.Trainer, schedule: Schedule) -> float | int:
    """Optimizer steps of the run, infinite if nobody knows or the schedule does not ask."""
    if not _asks(schedule):
        return math.inf  # nobody asks, and counting may need the data
    steps = trainer.estimated_stepping_batches
    batches = trainer.num_training_batches
    for callback in accumulation_schedulers(trainer):
        if trainer.max_epochs != -1 and math.isfinite(batches):
            # Lightning has counted as if accumulation never changed.
            epochs = range(trainer.max_epochs or 1)
            counted = sum(math.ceil(batches / callback.get_accumulate_grad_batches(epoch)) for epoch in epochs)
            steps = counted if trainer.max_steps == -1 else min(counted, trainer.max_steps)
    return math.inf if steps == -1 else steps


def window_at_pace(trainer: L.Trainer, schedule: Schedule, pace: Pace) -> Window | None:
    """The window of a schedule for an optimizer that steps at a pace of its own; None if it is that of a step a batch."""
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


class Pace:
    """How the steps of one optimizer go with the batches, and with the steps of all optimizers, under manual optimization.

    A module may step an optimizer every few batches, several times in each, or from some epoch on only, and says so
    nowhere. From the steps so far follows how many the run will have: exactly, if they come at even distances.

    Example:
        >>> pace = Pace()
        >>> for step, batch in enumerate([4, 9, 14]):
        ...     pace.follow(step, (batch, batch))
        >>> pace.total((100, math.inf))  # after batches 4, 9, ..., 99
        20
    """

    def __init__(self) -> None:
        self._first: tuple[int, int, int] | None = None
        self._last: tuple[int, int, int] | None = None

    @property
    def known(self) -> bool:
        """Whether steps of two batches were seen."""
        return self._first is not None and self._first != self._last

    def follow(self, step: int, now: tuple[int, int]) -> None:
        """Call before each step.

        Args:
            step: Steps of this optimizer before.
            now: Batches, and steps of all optimizers before.
        """
        here = (step, *now)
        self._first = self._first or here
        if self._last is None or now[0] > self._last[1]:
            self._last = here  # the first step of a batch, so that all of a batch's steps count

    def total(self, ends: tuple[float | int, float | int]) -> float | int:
        """Steps of this optimizer in the whole run.

        Args:
            ends: Batches of the run, and steps of all optimizers after which it ends; infinite if there is no such end.
        """
        assert self._first is not None
        assert self._last is not None
        (first, *started), (last, *reached) = self._first, self._last
        totals = []
        for end, start, now in zip(ends, started, reached, strict=True):
            if math.isfinite(end):
                # Rounded down: what is left after the last whole distance brings no step.
                totals.append(first + 1 + int((last - first) * max(0, end - 1 - start) / max(1, now - start) + 1e-9))
        return min(totals, default=math.inf)

    def state_dict(self) -> list[list[int]]:
        """First and last step that were seen, in plain types."""
        return [list(seen) for seen in (self._first, self._last) if seen is not None]

    @classmethod
    def restored(cls, state: Sequence[Sequence[int]]) -> Pace:
        """What `state_dict` returned."""
        pace = cls()
        if state:
            first, last = ((int(seen[0]), int(seen[1]), int(seen[2])) for seen in state)
            pace._first, pace._last = first, last
        return pace


def progress(trainer: L.Trainer) -> tuple[int, int]:
    """Batches that training has begun, less one, and steps of all optimizers."""
    loop: Any = trainer.fit_loop.epoch_loop
    return loop.total_batch_idx, trainer.global_step
