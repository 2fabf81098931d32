"""When the masks may change: pure functions of the optimizer step."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """When to adapt the masks, as a user writes it.

    Args:
        start: First step of mask evolution, the paper's t_i: a fraction of the run (float in [0, 1]) or optimizer
            steps (int).
        stop: End of mask evolution, the paper's t_f, exclusive: a fraction (float) or optimizer steps (int).
        every: Optimizer steps between two adaptations, the paper's T.

    Raises:
        ValueError: If a bound is negative, a fraction exceeds 1, `stop` does not come after `start`, or `every` < 1.
    """

    start: int | float = 0.0  # in this order: parsers of configs try int first, so that steps stay steps
    stop: int | float = 0.9
    every: int = 2

    def __post_init__(self) -> None:
        for name, bound in (("start", self.start), ("stop", self.stop)):
            number = isinstance(bound, int | float) and not isinstance(bound, bool)
            if not number or not bound >= 0 or (isinstance(bound, float) and not bound <= 1):
                raise ValueError(
                    f"`schedule.{name}` must be a fraction of the run in [0.0, 1.0] (a float) or a number of optimizer "
                    f"steps (an int >= 0); got {bound!r}."
                )
        if isinstance(self.start, float) == isinstance(self.stop, float):
            _check_order(self.start, self.stop)
        if not isinstance(self.every, int) or self.every < 1:
            raise ValueError(
                f"`schedule.every` must be a whole number of optimizer steps, at least 1; got {self.every!r}."
            )

    def window(self, total_steps: float | int) -> Window:
        """Resolve fractions against the length of a run.

        Args:
            total_steps: Optimizer steps of the run; infinite if unknown.

        Returns:
            The window in optimizer steps.

        Raises:
            ValueError: If a bound is a fraction of an endless run, or `stop` does not come after `start`.
        """
        start, stop = (self._resolve(name, total_steps) for name in ("start", "stop"))
        if isinstance(self.start, float) != isinstance(self.stop, float):
            _check_order(start, stop)
        return Window(start, stop, self.every)

    def _resolve(self, name: str, total_steps: float | int) -> int:
        bound: float | int = getattr(self, name)
        if isinstance(bound, int):
            return bound
        if not math.isfinite(total_steps):
            raise ValueError(
                f"`schedule.{name}` = {bound} is a fraction of the run, but the Trainer cannot tell how many optimizer "
                "steps the run has. Give `start` and `stop` in optimizer steps (ints), or set `max_steps` or "
                "`limit_train_batches`."
            )
        return round(bound * total_steps)


def _check_order(start: float | int, stop: float | int) -> None:
    if not start < stop:
        raise ValueError(f"`schedule.stop` must come after `schedule.start`; got start={start!r}, stop={stop!r}.")


@dataclass(frozen=True)
class Window:
    """The window of mask evolution in optimizer steps; steps count from 0.

    Args:
        start: First step inside.
        stop: First step after it.
        every: Steps between two adaptations.
    """

    start: int
    stop: int
    every: int

    def __len__(self) -> int:
        return max(0, self.stop - self.start)

    def __contains__(self, step: int) -> bool:
        return self.start <= step < self.stop

    def adapts(self, step: int) -> bool:
        """Whether the masks adapt after this step: after every `every`-th step of the window, so that evidence comes first.

        Example:
            >>> [step for step in range(40) if Window(5, 30, every=10).adapts(step)]
            [14, 24]
        """
        return step in self and (step - self.start + 1) % self.every == 0

    def progress(self, step: int) -> float:
        """How far through the window `step` is, from 0 at its first step to 1 at its end."""
        return (step - self.start) / (self.stop - self.start)

    def annealed(self, share: float, step: int) -> float:
        r"""Anneal a share along a cosine, $\frac{\rho}{2} (1 + \cos(\pi\,\text{progress}))$: from `share` to 0 at the end."""
        return share / 2 * (1 + math.cos(math.pi * self.progress(step)))

    @property
    def adaptations(self) -> int:
        """Adaptations in the whole window."""
        return max(0, (self.stop - self.start) // self.every)
