"""Optimizers whose steps are hard to see: without torch's hooks, patched, wrapped, in two halves."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from bame_lightning import BAMECallback, Evidence, Schedule, StaticMask
from tests.callbacks.scenarios import Manual
from tests.training import Spy, Task, blocks_over, trainer

Parameters = Iterable[nn.Parameter]


class Noisy(SGD):
    """Moves all weights at random, pruned ones too: a step that nobody sees leaves no block sparse."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            for weight in group["params"]:
                weight.add_(torch.randn_like(weight), alpha=1e-3)
        return loss


class Around(Optimizer):
    """Wraps an optimizer and never calls `Optimizer.__init__`, as those of privacy and of timm's Lookahead."""

    def __init__(self, inner: Optimizer) -> None:
        self.inner, self.defaults = inner, inner.defaults
        self.param_groups, self.state = inner.param_groups, inner.state

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)


class Hybrid(Optimizer):
    """Two optimizers as one, with properties instead of attributes."""

    state = property(lambda self: {key: value for inner in self.inner for key, value in inner.state.items()})
    param_groups = property(lambda self: [group for inner in self.inner for group in inner.param_groups])

    def __init__(self, *inner: Optimizer) -> None:
        self.inner, self.defaults = inner, {}

    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure()
        for inner in self.inner:
            inner.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        for inner in self.inner:
            inner.zero_grad(set_to_none)


def hybrid(parameters: Parameters) -> Hybrid:
    first, *rest = parameters
    return Hybrid(AdamW([first, *rest[1::2]], lr=1e-2), Noisy(rest[0::2], lr=1e-2))


def patched(parameters: Parameters) -> Optimizer:
    optimizer = Noisy(parameters, lr=1e-2)
    inner = optimizer.step
    optimizer.step = lambda closure=None: inner(closure)
    return optimizer


def scheduled(parameters: Parameters) -> Optimizer:
    optimizer = Noisy(parameters, lr=1e-2)
    torch.optim.lr_scheduler.StepLR(optimizer, 100)  # patches `step`
    return optimizer


OPTIMIZERS: dict[str, Callable[[Parameters], Any]] = {
    "wrapped": lambda parameters: Around(Noisy(parameters, lr=1e-2)),
    "wrapped twice": lambda parameters: Around(Around(Noisy(parameters, lr=1e-2))),
    "hybrid": hybrid,
    "patched": patched,
    "scheduled": scheduled,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("manual", [False, True])
def test_every_step_is_counted_once_and_enforced(name: str, manual: bool) -> None:
    if manual and name == "hybrid":
        pytest.skip("it needs a closure")
    evidence = Evidence(read_every=2, contenders=0.5, step_size=4.0)
    callback = BAMECallback("2:4", schedule=Schedule(every=2), evidence=evidence, verify=True)
    seen = []

    def look(*_: Any) -> None:
        seen.append((callback.steps, sum(blocks_over(sparse.weight, 2, 4) for sparse in callback.weights)))

    task = (Manual if manual else Task)(optimizer=OPTIMIZERS[name])
    trainer(callback, Spy(look)).fit(task)
    assert seen == [(step, 0) for step in range(1, 17)]
    assert sum(int(weight.flips) for weight in callback.evolving) > 0


@pytest.mark.parametrize("name", ["wrapped", "patched"])
def test_an_optimizer_is_left_as_it_was_found(name: str) -> None:
    made: list[tuple[Any, Any]] = []

    def make(parameters: Parameters) -> Any:
        optimizer = OPTIMIZERS[name](parameters)
        made.append((optimizer, vars(optimizer).get("step")))
        return optimizer

    trainer(StaticMask("2:4"), max_epochs=1).fit(Task(optimizer=make))
    ((optimizer, step),) = made
    assert vars(optimizer).get("step") is step


class Halves(SGD):
    """Sharpness-aware in two calls; the second one steps an optimizer inside."""

    def __init__(self, parameters: Parameters) -> None:
        super().__init__(parameters, lr=0.05)
        self.base_optimizer = SGD(self.param_groups, lr=0.05, momentum=0.9)
        self.up: dict[nn.Parameter, Any] = {}

    @torch.no_grad()
    def first_step(self) -> None:
        for weight in self.param_groups[0]["params"]:
            self.up[weight] = 0.05 * weight.grad.sign()
            weight.add_(self.up[weight])
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for weight, up in self.up.items():
            weight.sub_(up)
        self.base_optimizer.step()
        self.zero_grad()


class Sharp(Manual):
    def update(self, optimizer: Any, batch: Any, batch_idx: int) -> None:
        self.manual_backward(self.loss(batch))
        optimizer.optimizer.first_step()
        self.manual_backward(self.loss(batch))
        optimizer.optimizer.second_step()


@pytest.mark.filterwarnings("ignore:Optimizer Halves is unknown")
def test_a_step_in_two_halves_counts_once() -> None:
    callback = BAMECallback("2:4", schedule=Schedule(every=2), verify=True)
    over: list[int] = []
    look = Spy(lambda *_: over.append(sum(blocks_over(sparse.weight, 2, 4) for sparse in callback.weights)))
    trainer(callback, look).fit(Sharp(optimizer=Halves))
    assert callback.steps == 16
    assert over == [0] * 16
    assert sum(int(weight.flips) for weight in callback.evolving) > 0


class EverySecond(Around):
    """Gathers the gradients of two batches before the optimizer inside steps."""

    calls = 0

    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure()
        self.calls += 1
        if self.calls % 2 == 0:
            self.inner.step()
        return loss


def test_a_wrapper_that_gathers_gradients_counts_the_steps_inside() -> None:
    callback = StaticMask("2:4", verify=True)
    trainer(callback).fit(Task(optimizer=lambda parameters: EverySecond(Noisy(parameters, lr=1e-2))))
    assert callback.steps == 8


def test_an_optimizer_that_gets_another_class_in_the_middle_is_refused() -> None:
    class Reclassed(Task):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if self.trainer.global_step == 3:
                self.trainer.optimizers[0].__class__ = Noisy

    task = Reclassed(optimizer=lambda parameters: SGD(parameters, lr=0.1))
    with pytest.raises(ValueError, match=r"`optimizer` was a SGD when training began and is a Noisy now"):
        trainer(StaticMask("2:4")).fit(task)


class Closed(Around):
    """Neither hooks nor a `step` that can be wrapped."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "step":
            raise AttributeError("it is closed")
        super().__setattr__(name, value)


def test_an_optimizer_whose_steps_cannot_be_seen_is_refused_when_training_starts() -> None:
    task = Task(optimizer=lambda parameters: Closed(SGD(parameters, lr=0.1)))
    with pytest.raises(ValueError, match=r"returns Closed, whose steps cannot be seen.*it is closed"):
        trainer(StaticMask("2:4")).fit(task)
