"""One battery of scenarios through which every method runs."""

from __future__ import annotations

import pytest
import torch

from tests.callbacks.registry import MASKED, METHODS
from tests.callbacks.scenarios import SCENARIOS
from tests.callbacks.watch import Watch
from tests.training import trainer

CASES = [
    pytest.param(
        name,
        scenario,
        id=f"{name}-{scenario}",
        marks=[pytest.mark.filterwarnings(f"ignore:{message}") for message in how.warns],
    )
    for scenario, how in SCENARIOS.items()
    for name in METHODS
    if name in MASKED or not how.several_evaluations
]


@pytest.mark.parametrize(("name", "scenario"), CASES)
def test_every_step_keeps_the_promises(name: str, scenario: str) -> None:
    torch.manual_seed(0)
    how, callback = SCENARIOS[scenario], METHODS[name]()
    watch = Watch(callback, how.sparse, masked=name in MASKED)
    fit = trainer(*how.callbacks(), callback, watch, **how.trainer())
    fit.fit(how.task())
    assert callback.steps == watch.steps
    if how.steps is None:
        batches = fit.fit_loop.epoch_loop.total_batch_idx + 1
        assert 0 < watch.steps < batches // fit.accumulate_grad_batches
    else:
        assert watch.steps == how.steps
    assert (watch.moves > 0) == (name != "static")
    if how.clip:
        # Had clipping seen more than the sparse gradient, what is left of it would be smaller.
        reached = watch.norms if how.clip == "norm" else watch.largest
        assert max(reached) == pytest.approx(0.05, rel=2e-3)
        assert sum(value == pytest.approx(0.05, rel=2e-3) for value in reached) > watch.steps / 2
