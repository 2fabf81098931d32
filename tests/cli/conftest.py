"""Commands called in this process."""

import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from bame_lightning.cli import train

TINY = ("model.hidden=[32]", "trainer.max_epochs=1", "trainer.accelerator=cpu")
QUIET_HYDRA = ("hydra/job_logging=disabled", "hydra/hydra_logging=disabled")

Run = Callable[..., Path]
Answer = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Call `bame-train` in this process; returns its run folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    levels = {name: logging.getLogger(name).level for name in ("lightning.pytorch", "lightning.fabric")}
    threads = torch.get_num_threads()

    def call(*overrides: str) -> Path:
        flags = [override for override in overrides if override.startswith("-")]
        rest = [override for override in overrides if not override.startswith("-")]
        other_model = any(override.startswith("model=") for override in rest)
        tiny = [override for override in TINY if not (other_model and override.startswith("model."))]
        folder = [] if "-m" in flags else ["hydra.run.dir=run"]
        monkeypatch.setattr(sys, "argv", ["bame-train", *flags, *tiny, *folder, *QUIET_HYDRA, *rest])
        train.main()
        return tmp_path / "run"

    yield call
    for logger in logging.Logger.manager.loggerDict.values():
        if isinstance(logger, logging.Logger):
            logger.disabled = False  # Hydra's quiet logging disables every logger of the process
    torch.set_num_threads(threads)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture
def answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[Callable[[], None]], Answer]:
    """Call a command in this process that answers a question and writes no file; returns what it prints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)

    def command(main: Callable[[], None]) -> Answer:
        def call(*overrides: str) -> str:
            monkeypatch.setattr(sys, "argv", [main.__module__, *overrides])
            main()
            out, err = capsys.readouterr()
            assert err == ""
            assert not list(tmp_path.iterdir())
            return out

        return call

    return command
