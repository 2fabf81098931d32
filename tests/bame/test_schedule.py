from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bame_lightning.bame.schedule import Schedule, Window


@pytest.mark.parametrize(
    ("window", "steps"),
    [
        (Window(0, 30, 10), [9, 19, 29]),
        (Window(0, 29, 10), [9, 19]),
        (Window(3, 12, 3), [5, 8, 11]),
        (Window(7, 10, 1), [7, 8, 9]),
        (Window(5, 9, 5), []),
        (Window(4, 4, 1), []),
    ],
)
def test_masks_adapt_after_every_so_many_steps_of_the_window(window: Window, steps: list[int]) -> None:
    assert [step for step in range(50) if window.adapts(step)] == steps
    assert window.adaptations == len(steps)


@given(st.integers(0, 30), st.integers(0, 30), st.integers(1, 12))
def test_counting_steps_one_by_one_gives_the_same_adaptations(start: int, length: int, every: int) -> None:
    window = Window(start, start + length, every)
    since, adapted, inside = 0, [], []
    for step in range(70):
        if step >= start and len(inside) < length:
            inside.append(step)
            since += 1
            if since == every:
                adapted.append(step)
                since = 0
    assert [step for step in range(70) if step in window] == inside
    assert [step for step in range(70) if window.adapts(step)] == adapted
    assert window.adaptations == len(adapted)


@pytest.mark.parametrize(("start", "stop", "steps"), [(0, 900, 900), (7, 10, 3), (4, 4, 0), (5, 3, 0)])
def test_the_length_of_a_window_is_the_steps_inside(start: int, stop: int, steps: int) -> None:
    assert len(Window(start, stop, 2)) == steps == sum(step in Window(start, stop, 2) for step in range(1000))


def test_progress_runs_from_zero_at_the_start_to_one_at_the_end() -> None:
    assert [Window(10, 20, 3).progress(step) for step in (10, 15, 20)] == [0, 0.5, 1]


@pytest.mark.parametrize(
    ("schedule", "total", "window"),
    [
        (Schedule(), 1000, Window(0, 900, 2)),
        (Schedule(0.25, 0.75, 7), 400, Window(100, 300, 7)),
        (Schedule(20, 60), 1000, Window(20, 60, 2)),
        (Schedule(20, 60), math.inf, Window(20, 60, 2)),
        (Schedule(20, 0.5), 1000, Window(20, 500, 2)),
        (Schedule(0.0, 50), 200, Window(0, 50, 2)),
        (Schedule(0, 1), 200, Window(0, 1, 2)),
        (Schedule(0.0, 1.0), 200, Window(0, 200, 2)),
    ],
)
def test_floats_are_fractions_and_ints_are_steps(schedule: Schedule, total: float, window: Window) -> None:
    assert schedule.window(total) == window


def test_a_fraction_is_rounded_to_the_nearest_step() -> None:
    # 0.1 + 0.2 is a little more than 0.3, and 0.29 * 100 a little less than 29.
    assert Schedule(0.29, 0.1 + 0.2).window(100) == Window(29, 30, 2)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"start": 0.9, "stop": 0.1}, r"`schedule.stop` must come after `schedule.start`; got start=0.9, stop=0.1"),
        ({"start": 10, "stop": 10}, r"`schedule.stop`.*got start=10, stop=10"),
        ({"start": 10, "stop": 9}, r"`schedule.stop`.*got start=10, stop=9"),
        ({"start": 1.5, "stop": 2.0}, r"`schedule.start` must be a fraction.*\(an int >= 0\); got 1.5"),
        ({"stop": 1.01}, r"`schedule.stop` must be a fraction.*got 1.01"),
        ({"start": -0.1}, r"`schedule.start`.*got -0.1"),
        ({"start": -1, "stop": 5}, r"`schedule.start`.*got -1"),
        ({"stop": math.nan}, r"`schedule.stop`.*got nan"),
        ({"every": 0}, r"`schedule.every` must be a whole number of optimizer steps, at least 1; got 0"),
        ({"every": -3}, r"`schedule.every`.*got -3"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Schedule(**arguments)


@pytest.mark.parametrize(("start", "stop"), [(600, 0.5), (0.5, 500), (0.5, 100)])
def test_bounds_of_two_kinds_are_compared_when_the_run_is_known(start: float, stop: float) -> None:
    schedule = Schedule(start, stop)
    with pytest.raises(ValueError, match=r"`schedule.stop` must come after.*got start=\d+, stop=\d+"):
        schedule.window(1000)


@pytest.mark.parametrize(("start", "stop", "blamed"), [(0.1, 0.9, "start"), (5, 0.9, "stop")])
def test_a_fraction_of_an_endless_run_is_refused(start: float, stop: float, blamed: str) -> None:
    with pytest.raises(ValueError, match=rf"`schedule.{blamed}` = .*in optimizer steps \(ints\), or set `max_steps`"):
        Schedule(start, stop).window(math.inf)
