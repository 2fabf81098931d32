"""Strategies that train in child processes: what the callback that stayed behind knows afterwards."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch

from bame_lightning import BAMECallback, Dense, Evidence, Schedule
from bame_lightning.callbacks.home import Home
from tests.callbacks.test_base import assert_same
from tests.training import Task, trainer

CHILD = SimpleNamespace(launcher=SimpleNamespace(_start_method="spawn"))
HERE = SimpleNamespace(launcher=None)


def travel(home: Home) -> Home:
    """As a process that is started gets it."""
    away = pickle.loads(pickle.dumps(home))
    away.leave(CHILD)
    return away


def test_what_the_first_child_tells_is_taken_up_once() -> None:
    home = Home()
    first, second = travel(home), travel(home)
    assert home.fetch() is None
    second.send({"steps": 2}, first=False)
    assert home.fetch() is None
    first.send({"steps": 1}, first=True)
    assert first.fetch() is None
    assert second.fetch() is None
    assert home.fetch() == {"steps": 1}
    assert home.fetch() is None


def test_nothing_is_told_where_fit_runs_here_and_copies_have_homes_of_their_own() -> None:
    home = Home()
    home.leave(HERE)
    home.send({"steps": 1}, first=True)
    assert home.fetch() is None
    travel(home).send({"steps": 1}, first=True)
    assert copy.deepcopy(home).fetch() is None
    assert home.fetch() == {"steps": 1}


class Scale(L.Callback):
    """How much the first step multiplies weights by, written where another process can read it."""

    def __init__(self, path: Any) -> None:
        self.path = path

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.before = pl_module.model[6].weight.detach().clone()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == 1:
            after = pl_module.model[6].weight.detach()
            both = (self.before != 0) & (after != 0)
            torch.save((after[both] / self.before[both]).median(), self.path)


def test_fits_in_forked_processes_end_as_fits_here(tmp_path: Any) -> None:
    ends = []
    for strategy in ("auto", "ddp_fork"):
        callback = BAMECallback("2:4", schedule=Schedule(every=2), evidence=Evidence(read_every=2))
        task = Task(optimizer=lambda p: torch.optim.SGD(p, lr=1e-3))
        trainer(callback, strategy=strategy, use_distributed_sampler=False).fit(task)
        assert callback.steps == 16
        state = copy.deepcopy(callback.state_dict())
        assert len(state["layers"]) == 3
        summary = callback.summary()
        more = {"strategy": strategy, "use_distributed_sampler": False, "max_epochs": 1}
        again = trainer(callback, Scale(tmp_path / "scale.pt"), **more)
        again.fit(task)
        assert float(torch.load(tmp_path / "scale.pt")) == pytest.approx(1, abs=0.02)
        assert callback.steps == 8
        again.save_checkpoint(tmp_path / "end.ckpt")
        saved = torch.load(tmp_path / "end.ckpt", weights_only=True)["callbacks"]["BAMECallback"]["layers"]
        after = {"state": callback.state_dict(), "saved": saved, "weights": dict(task.named_parameters())}
        ends.append({"first": state, "summary": summary} | after)
    assert_same(*ends)


def test_dense_training_in_forked_processes_brings_its_books_home() -> None:
    ends = []
    for strategy in ("auto", "ddp_fork"):
        callback = Dense("2:4")
        trainer(callback, strategy=strategy, use_distributed_sampler=False).fit(Task())
        assert callback.steps == 16
        ends.append((callback.summary(), callback.state_dict()))
    assert ends[0] == ends[1]
    assert ends[0][0]["flops"]["flops/train_vs_dense"] == 1
