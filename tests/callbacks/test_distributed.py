"""Two real processes: ranks see different data and agree on every mask."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bame_lightning import BAMECallback, Evidence, Schedule
from tests.training import Spy, Task, trainer


def train_on_two_ranks(folder: Path) -> None:
    """Record, on each rank, local gradients before the all-reduce, and all masks after every step."""
    callback = BAMECallback("2:4", schedule=Schedule(every=2), evidence=Evidence(read_every=2), verify=True)
    record: dict[str, list[torch.Tensor]] = {"local": [], "masks": []}
    task = Task(batch=4)
    task.model[6].weight.register_hook(lambda gradient: record["local"].append(gradient.clone()))
    look = Spy(lambda *_: record["masks"].append(torch.cat([s.pruned.flatten() for s in callback.weights])))
    fit = trainer(callback, look, devices=2, strategy="ddp", max_epochs=3)
    fit.fit(task)
    torch.save({**record, "weight": task.model[6].weight.detach()}, folder / f"rank{fit.global_rank}.pt")


@pytest.mark.slow
def test_ranks_that_see_different_data_agree_on_every_mask(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-m", __name__, str(tmp_path)]
    # Lightning starts the second rank by running the same command again.
    done = subprocess.run(command, timeout=240, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert not any(torch.equal(a, b) for a, b in zip(one["local"], two["local"], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(one["masks"], two["masks"], strict=True))
    assert torch.equal(one["weight"], two["weight"])
    assert not torch.equal(one["masks"][0], one["masks"][-1])


if __name__ == "__main__":
    train_on_two_ranks(Path(sys.argv[1]))
