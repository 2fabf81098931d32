"""`bame-bench` on the command line, and the turns that methods take."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from bame_lightning import StaticMask
from bame_lightning.cli import bench
from bame_lightning.cli.measuring import random_batch
from bame_lightning.cli.timed_training import CYCLE, Fit, Times, take_turns
from tests.cli.conftest import Answer

MLP = ("model=mlp", "model.hidden=[32]", "data=digits", "batch_size=4", "cycles=1")


@pytest.fixture
def run(answer: Callable[[Callable[[], None]], Answer]) -> Answer:
    return answer(bench.main)


class Watched(L.LightningModule):
    """Writes down whose step it is."""

    def __init__(self, name: str, seen: Path) -> None:
        super().__init__()
        self.name, self.seen = name, seen
        self.model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        with self.seen.open("a") as file:
            file.write(self.name)
        if self.name == "e" and batch_idx:
            raise RuntimeError("no such luck")
        if self.name == "k" and batch_idx:
            os.kill(os.getpid(), signal.SIGKILL)
        return nn.functional.cross_entropy(self.model(batch[0].flatten(1)), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def watched(name: str, seen: Path, *callbacks: L.Callback) -> Fit:
    return Fit(Watched(name, seen), list(callbacks), random_batch((1, 2, 4), 2, 3))


def test_methods_take_turns_step_by_step(tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    sparse = StaticMask("1:4", rescale=False)
    times = take_turns({"a": partial(watched, "a", seen), "b": partial(watched, "b", seen, sparse)}, cycles=2)
    assert seen.read_text() == "ab" * (3 * CYCLE)
    assert [len(t.seconds) for t in times.values()] == [2 * CYCLE] * 2
    assert times["a"].weights == times["a"].held == times["a"].saved == 0
    # The first layer alone is sparse: a byte for each of 64 weights, and a bit for what they were at first.
    assert (times["b"].weights, times["b"].held) == (64, 64 + 8)


def allocating(mebibytes: int) -> Fit:
    fit = watched("m", Path(os.devnull))
    fit.module.ballast = torch.ones(mebibytes, 2**18)
    return fit


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="the system does not tell how much memory a process has had"
)
def test_the_peak_of_memory_is_of_each_method_alone() -> None:
    times = take_turns({"small": partial(allocating, 1), "large": partial(allocating, 257)}, cycles=0)
    more = (times["large"].peak or 0) - (times["small"].peak or 0)
    assert more / 2**20 == pytest.approx(256, abs=16)


@pytest.mark.parametrize(
    ("name", "kind", "told"), [("e", RuntimeError, "luck"), ("k", ChildProcessError, "trained `k`")]
)
def test_what_fails_is_told_while_others_wait(name: str, kind: type[Exception], told: str, tmp_path: Path) -> None:
    fits = {"a": partial(watched, "a", tmp_path / "seen"), name: partial(watched, name, tmp_path / "seen")}
    with pytest.raises(kind, match=told):
        take_turns(fits, cycles=1)


def test_every_step_is_compared_with_the_dense_one_beside_it() -> None:
    # A machine that becomes ten times as slow in the second cycle; a method that takes twice as long at every 20th step.
    dense = Times([1.0] * 20 + [10.0] * 20, 0.0, 0, 0, 0, None)
    method = Times([2.0] + [1.0] * 19 + [20.0] + [10.0] * 19, 0.5, 100, 700, 300, 3 * 2**20)
    found = method.summary(dense)
    assert (found["reads_all"], found["adapts_all"], found["reads_some"], found["adapts_some"]) == (2, 1, 1, 1)
    assert found["over_dense"] == pytest.approx(1.05)
    assert (found["logging_ms"], found["held_bytes_a_weight"], found["saved_bytes_a_weight"]) == (500, 7, 3)
    assert (found["peak_mib"], dense.summary(dense)["peak_mib"]) == (3, None)


def test_a_model_is_measured(run: Answer) -> None:
    found: dict[str, Any] = json.loads(run(*MLP, "pattern=2:4", "json=true"))
    assert (found["model"], found["input_shape"], found["pattern"]) == ("mlp", [1, 8, 8], "2:4")
    assert list(found["methods"]) == ["dense", "sr_ste", "static", "bame"]
    assert found["methods"]["dense"]["over_dense"] == 1
    assert all(method["median_ms"] > 0 for method in found["methods"].values())
    # Latent values of pruned weights: half a float32 for each weight, and more.
    assert 2 < found["methods"]["sr_ste"]["saved_bytes_a_weight"] < 12
    assert "a step / dense" in run(*MLP)


def test_what_a_method_refuses_is_told_in_one_line(run: Answer, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(*MLP, "pattern=1:5")
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("bame-bench: error: No layer is eligible for `pattern` 1:5")


@pytest.mark.parametrize("wrong", ["cycles=0", "batch_size=0.5"])
def test_a_wrong_number_is_told_in_one_line(run: Answer, wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(*MLP, wrong)
    assert f"`{wrong.split('=')[0]}` must be a whole number of at least 1" in capsys.readouterr().err
