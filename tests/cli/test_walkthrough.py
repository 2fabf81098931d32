"""The documents as a new user follows them: their commands on the embedded digits, one after another, in an empty folder."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import sys
import tomllib
from pathlib import Path

import pytest

from bame_lightning.tasks.data import DEBIAN_FOLDER
from tests.cli.conftest import QUIET_HYDRA, Run
from tests.test_docs import ROOT, blocks

SMALL = ("model.hidden=[32]", "trainer.max_epochs=1", "trainer.accelerator=cpu")
# What needs another data set, a network, or an hour, is composed in tests/test_docs.py.
NOT_HERE = re.compile(r"data=|model=|recipe=|job$|logger=wandb|any_model|my_models|trainer\.devices|\[|dashboard")


def everything(document: str) -> list[str]:
    """Commands of this package in a document, in its order."""
    texts = [text.replace("\\\n", " ") for language, text in blocks(ROOT / document) if language != "python"]
    found = [re.split(r"\s[#|]", line)[0].strip() for text in texts for line in text.splitlines()]
    return [command for command in found if command.startswith("bame-")]


def commands(document: str) -> list[str]:
    """Those that the embedded digits and a minute suffice for."""
    return [command for command in everything(document) if not NOT_HERE.search(command)]


def newest(command: str) -> str:
    """Fill in the folders that a document leaves open."""
    for kind in ("outputs", "multirun"):
        if f"{kind}/..." in command:
            folders = [path for path in Path(kind).glob("*/*") if path.is_dir()]
            command = command.replace(f"{kind}/...", str(max(folders, key=lambda path: path.stat().st_mtime)))
    return command


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*will never .*is shorter than `schedule.every`")  # a single epoch of the digits
@pytest.mark.parametrize(
    "document", ["README.md", "recipes/README.md", "docs/finetuning.md", "docs/export.md", "docs/methods/README.md"]
)
def test_the_commands_of_a_document_run_one_after_another(
    document: str, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    if document == "docs/export.md":  # begins with the run of `make train`
        run("recipe=digits_mlp", "hydra.run.dir=outputs/digits")
        Path("last.ckpt").write_bytes(Path("outputs/digits/checkpoints/last.ckpt").read_bytes())
    done = commands(document)
    assert len(done) >= 2
    for command in done:
        program, *words = shlex.split(newest(command))
        module, _, function = scripts[program].partition(":")
        hydra = program in ("bame-train", "bame-flops")
        main = getattr(importlib.import_module(module), function)
        if hydra:
            small = SMALL if program == "bame-train" else ()
            monkeypatch.setattr(sys, "argv", [program, *words, *small, *QUIET_HYDRA])
            main()
        else:
            assert main(words) == 0, command
    assert "error" not in capsys.readouterr().err


LARGE = [
    command
    for command in everything("README.md")
    if command.startswith("bame-train") and ("data=fashion_mnist" in command or "recipe=" in command)
]


@pytest.mark.slow
@pytest.mark.parametrize("command", LARGE)
def test_a_longer_command_of_the_readme_trains_for_two_steps(
    command: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "fashion_mnist" in command and not DEBIAN_FOLDER.exists():
        pytest.skip("the Debian package dataset-fashion-mnist is not installed")
    few = [f"++trainer.limit_{stage}_batches=2" for stage in ("train", "val", "test")]
    words = [*shlex.split(command), *few, "trainer.max_epochs=1", "trainer.accelerator=cpu", "hydra.run.dir=run"]
    monkeypatch.setattr(sys, "argv", [*words, *QUIET_HYDRA])
    importlib.import_module("bame_lightning.cli.train").main()
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["steps"] == 2
    assert Path("run/checkpoints/last.ckpt").exists()


def test_the_readme_has_longer_commands() -> None:
    assert len(LARGE) >= 3
