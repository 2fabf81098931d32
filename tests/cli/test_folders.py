"""One folder, one run; files that are whole, whatever the disk does."""

import json
import time
from pathlib import Path

import pytest
import torch

from tests.cli.processes import TINY, Running, train

SAME = (*TINY, "method=static", "trainer.max_epochs=1", "quiet=true")
WAIT = """
import time
from pathlib import Path
from lightning import Callback

class Wait(Callback):
    def on_train_batch_start(self, *_):
        Path("begun").touch()
        while not Path("go").exists():
            time.sleep(0.05)
"""


def test_a_second_live_run_is_refused_a_folder_and_a_later_one_is_not(tmp_path: Path) -> None:
    (tmp_path / "wait.py").write_text(WAIT)
    first = Running(tmp_path, *SAME, "hydra.run.dir=run", "seed=1", "+callbacks.wait._target_=wait.Wait")
    while not (tmp_path / "begun").exists():
        assert first.process.is_alive()
        time.sleep(0.05)
    second = train(tmp_path, *SAME, "hydra.run.dir=run", "seed=2")
    assert second.status == 1
    assert f"run is in use by process {first.process.pid} on " in second.err
    assert len(second.err.splitlines()) == 1
    assert "seed: 1" in (tmp_path / "run/.hydra/config.yaml").read_text()
    (tmp_path / "go").touch()
    assert first.end().status == 0
    assert train(tmp_path, *SAME, "hydra.run.dir=run", "seed=2").status == 0
    assert json.loads((tmp_path / "run/summary.json").read_text())["seed"] == 2


def test_a_killed_run_leaves_its_folder_free(tmp_path: Path) -> None:
    (tmp_path / "wait.py").write_text(WAIT)
    first = Running(tmp_path, *SAME, "hydra.run.dir=run", "+callbacks.wait._target_=wait.Wait")
    while not (tmp_path / "begun").exists():
        time.sleep(0.05)
    first.process.kill()
    assert first.end().status == 137
    part = tmp_path / "run/checkpoints/.last.ckpt.1.part"
    part.parent.mkdir(exist_ok=True)
    part.touch()
    assert train(tmp_path, *SAME, "hydra.run.dir=run").status == 0
    assert not part.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("-m", "hydra.run.dir=x", "seed=0,1"),
            "`hydra.run.dir` does nothing in a sweep. Name its folder by hydra.sweep.dir=",
        ),
        (("hydra.sweep.dir=x",), "`hydra.sweep.dir` does nothing in a run. Name its folder by hydra.run.dir="),
    ],
)
def test_a_folder_that_would_be_passed_over_is_refused(words: tuple[str, ...], message: str, tmp_path: Path) -> None:
    done = train(tmp_path, *SAME, *words)
    assert done.status == 1
    assert message in done.err
    assert len(done.err.splitlines()) == 1
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("again", [(), ("skip_finished=true",)])
def test_jobs_of_a_sweep_that_share_a_folder_lose_nothing_and_fail(again: tuple[str, ...], tmp_path: Path) -> None:
    sweep = ("-m", *SAME, "hydra.sweep.dir=s", "hydra.sweep.subdir=${seed}", "pattern=1:4,2:4", "seed=0,1", *again)
    done = train(tmp_path, *sweep)
    assert done.status == 1
    assert "2 of the jobs failed, the others are finished" in done.err
    for job, theirs in ((2, 0), (3, 1)):
        line = next(line for line in done.err.splitlines() if line.startswith(f"  s/{job - 2}: ") and "2:4" in line)
        assert f"is that of job {theirs} of this sweep, too. Let hydra.sweep.subdir name all" in line
    for seed in (0, 1):
        assert json.loads((tmp_path / f"s/{seed}/summary.json").read_text())["pattern"] == "1:4"
        assert not (tmp_path / f"s/{seed}/error.txt").exists(), "of the job that has the folder"
    assert "error.txt" not in done.err
    assert "runs these again" not in done.err, "they would be refused again"


def test_failures_in_folders_outside_the_sweep_are_counted(tmp_path: Path) -> None:
    places = ("hydra.sweep.dir=s", "hydra.sweep.subdir=../elsewhere/${hydra.job.num}")
    done = train(tmp_path, "-m", *SAME, *places, "pattern=1:7,1:4")
    assert done.status == 1
    assert "1 of the jobs failed" in done.err
    assert (tmp_path / "elsewhere/1/summary.json").exists()


def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint_whole(tmp_path: Path) -> None:
    same = (*TINY[1:], "model.hidden=[64]", "method=static", "hydra.run.dir=run", "quiet=true")
    assert train(tmp_path, *same, "trainer.max_epochs=1").status == 0
    last = tmp_path / "run/checkpoints/last.ckpt"
    size = last.stat().st_size
    kept = last.read_bytes()
    done = train(tmp_path, *same, "trainer.max_epochs=2", "ckpt_path=run/checkpoints/last.ckpt", largest=size // 2)
    assert done.status == 1
    assert done.err.strip().splitlines() == [
        f"bame-train: error: {last}: File too large. Make room, or name another path (hydra.run.dir=). Earlier checkpoints "
        "are whole."
    ]
    assert last.read_bytes() == kept
    assert torch.load(last, weights_only=True)["epoch"] == 0
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".part"]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in ("file/run", "/proc/run"):
        done = train(tmp_path, *SAME, f"hydra.run.dir={folder}")
        assert done.status == 1
        assert len(done.err.splitlines()) == 1, done.err
        assert folder in done.err
        sweep = train(tmp_path, "-m", *SAME, f"hydra.sweep.dir={folder}", "seed=0,1")
        assert sweep.status == 1
        assert len(sweep.err.splitlines()) == 1, sweep.err
        assert "Choose another folder (hydra.sweep.dir=)." in sweep.err
