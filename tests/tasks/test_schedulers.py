import math
from collections.abc import Callable

import pytest
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import LRScheduler

from bame_lightning.tasks.schedulers import constant, cosine


def rates(make: Callable[..., LRScheduler], steps: int, **options: float) -> list[float]:
    optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = make(optimizer, steps, **options)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return [*found, optimizer.param_groups[0]["lr"]]


def test_constant_keeps_the_rate() -> None:
    assert rates(constant, 4) == [2.0] * 5


def test_cosine_ends_at_zero() -> None:
    assert rates(cosine, 4) == pytest.approx([2.0, 1 + math.sqrt(0.5), 1.0, 1 - math.sqrt(0.5), 0.0])


def test_warm_up_rises_to_the_rate_and_then_hands_over() -> None:
    assert rates(constant, 5, warmup_steps=3) == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 2.0])
    assert rates(cosine, 5, warmup_steps=3) == pytest.approx([0.5, 1.0, 1.5, 2.0, 1.0, 0.0])


def test_a_fraction_is_of_the_run() -> None:
    assert rates(cosine, 5, warmup_steps=0.6) == rates(cosine, 5, warmup_steps=3)
    assert rates(constant, 5, warmup_steps=0.05) == [2.0] * 6


@pytest.mark.parametrize("make", [constant, cosine])
@pytest.mark.parametrize("warmup_steps", [-1, 5, 6, -0.1, 1.0, 3.5])
def test_a_warm_up_as_long_as_the_run_is_refused(make: Callable[..., LRScheduler], warmup_steps: float) -> None:
    with pytest.raises(ValueError, match=rf"`warmup_steps` must lie in \[0, 5\) for 5 steps, .*; got {warmup_steps}"):
        rates(make, 5, warmup_steps=warmup_steps)
