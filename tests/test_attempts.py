"""The attempts of the study train, stay sparse, and differ from the default: a change that changes nothing was not tried."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from benchmarks.accuracy import attempts
from benchmarks.accuracy.study import ATTEMPTS

from bame_lightning import BAMECallback, Evidence, Schedule
from tests.training import Task, trainer


def train(kind: type[BAMECallback]) -> torch.Tensor:
    torch.manual_seed(0)
    task = Task(optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))
    # Larger steps, since the run is short, without a margin, so that blocks oscillate.
    evidence = Evidence(share=0.5, step_size=3.0, margin=0.0)
    callback = kind("1:4", evidence=evidence, schedule=Schedule(every=3), verify=True)
    trainer(callback, max_epochs=8).fit(task)
    assert callback.summary()["flips"] > 0
    return torch.cat([parameter.detach().flatten() for parameter in task.parameters()])


@pytest.fixture(scope="module", autouse=True)
def in_pieces() -> Iterator[None]:
    """As large layers are worked on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bame_lightning.masks.CHUNK", 64)
        yield


@pytest.fixture(scope="module")
def default() -> torch.Tensor:
    return train(BAMECallback)


@pytest.mark.parametrize("name", ATTEMPTS.values())
def test_an_attempt_trains_and_is_not_the_default(name: str, default: torch.Tensor) -> None:
    assert not torch.equal(train(getattr(attempts, name)), default)


def test_the_default_is_reproducible(default: torch.Tensor) -> None:
    torch.testing.assert_close(train(BAMECallback), default, rtol=0, atol=0)


def test_one_swap_a_block_and_clipped_evidence() -> None:
    class Watching(attempts.OneSwapABlock):
        most = 0

        def evolve(self, optimizer: torch.optim.Optimizer) -> bool:
            before = [sparse.mask().clone() for sparse in self.weights]
            evolved = super().evolve(optimizer)
            swaps = [(old & ~now.mask()).sum(-1).amax() for old, now in zip(before, self.weights, strict=True)]
            self.most = max(self.most, *map(int, swaps))
            return evolved

    def fit(callback: BAMECallback, **kwargs: float) -> torch.Tensor:
        torch.manual_seed(0)
        task = Task(optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))
        trainer(callback, max_epochs=4, **kwargs).fit(task)
        return torch.cat([parameter.detach().flatten() for parameter in task.parameters()])

    settings = {"evidence": Evidence(step_size=3.0, margin=0.0), "schedule": Schedule(every=3)}
    one = Watching("2:4", **settings)
    assert not torch.equal(fit(one), fit(BAMECallback("2:4", **settings)))
    assert one.most == 1

    clipped = [kind("2:4", **settings) for kind in (attempts.ClippedEvidence, BAMECallback)]
    assert not torch.equal(*(fit(callback, gradient_clip_val=0.01) for callback in clipped))
