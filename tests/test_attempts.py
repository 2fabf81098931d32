"""The attempts of the study train, stay sparse, and differ from the default: a change that changes nothing was not tried."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from benchmarks.accuracy import attempts
from benchmarks.accuracy.study import ATTEMPTS

from bame_lightning import BAMECallback, Evidence, Schedule
from tests.training import Task, trainer


def train(rule: type[Evidence]) -> torch.Tensor:
    torch.manual_seed(0)
    task = Task(optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))
    # Larger steps, since the run is short, without a margin, so that blocks oscillate.
    evidence = rule(read_every=5, contenders=0.2, step_size=3.0, margin=0.0)
    callback = BAMECallback("1:4", evidence=evidence, schedule=Schedule(every=3), verify=True)
    trainer(callback, max_epochs=8).fit(task)
    assert callback.summary()["flips"] > 0
    return torch.cat([parameter.detach().flatten() for parameter in task.parameters()])


@pytest.fixture(scope="module", autouse=True)
def in_pieces() -> Iterator[None]:
    """As large layers are worked on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bame_lightning.blocks.masks.CHUNK", 64)
        yield


@pytest.fixture(scope="module")
def default() -> torch.Tensor:
    return train(Evidence)


@pytest.mark.parametrize("name", ATTEMPTS.values())
def test_an_attempt_trains_and_is_not_the_default(name: str, default: torch.Tensor) -> None:
    assert not torch.equal(train(getattr(attempts, name)), default)


def test_the_default_is_reproducible(default: torch.Tensor) -> None:
    torch.testing.assert_close(train(Evidence), default, rtol=0, atol=0)
