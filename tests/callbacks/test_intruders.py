"""Weights that others change in the middle of training are told about, by name."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import lightning as L
import pytest
import torch

from tests.callbacks.registry import MASKED, METHODS, every_method
from tests.training import Spy, Task, blocks_over, trainer


class Validated(Task):
    validated: list[int]

    def on_fit_start(self) -> None:
        self.validated = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated.append(blocks_over(self.model[6].weight, 2, 4))

    def val_dataloader(self) -> Any:
        return self.train_dataloader()


class Swap(L.Callback):
    """An average of one's own: in the model for validation, and after the end."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.average = copy.deepcopy(pl_module.state_dict())

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        for name, value in pl_module.state_dict().items():
            self.average[name].lerp_(value.detach(), 0.2)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.held = copy.deepcopy(pl_module.state_dict())
            pl_module.load_state_dict(self.average)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            pl_module.load_state_dict(self.held)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pl_module.load_state_dict(self.average)


def told(*callbacks: L.Callback, task: Task, **kwargs: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(*callbacks, **kwargs).fit(task)
    return [text for warning in caught if "non-zero weights" in (text := str(warning.message))]


@pytest.mark.parametrize("first", [True, False])
def test_an_average_that_is_swapped_in_for_validation(first: bool) -> None:
    task, method = Validated(), make("bame")
    found = told(*((method, Swap()) if first else (Swap(), method)), task=task, max_epochs=3)
    assert max(task.validated) > 0
    assert any("validation has judged a network that is not sparse" in text and "`model." in text for text in found)
    assert any("the trained network is not sparse" in text for text in found) == first


@every_method
@pytest.mark.parametrize("validated", [True, False])
def test_weights_that_are_reloaded_in_the_middle(name: str, validated: bool) -> None:
    dense = Task().state_dict()

    def reload(run: L.Trainer, module: L.LightningModule) -> None:
        if run.global_step == 11:
            with torch.no_grad():
                module.model[6].weight.data.copy_(dense["model.6.weight"])

    task = Validated() if validated else Task()
    found = told(make(name), Spy(reload), task=task, max_epochs=3, val_check_interval=4 if validated else None)
    assert len(found) == 1
    assert "`model.6` held non-zero weights" in found[0]
    assert blocks_over(task.model[6].weight, 2, 4) == 0


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.RMSprop])
def test_state_of_an_optimizer_that_is_reloaded_in_the_middle_moves_no_pruned_weight(name: str, optimizer: Any) -> None:
    callback, stale = make(name), []

    def look(run: L.Trainer, module: L.LightningModule) -> None:
        (held,) = run.optimizers
        for sparse in callback.weights:
            kept = (sparse.weight, *(v for v in held.state[sparse.weight].values() if v.shape == sparse.weight.shape))
            stale.extend(int(value.detach()[~sparse.oriented(sparse.kept)].count_nonzero()) for value in kept)
        if run.global_step in (3, 19):  # as of a network that was dense
            saved = copy.deepcopy(held.state_dict())
            for state in saved["state"].values():
                for key in state.keys() - {"step"}:
                    state[key].fill_(0.1)
            held.load_state_dict(saved)

    task = Task(
        optimizer=lambda p: optimizer(p, lr=1e-2, **({"momentum": 0.9} if optimizer is torch.optim.RMSprop else {}))
    )
    trainer(callback, Spy(look), max_epochs=3).fit(task)
    assert callback.steps == 24
    assert len(stale) == 24 * 3 * 3
    assert not any(stale)


@pytest.mark.parametrize("what", ["one weight", "sparse weights of an earlier step"])
def test_little_is_found_too(what: str) -> None:
    """Sparse weights of an earlier step have as many zeros, elsewhere."""
    method, earlier = make("bame"), []

    def change(run: L.Trainer, module: L.LightningModule) -> None:
        weight = module.model[6].weight.data
        if run.global_step == 1:
            earlier.append(weight.clone())
        if run.global_step == 21:
            if what == "one weight":
                weight[tuple((weight == 0).nonzero()[3])] = 1e-30
            else:
                weight.copy_(earlier[0])

    (found,) = told(method, Spy(change), task=Task(), max_epochs=3)
    assert found.startswith("`model.6` held non-zero weights")


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize(
    "clip", [{}, {"gradient_clip_val": 0.5}, {"gradient_clip_val": 0.5, "gradient_clip_algorithm": "value"}]
)
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.Adagrad])
def test_noise_that_a_hook_of_the_module_adds_after_masking(name: str, clip: Any, optimizer: Any) -> None:
    class Noisy(Task):
        def on_before_optimizer_step(self, optimizer) -> None:
            for parameter in self.parameters():
                parameter.grad.add_(torch.randn_like(parameter), alpha=1e-2)

    callback, stale = make(name), []

    def look(run, module) -> None:
        (held,) = run.optimizers
        for sparse in callback.weights:
            kept = (sparse.weight, *(v for v in held.state[sparse.weight].values() if v.shape == sparse.weight.shape))
            stale.extend(int(value.detach()[~sparse.oriented(sparse.kept)].count_nonzero()) for value in kept)

    task = Noisy(optimizer=lambda p: optimizer(p, lr=1e-2))
    trainer(callback, Spy(look), **clip).fit(task)
    assert callback.steps == 16
    assert len(stale) >= 16 * 3 * 2
    assert not any(stale)
    assert all(parameter.isfinite().all() for parameter in task.parameters())


@every_method
def test_a_run_that_nobody_disturbs_says_nothing(name: str) -> None:
    assert told(make(name), task=Validated(), max_epochs=2) == []


def make(name: str) -> Any:
    method = METHODS[name]()
    method.verify = False  # it would stop the run
    return method
