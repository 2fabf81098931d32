"""Interrupted and continued, a run ends bit by bit where it would have ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from tests.callbacks.registry import METHODS, MOVING
from tests.callbacks.test_base import assert_same
from tests.training import Task, blocks_over, trainer

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
EPOCHS = 5


class Learner(Task):
    """Has state wherever a run can have it: moments, a learning rate that changes, running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.model.insert(7, nn.BatchNorm1d(16))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class StatefulLoader:
    """Batches in an order of its own in every epoch, which it can go on with."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches, self.epoch, self.position = batches, 0, 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        if self.position == len(self.batches):  # Lightning counts, and does not ask for one batch too many
            self.epoch, self.position = self.epoch + 1, 0
        while self.position < len(self.batches):
            self.position += 1
            yield self.batches[(3 * self.position + self.epoch) % len(self.batches)]

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]


class Stateful(Learner):
    def train_dataloader(self) -> Any:
        return StatefulLoader(list(super().train_dataloader()))


class InterruptedRunError(Exception):
    """The run was cut on purpose."""


class Cut(L.Callback):
    """End the run in the middle of a batch, by an exception or by a signal that leaves no time for anything."""

    def __init__(self, batch: int | None, kill: bool = False) -> None:
        self.batch, self.kill, self.batches = batch, kill, 0

    def on_before_backward(self, *_: Any) -> None:
        self.batches += 1
        if self.batch is not None and self.batches > self.batch:
            if self.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise InterruptedRunError


class Masks(L.Callback):
    """Masks after every optimizer step."""

    def __init__(self, method: Any) -> None:
        self.method, self.at = method, {}

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.at[trainer.global_step] = torch.cat([sparse.kept.flatten() for sparse in self.method.weights])


def train(
    name: str,
    folder: Path,
    accumulate: int = 1,
    *,
    every: int | None = None,
    cut: int | None = None,
    kill: bool = False,
    resume: bool = False,
) -> tuple[dict[str, Any], dict[int, Tensor]]:
    """Train, or go on from `last.ckpt`; returns the checkpoint of the end, and masks by optimizer step.

    Args:
        name: The method.
        folder: Where checkpoints go.
        accumulate: Batches of an optimizer step.
        every: Steps between checkpoints in the middle of epochs, with a loader that can go on there; None: after each epoch.
        cut: Batches after which the run is cut.
        kill: Cut by SIGKILL.
        resume: Go on from the last checkpoint.
    """
    method, task = METHODS[name](), Stateful() if every else Learner()
    masks = Masks(method)
    when = {"every_n_train_steps": every} if every else {"every_n_epochs": 1}
    save = ModelCheckpoint(folder, save_last=True, **when)
    fit = trainer(
        method,
        masks,
        Cut(cut, kill),
        save,
        max_epochs=EPOCHS,
        accumulate_grad_batches=accumulate,
        enable_checkpointing=True,
    )
    fit.fit(task, ckpt_path=folder / "last.ckpt" if resume else None)
    fit.save_checkpoint(folder / "end.ckpt")
    return torch.load(folder / "end.ckpt", weights_only=True), masks.at


@cache
def whole(name: str, accumulate: int, every: int | None = None) -> tuple[dict[str, Any], dict[int, Tensor]]:
    with TemporaryDirectory() as folder:
        return train(name, Path(folder), accumulate, every=every)


def assert_continued(name: str, folder: Path, accumulate: int, every: int | None = None) -> None:
    """What lies in the folder goes on to the end of the uninterrupted run, and masks move before and after the cut."""
    saved = torch.load(folder / "last.ckpt", weights_only=True)
    expected, masks = whole(name, accumulate, every)
    end, later = train(name, folder, accumulate, every=every, resume=True)
    method = next(key for key in expected["callbacks"] if not key.startswith("ModelCheckpoint"))
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch"):
        assert_same(as_dict(end[part]), as_dict(expected[part]))
    assert_same(as_dict(end["callbacks"][method]), as_dict(expected["callbacks"][method]))
    step = saved["global_step"]
    assert 0 < step < expected["global_step"]
    assert min(later) > step - 1
    assert all(torch.equal(later[at], masks[at]) for at in later)
    if name in MOVING:
        assert not torch.equal(masks[step], masks[min(masks)])
        assert not torch.equal(masks[step], masks[max(masks)])
    plain = Learner()
    plain.load_state_dict(saved["state_dict"])
    assert [blocks_over(plain.model[i].weight, 2, 4) for i in (2, 4, 6)] == [0, 0, 0]
    assert plain.model(torch.ones(1, 3, 4, 4).expand(2, -1, -1, -1)).isfinite().all()


def as_dict(state: Any) -> Any:
    """Lists as dictionaries, so that tensors inside are compared one by one."""
    if isinstance(state, dict):
        return {key: as_dict(value) for key, value in state.items()}
    return {i: as_dict(value) for i, value in enumerate(state)} if isinstance(state, list | tuple) else state


def slow_unless(fast: bool, *values: Any) -> Any:
    return pytest.param(*values, marks=[] if fast else [pytest.mark.slow])


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    ("accumulate", "epoch"), [slow_unless((a + e) % 2 == 1, a, e) for a in (1, 2) for e in (1, 2, 3)]
)
def test_after_any_epoch(name: str, accumulate: int, epoch: int, tmp_path: Path) -> None:
    with pytest.raises(InterruptedRunError):
        train(name, tmp_path, accumulate, cut=8 * epoch + 3)
    assert_continued(name, tmp_path, accumulate)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("accumulate", "every", "cut"), [(1, 5, 13), (2, 3, 21)])
def test_in_the_middle_of_an_epoch(name: str, accumulate: int, every: int, cut: int, tmp_path: Path) -> None:
    with pytest.raises(InterruptedRunError):
        train(name, tmp_path, accumulate, every=every, cut=cut)
    batches = torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] * accumulate
    assert batches % 8
    assert_continued(name, tmp_path, accumulate, every)


@pytest.mark.parametrize("name", [slow_unless(name == "bame", name) for name in METHODS])
def test_after_a_kill(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-m", __name__, name, str(tmp_path)]
    done = subprocess.run(command, timeout=240, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert not (tmp_path / "end.ckpt").exists()
    assert_continued(name, tmp_path, 2, 3)


def test_runs_that_differ_are_told_apart(tmp_path: Path) -> None:
    one, two = whole("bame", 1)[0], whole("bame", 2)[0]
    for part in ("state_dict", "optimizer_states"):
        with pytest.raises(AssertionError):
            assert_same(as_dict(one[part]), as_dict(two[part]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(sys.argv[1], Path(sys.argv[2]), 2, every=3, cut=21, kill=True)
