"""Runs and sweeps that are told to stop: what they say, how they exit, and that they can be gone on with."""

import json
import os
import pty
import shlex
import signal
import subprocess
import sys
import tomllib
from contextlib import suppress
from pathlib import Path

import pytest

from bame_lightning.cli import start
from tests.cli.processes import TINY, stopping, train

ROOT = Path(__file__).parents[2]

SIGNALS = pytest.mark.parametrize(("number", "words"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")])


@SIGNALS
def test_a_run_that_is_stopped_says_so_and_how_it_goes_on(number: signal.Signals, words: str, tmp_path: Path) -> None:
    short = (*TINY, "trainer.max_epochs=3", "hydra.run.dir=a run", "quiet=true")
    done = train(tmp_path, *short, "method=static", *stopping(tmp_path, number))
    assert done.status == 128 + number
    lines = [line for line in done.err.splitlines() if "graceful" not in line and line]
    assert lines[:2] == [f"bame-train: stopped by {words}.", "To go on from its last checkpoint:"]
    assert len(lines) == 3
    assert not (tmp_path / "a run/summary.json").exists()
    again = [word for word in shlex.split(lines[2]) if not word.startswith("+callbacks.stop")]
    assert again[0] == "bame-train"
    assert train(tmp_path, *again[1:]).status == 0
    assert json.loads((tmp_path / "a run/summary.json").read_text())["epochs"] == 3


def test_a_run_that_is_stopped_before_its_first_checkpoint_says_so(tmp_path: Path) -> None:
    done = train(tmp_path, *TINY, "method=static", *stopping(tmp_path, signal.SIGTERM, epoch=0), "hydra.run.dir=run")
    assert done.status == 143
    assert "there is no checkpoint: the same command begins again" in done.err


def test_a_signal_in_the_last_epoch_finds_the_trained_network(tmp_path: Path) -> None:
    stop = stopping(tmp_path, signal.SIGTERM, epoch=0)
    module = tmp_path / "stop.py"
    module.write_text(module.read_text().replace("(self.epoch, 1)", "(self.epoch, 3)"))  # the last of four batches
    done = train(tmp_path, *TINY, *stop, "trainer.max_epochs=1", "hydra.run.dir=run", "quiet=true", "method=static")
    assert done.status == 143
    assert done.err.splitlines() == [
        "bame-train: stopped by SIGTERM.",
        f"Training had ended, but for the test of the network, which is in {tmp_path / 'run/checkpoints/last.ckpt'}.",
    ]
    assert (tmp_path / "run/checkpoints/last.ckpt").exists()


@SIGNALS
def test_a_sweep_that_is_stopped_lists_what_did_not_run(number: signal.Signals, words: str, tmp_path: Path) -> None:
    (tmp_path / "only.py").write_text(
        "import stop\n\ndef second(epoch, number, seed):\n    return stop.At(epoch if seed == 1 else 99, number)\n"
    )
    stop = [word.replace("stop.At", "only.second") for word in stopping(tmp_path, number)]
    sweep = ("-m", *TINY, "trainer.max_epochs=2", "quiet=true", "method=static", "hydra.sweep.dir=s", "seed=0,1,2,3")
    done = train(tmp_path, *sweep, *stop, "+callbacks.stop.seed=${seed}")
    assert done.status == 128 + number
    assert f"bame-train: stopped by {words}." in done.err
    assert "3 of the 4 jobs have not run to their end:" in done.err
    listed = [
        line for line in done.err.splitlines() if line.startswith("  ") and "seed=" in line and "bame-train" not in line
    ]
    assert all("+callbacks.stop.seed=${seed}" in line for line in listed)
    assert ["seed=1" in listed[0], "seed=2" in listed[1], "seed=3" in listed[2], len(listed)] == [True, True, True, 3]
    assert "hydra.sweep.dir=s skip_finished=true" in done.err
    assert sorted(path.parent.name for path in tmp_path.glob("s/*/summary.json")) == ["0"]


def test_a_job_that_is_stopped_in_its_test_has_ended(tmp_path: Path) -> None:
    stop = stopping(tmp_path, signal.SIGTERM)
    module = tmp_path / "stop.py"
    module.write_text(
        "import os\nfrom lightning import Callback\n\nclass At(Callback):\n"
        "    def __init__(self, epoch, number):\n        self.number = number\n\n"
        "    def on_test_batch_start(self, *_):\n        os.kill(os.getpid(), self.number)\n"
    )
    sweep = ("-m", *TINY, "trainer.max_epochs=1", "quiet=true", "method=static", "hydra.sweep.dir=s", "seed=0,1")
    done = train(tmp_path, *sweep, *stop)
    assert done.status == 143
    assert f"The run had ended; all its results are in {tmp_path / 's/0'}." in done.err
    assert "1 of the 2 jobs have not run to their end:\n  seed=1" in done.err.replace(" ".join(TINY) + " ", "").replace(
        "trainer.max_epochs=1 quiet=True method=static ", ""
    )
    assert json.loads((tmp_path / "s/0/summary.json").read_text())["epochs"] == 1


@pytest.mark.parametrize("command", ["audit", "report", "compare"])
def test_commands_that_answer_end_in_a_line_too(command: str, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    program = Path(sys.executable).with_name(f"bame-{command}")
    with subprocess.Popen([program, "."], cwd=tmp_path, stderr=theirs) as process:
        os.close(theirs)
        os.read(ours, 200)  # what it loads, which takes seconds
        process.send_signal(signal.SIGINT)
        said = b""
        with suppress(OSError):  # the end of a terminal
            while part := os.read(ours, 2000):
                said += part
        assert process.wait(60) == 130
    os.close(ours)
    assert said.decode().splitlines()[-1] == f"bame-{command}: stopped by Ctrl-C."
    assert "Traceback" not in said.decode()


INTERRUPTED = """
import os, signal, sys

class Interrupts:
    def find_spec(self, name, *_):
        if name == {during!r}:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupts())
from bame_lightning.cli import start
sys.exit(start.{command}())
"""


@pytest.mark.parametrize(("command", "during"), [("train", "hydra"), ("audit", "bame_lightning.cli.checkpoints")])
def test_a_command_that_is_still_being_imported_ends_in_a_line(command: str, during: str) -> None:
    program = [sys.executable, "-c", INTERRUPTED.format(command=command, during=during)]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, f"bame-{command}: stopped by Ctrl-C.\n")


def test_every_command_starts_there() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {name: f"bame_lightning.cli.start:{name.removeprefix('bame-')}" for name in scripts}
    assert all(callable(getattr(start, name.removeprefix("bame-"))) for name in scripts)
