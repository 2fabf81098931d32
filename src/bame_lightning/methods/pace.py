"""How the steps of one optimizer and the batches of a run are related, if nobody says how many steps there will be."""

from __future__ import annotations

import math
from collections.abc import Sequence


class Pace:
    """Relate the steps of one optimizer to batches, and to the steps of all optimizers, under manual optimization.

    A module may step an optimizer every few batches, several times in each, or only from some epoch on, and nothing tells so.
    The steps so far tell how many the run will have; this is exact if they come at even distances.

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
        """The first and the last step that were seen, in plain types."""
        return [list(seen) for seen in (self._first, self._last) if seen is not None]

    @classmethod
    def restored(cls, state: Sequence[Sequence[int]]) -> Pace:
        """Restore what `state_dict` returned."""
        pace = cls()
        if state:
            first, last = ((int(seen[0]), int(seen[1]), int(seen[2])) for seen in state)
            pace._first, pace._last = first, last
        return pace
