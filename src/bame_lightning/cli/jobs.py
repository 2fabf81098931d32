"""Follow the jobs of a sweep, on whatever process or machine: each leaves a file in the sweep's folder."""

from __future__ import annotations

import json
import os
import re
import uuid
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from bame_lightning.cli.claims import claim

_FOLDER = ".jobs"
_SWEEP = "sweep"


class Job(NamedTuple):
    """A job that has ended."""

    folder: str
    error: str | None


class Sweep:
    """The sweep that this process runs; no other process may run one in the same folder.

    Args:
        config: Hydra's configuration of it.

    Raises:
        TakenError: If another process runs a sweep in the folder.
    """

    def __init__(self, config: DictConfig) -> None:
        self.folder = Path(config.hydra.sweep.dir)
        self.planned = _planned(config)
        self._claim = ExitStack()  # until the process ends
        self._claim.enter_context(claim(self.folder / _FOLDER))
        for path in (self.folder / _FOLDER).glob("*.json"):
            path.unlink()
        (self.folder / _FOLDER / _SWEEP).write_text(uuid.uuid4().hex)

    def ended(self) -> dict[int, Job]:
        """Find the jobs that have ended, by number."""
        found = {}
        for path in (self.folder / _FOLDER).glob("*.json"):
            found[int(path.stem)] = Job(**json.loads(path.read_text()))
        return dict(sorted(found.items()))

    def unfinished(self) -> list[str]:
        """Say, in lines, which jobs have not ended, and how to run them."""
        ended = self.ended()
        missing = [words for number, words in enumerate(self.planned) if number not in ended]
        if self.planned and not missing:
            return []
        again = f"The same command with hydra.sweep.dir={self.folder} skip_finished=true runs what has no results."
        if not self.planned:
            return [f"{len(ended)} jobs of this sweep have ended, the others have not. {again}"]
        title = f"{len(missing)} of the {len(self.planned)} jobs have not run to their end:"
        return [title, *(f"  {words}" for words in missing), again]


_current: Sweep | None = None


def begin(config: DictConfig) -> None:
    """Begin the sweep of this process.

    Args:
        config: Hydra's configuration of it.
    """
    global _current
    _current = Sweep(config)


def current() -> Sweep:
    """The sweep of this process."""
    assert _current is not None
    return _current


def unfinished() -> list[str]:
    """Say, in lines, which jobs of this process's sweep have not ended; nothing outside a sweep."""
    return [] if _current is None else _current.unfinished()


def sweep_of(hydra: Any) -> str | None:
    """An identifier of a job's sweep."""
    path = Path(hydra.sweep.dir, _FOLDER, _SWEEP)
    return path.read_text() if path.is_file() else None


def record(hydra: Any, error: str | None) -> None:
    """Note, in a job's own process, that it has ended; an error that was noted stays.

    Args:
        hydra: Hydra's configuration of the job.
        error: Why it failed, in a line; None if it did not.
    """
    path = Path(hydra.sweep.dir, _FOLDER, f"{hydra.job.num}.json")
    if error is None and path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"folder": os.path.relpath(hydra.runtime.output_dir), "error": error}))


def as_written(overrides: Any) -> list[str]:
    """Read overrides of a sweep without resolving them: `${seed}` is another value in every job."""
    return [str(overrides._get_node(place)) for place in range(len(overrides))]


def _planned(config: DictConfig) -> list[str]:
    """Overrides of every job, if Hydra's own sweeper makes them from the command line alone."""
    if not str(config.hydra.sweeper.get("_target_")).endswith("BasicSweeper"):
        return []
    given = [f"{key}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()]
    parsed = OverridesParser.create().parse_overrides([*given, *as_written(config.hydra.overrides.task)])
    return [
        re.sub(r"\\([:{}])", r"\1", " ".join(words))
        for batch in BasicSweeper.split_arguments(parsed, None)
        for words in batch
    ]
