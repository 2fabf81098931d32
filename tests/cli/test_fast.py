"""Commands speak before they import anything that takes seconds."""

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

import bame_lightning

BIN = Path(sys.executable).parent
HEAVY = {"torch", "lightning", "torchvision", "torchmetrics", "scipy", "sklearn", "matplotlib", "wandb"}
COMMANDS = ("audit", "bench", "compare", "dashboard", "export", "flops", "report", "train")
HYDRA = ("train", "flops", "bench")
MISTAKES = (
    ("train", "patern=2:4"),
    ("train", "model=resnet5"),
    ("train", "pattern=4:1"),
    ("train", "seed=one"),
    ("train", "+sed=1"),
    ("train", "ckpt_path=nowhere.ckpt"),
    ("flops", "model.widht=3"),
    ("flops", "steps=0"),
    ("bench", "cycles=none"),
    ("audit", "--patern", "2:4"),
    ("export", "last.ckpt", "--format", "packed", "--output", "no/such/folder/model.safetensors"),
    ("report",),
    ("train", "optimizer.lr=nan"),
    ("train", "ckpt=nowhere.ckpt"),
    ("train", "--hlep"),
    ("audit", "nowhere.ckpt"),
    ("audit", ".", "--pattern", "16:1"),
    ("export", "nowhere.ckpt", "--format", "packed", "--output", "model.safetensors"),
    ("report", "nowhere"),
    ("compare", "nowhere"),
)


def call(folder: Path, command: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command as a user does; `stderr` ends with the names of all modules that it imported."""
    return subprocess.run(
        [BIN / f"bame-{command}", *arguments],
        cwd=folder,
        env=os.environ | environment | {"PYTHONPROFILEIMPORTTIME": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def imported(done: subprocess.CompletedProcess[str]) -> set[str]:
    found = set(re.findall(r"^import time:.*\| +(\S+)$", done.stderr, re.MULTILINE))
    assert "sys" in found or "site" in found, "the list of imports is missing"
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_nothing_heavy(tmp_path: Path, command: str) -> None:
    done = call(tmp_path, command, "--help")
    assert done.returncode == 0
    assert f"bame-{command}" in done.stdout
    assert not imported(done) & HEAVY
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", COMMANDS)
def test_the_version_is_that_of_this_package_and_imports_nothing_heavy(tmp_path: Path, command: str) -> None:
    done = call(tmp_path, command, "--version")
    assert done.returncode == 0
    assert done.stdout.startswith(f"bame-{command} {bame_lightning.__version__} (torch ")
    assert done.stdout.count("\n") == 1
    assert not imported(done) & HEAVY


@pytest.mark.parametrize("mistake", MISTAKES, ids=" ".join)
def test_a_mistake_is_told_before_anything_heavy_is_imported(tmp_path: Path, mistake: tuple[str, ...]) -> None:
    done = call(tmp_path, *mistake)
    assert done.returncode != 0
    assert not imported(done) & HEAVY
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", HYDRA)
def test_completion_imports_nothing_heavy(tmp_path: Path, command: str) -> None:
    line = f"bame-{command} model=resnet2"
    done = call(tmp_path, command, "-sc", "query=bash", COMP_LINE=line, COMP_POINT=str(len(line)))
    assert done.stdout.split() == ["model=resnet20"]
    assert not imported(done) & HEAVY


@pytest.mark.parametrize(
    "arguments",
    [("audit", "."), ("flops", "model=mlp"), ("compare", "."), ("report", ".")],
    ids=" ".join,
)
def test_who_waits_at_a_terminal_is_told_at_once_what_for(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    ours, theirs = pty.openpty()
    command, *rest = arguments
    with subprocess.Popen(
        [BIN / f"bame-{command}", *rest], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=theirs
    ) as process:
        os.close(theirs)
        first = os.read(ours, 80).decode()
        process.wait()
    os.close(ours)
    assert re.match(rf"bame-{command}: loading [\w &]+ \.\.\.", first)
