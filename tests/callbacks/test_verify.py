"""`verify=True` notices one fault of each kind and names it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch

from bame_lightning import BAMECallback, Evidence, Schedule
from bame_lightning.weights.invariants import InvariantError
from tests.training import Task, trainer


class Saboteur(L.Callback):
    """Do harm once, at the fifth step, in the hook named."""

    def __init__(self, hook: str, harm: Callable[[BAMECallback, L.Trainer], None], victim: BAMECallback) -> None:
        self.harm, self.victim, self.done = harm, victim, 0
        setattr(self, hook, self._strike)

    def _strike(self, trainer: L.Trainer, *_: Any) -> None:
        self.done += 1
        if self.done == 5:
            with torch.no_grad():
                self.harm(self.victim, trainer)


def first_pruned(victim: BAMECallback) -> tuple[int, ...]:
    return tuple(victim.weights[2].pruned.nonzero()[0].tolist())


def tamper_weight(victim: BAMECallback, trainer: L.Trainer) -> None:
    victim.weights[2].weight[first_pruned(victim)] = 1e-30


def tamper_gradient(victim: BAMECallback, trainer: L.Trainer) -> None:
    victim.weights[2].weight.grad[first_pruned(victim)] = 1e-30


def tamper_moment(victim: BAMECallback, trainer: L.Trainer) -> None:
    trainer.optimizers[0].state[victim.weights[2].weight]["exp_avg_sq"][first_pruned(victim)] = 1e-30


def swap_in_mask(victim: BAMECallback, trainer: L.Trainer) -> None:
    # Still two of four, and a weight of zero where it was revived: only the mask itself is wrong.
    sparse = victim.weights[2]
    row, column = first_pruned(victim)
    block = slice(column // 4 * 4, column // 4 * 4 + 4)
    kept = int(sparse.kept[row, block].nonzero()[0]) + block.start
    sparse.kept[row, column], sparse.kept[row, kept] = True, False
    sparse.weight[row, kept] = 0
    for value in trainer.optimizers[0].state[sparse.weight].values():
        if value.shape == sparse.weight.shape:
            value[row, kept] = 0


def crowd(victim: BAMECallback, trainer: L.Trainer) -> None:
    # One of four inputs in every row, all of them the first one.
    for sparse in victim.weights[2:3]:
        sparse.kept.zero_()[:, ::4] = True
        victim.method._expected[sparse.name] = sparse.kept.clone()
        victim.method.enforce([sparse])


def drift(victim: BAMECallback, trainer: L.Trainer) -> None:
    victim.weights[2].kept[first_pruned(victim)] = True


FAULTS = {
    "Weight": tamper_weight,
    "Gradient": tamper_gradient,
    "Optimizer state 'exp_avg_sq'": tamper_moment,
    "Mask": swap_in_mask,
    "Count": drift,
}


def test_a_column_that_holds_too_many_is_noticed_where_masks_hold_both_ways() -> None:
    victim = BAMECallback("1:4", schedule=Schedule(stop=2), both_ways=True, verify=True)
    saboteur = Saboteur("on_train_batch_end", crowd, victim)
    message = (
        r"^Both ways: after step 5, `model\.6\.weight` \(1:4\) keeps 4 weights in column 0 of the four rows from 0 on"
    )
    with pytest.raises(InvariantError, match=message):
        trainer(victim, saboteur).fit(Task())


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_noticed_and_named(name: str, order: str) -> None:
    victim = BAMECallback("2:4", schedule=Schedule(every=4), evidence=Evidence(read_every=2), verify=True)
    hook = "on_before_optimizer_step" if name == "Gradient" else "on_train_batch_end"
    saboteur = Saboteur(hook, FAULTS[name], victim)
    # A gradient that changes before the mask is put on it is no fault.
    callbacks = [saboteur, victim] if order == "before" and name != "Gradient" else [victim, saboteur]
    task = Task(optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2))
    with pytest.raises(InvariantError, match=rf"^{name}: after step \d+, .*`model\.6\.weight`"):
        trainer(*callbacks).fit(task)
    assert saboteur.done in (5, 6)


def test_without_faults_nothing_is_raised_and_nothing_changes() -> None:
    runs = []
    for verify in (True, False):
        task = Task(optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2))
        callback = BAMECallback("2:4", schedule=Schedule(every=2), evidence=Evidence(read_every=2), verify=verify)
        trainer(callback).fit(task)
        assert callback.summary()["flips"] > 0
        runs.append(task.model[6].weight.detach())
    assert torch.equal(*runs)
