"""`bame-train` in processes of its own, with signals and exit status, that do not import everything anew."""

from __future__ import annotations

import multiprocessing
import os
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

TINY = (
    "model.hidden=[32]",
    "trainer.accelerator=cpu",
    "threads=1",
    "data.batch_size=256",
    "trainer.log_every_n_steps=2",
)
"""Four steps an epoch."""

STOP = """
import os
from lightning import Callback

class At(Callback):
    def __init__(self, epoch, number):
        self.epoch, self.number = epoch, number

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (self.epoch, 1):
            os.kill(os.getpid(), self.number)
"""


def stopping(folder: Path, number: int, epoch: int = 1) -> list[str]:
    """Overrides that send a run a signal in the middle of an epoch; their module is written into the current folder."""
    (folder / "stop.py").write_text(STOP)
    return [
        "+callbacks.stop._target_=stop.At",
        f"+callbacks.stop.epoch={epoch}",
        f"+callbacks.stop.number={int(number)}",
    ]


class Done(NamedTuple):
    """How a process ended."""

    status: int
    """As a shell has it."""
    out: str
    err: str


_FORKS: Any = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["bame_lightning.cli.training", "bame_lightning.cli.train", "bame_lightning.callbacks"])


class Running:
    """A command that runs.

    Args:
        folder: Where it is called.
        *words: What follows its name.
        environment: Variables that are added, or removed where they are None.
        largest: The largest file, in bytes, that the system lets it write.
    """

    def __init__(
        self, folder: Path, *words: str, environment: Mapping[str, str | None] | None = None, largest: int | None = None
    ) -> None:
        self._outputs = [folder / f".{name}-{id(self)}" for name in ("out", "err")]
        arguments = (folder, ["bame-train", *words], dict(environment or {}), largest, *self._outputs)
        self.process = _FORKS.Process(target=_be, args=arguments)
        self.process.start()

    def end(self, seconds: float = 120) -> Done:
        """Wait for it."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, "it does not end"
        out, err = (path.read_text() for path in self._outputs)
        for path in self._outputs:
            path.unlink()
        code = self.process.exitcode
        return Done(code if code >= 0 else 128 - code, out, err)


def train(folder: Path, *words: str, **options: Any) -> Done:
    """Run `bame-train` to its end."""
    return Running(folder, *words, **options).end()


def _be(
    folder: Path, words: list[str], environment: dict[str, str | None], largest: int | None, out: Path, err: Path
) -> None:
    os.chdir(folder)
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    for name in [name for name in os.environ if name.startswith(("WANDB", "HYDRA_FULL"))]:
        del os.environ[name]
    for name, value in environment.items():
        if value is not None:
            os.environ[name] = value
    sys.argv, sys.path = words, [path for path in sys.path if path not in ("", str(folder))]
    if largest is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    from bame_lightning.cli.train import main

    main()
