"""A run that is interrupted and gone on with from the command line ends where it would have ended."""

import csv
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli.processes import TINY, stopping, train

NOISY = """
import torch
from torch import nn
from bame_lightning.tasks.data import Digits
from bame_lightning.tasks.augmentation import crop_and_flip

def net(input_shape, num_classes):
    sizes = input_shape[1] * input_shape[2]
    return nn.Sequential(nn.Flatten(), nn.Linear(sizes, 32), nn.Dropout(0.3), nn.ReLU(), nn.Linear(32, num_classes))

class Moving(Digits):
    def __init__(self, batch_size, val_size, num_workers):
        super().__init__(batch_size, val_size, num_workers)
        self._augmentation = crop_and_flip
"""
PARTS = ("model._target_=noisy.net", "data._target_=noisy.Moving")


def assert_same(one: Any, other: Any, where: str = "") -> None:
    """Compare nested values bit for bit, but for the time and what callbacks say of files."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for index, (first, second) in enumerate(zip(one, other, strict=True)):
            assert_same(first, second, f"{where}[{index}]")
    else:
        assert one == other, where


def assert_same_network(one: Path, other: Path) -> None:
    first, second = (torch.load(folder / "checkpoints/last.ckpt", weights_only=True) for folder in (one, other))
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch"):
        assert_same(first[part], second[part], part)
    state = next(key for key in first["callbacks"] if key.startswith("BAME"))
    assert_same(first["callbacks"][state], second["callbacks"][state], state)


@pytest.mark.parametrize("workers", [0, 2])
def test_three_epochs_and_three_more_are_six(workers: int, tmp_path: Path) -> None:
    """With samples shuffled, shifted and mirrored at random, and dropout; the first leg ends in the middle of an epoch."""
    (tmp_path / "noisy.py").write_text(NOISY)
    same = (
        *TINY[1:],
        *PARTS,
        f"data.num_workers={workers}",
        "method.schedule.every=1",
        "trainer.max_epochs=6",
        "pattern=1:4",
        "quiet=true",
        "data.val_size=0",
    )
    assert train(tmp_path, *same, "hydra.run.dir=whole").status == 0
    stopped = train(tmp_path, *same, "hydra.run.dir=run", *stopping(tmp_path, signal.SIGTERM, epoch=3))
    assert stopped.status == 143
    assert torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["epoch"] == 2
    again = train(tmp_path, *same, "hydra.run.dir=run", "ckpt_path=run/checkpoints/last.ckpt")
    assert (again.status, again.err) == (0, "")
    assert_same_network(tmp_path / "whole", tmp_path / "run")
    whole, run = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "run"))
    for key in ("test_accuracy", "test_loss", "sparse", "steps"):
        assert whole[key] == run[key], key


def test_epochs_differ_in_their_order_and_seeds_too(tmp_path: Path) -> None:
    (tmp_path / "seen.py").write_text(
        "from lightning import Callback\n\nclass Seen(Callback):\n"
        "    def on_train_batch_start(self, trainer, module, batch, batch_idx):\n"
        "        if batch_idx == 0:\n            print('labels', batch[1][:20].tolist())\n"
    )
    orders = []
    for seed in (0, 1):
        seen = (
            "method=static",
            f"seed={seed}",
            "trainer.max_epochs=3",
            "+callbacks.seen._target_=seen.Seen",
            "quiet=true",
        )
        done = train(tmp_path, *TINY, *seen, f"hydra.run.dir={seed}")
        orders += [line for line in done.out.splitlines() if line.startswith("labels")]
    assert len(orders) == len(set(orders)) == 6


@pytest.mark.slow
def test_two_processes_go_on_where_they_were_interrupted(tmp_path: Path) -> None:
    (tmp_path / "noisy.py").write_text(NOISY)
    two = (
        "trainer.devices=2",
        "+trainer.strategy=ddp",
        "data.num_workers=1",
        "scheduler=constant",
        "method.schedule.stop=24",
    )

    def command(*words: str) -> None:
        program = Path(sys.executable).with_name("bame-train")
        call = [program, *TINY[1:], *PARTS, *two, "pattern=1:4", "quiet=true", *words]
        subprocess.run(call, cwd=tmp_path, check=True, timeout=300, capture_output=True)

    command("trainer.max_epochs=4", "hydra.run.dir=whole")
    command("trainer.max_epochs=2", "hydra.run.dir=run")
    command("trainer.max_epochs=4", "hydra.run.dir=run", "ckpt_path=run/checkpoints/last.ckpt")
    assert_same_network(tmp_path / "whole", tmp_path / "run")


def test_a_leg_that_trains_nothing_is_refused_and_keeps_the_results(tmp_path: Path) -> None:
    same = (*TINY, "method=static", "hydra.run.dir=run", "quiet=true")
    assert train(tmp_path, *same, "trainer.max_epochs=2").status == 0
    kept = {
        path: path.read_bytes()
        for path in (tmp_path / "run").rglob("*")
        if path.suffix in (".json", ".csv", ".yaml", ".ckpt")
    }
    assert len(kept) > 4
    resumed = ("trainer.max_epochs=2", "ckpt_path=run/checkpoints/last.ckpt")
    for words, message in {
        resumed: "has 2 epochs behind it, so `trainer.max_epochs` = 2 leaves nothing to train",
        (
            *resumed[1:],
            "trainer.max_epochs=9",
            "trainer.max_steps=4",
        ): "has 8 steps behind it, so `trainer.max_steps` = 4",
        ("trainer.max_epochs=0",): "`trainer.max_epochs` = 0 leaves nothing to train",
        ("trainer.limit_train_batches=0",): "`trainer.limit_train_batches` = 0 leaves nothing to train",
        ("optimizer=adamw", "trainer.max_epochs=3", resumed[1]): "was trained by another `optimizer` than AdamW",
        ("scheduler=constant", "trainer.max_epochs=3", resumed[1]): "was trained under another `scheduler`",
    }.items():
        done = train(tmp_path, *same, *words)
        assert done.status == 1, words
        assert message in done.err
        assert len(done.err.splitlines()) == 1
        assert {path: path.read_bytes() for path in kept} == kept, words


def test_values_that_a_resumed_run_does_not_use_are_told(tmp_path: Path) -> None:
    same = (*TINY, "method=static", "hydra.run.dir=run")
    assert train(tmp_path, *same, "trainer.max_epochs=1").status == 0
    more = ("trainer.max_epochs=2", "ckpt_path=run/checkpoints/last.ckpt", "optimizer.lr=0.01")
    done = train(tmp_path, *same, *more)
    assert done.status == 0
    assert "bame-train: `optimizer.lr` 0.01 is not used: a resumed run goes on with 0.05.\n" in done.err


def test_a_job_that_was_resumed_is_finished_for_its_sweep(tmp_path: Path) -> None:
    same = (*TINY, "method=static", "trainer.max_epochs=2", "quiet=true")
    sweep = ("-m", *same, "seed=0,1", "hydra.sweep.dir=s", "skip_finished=true")
    assert train(tmp_path, *sweep).status == 0
    (tmp_path / "s/1/summary.json").unlink()
    shutil.rmtree(tmp_path / "s/1")
    assert train(tmp_path, *same, "seed=1", "hydra.run.dir=s/1", "trainer.max_epochs=1").status == 0
    resumed = ("seed=1", "hydra.run.dir=s/1", "ckpt_path=s/1/checkpoints/last.ckpt")
    assert train(tmp_path, *same, *resumed).status == 0
    done = train(tmp_path, *sweep)
    assert (done.status, done.out.count("is finished; skipped")) == (0, 2)
    with (tmp_path / "s/1/metrics.csv").open() as file:
        assert len([row for row in csv.DictReader(file) if row["val/loss"]]) == 2
