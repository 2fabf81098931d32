"""One folder, one run: claim a folder, so that no other run writes into it."""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows, where folders are not guarded
    fcntl = None  # type: ignore[assignment]

LOCK = ".owner"


class TakenError(ValueError):
    """The folder belongs to another run."""


def first_process() -> bool:
    """Whether this is the process that writes: the only one, or the first of those that train together."""
    ranks = (os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK"))
    return next((rank for rank in ranks if rank), "0") == "0"


@contextmanager
def claim(folder: Path, job: tuple[str | None, str] | None = None) -> Iterator[None]:
    """Claim a folder for this process alone. The system ends the claim when the process ends, for whatever reason.

    Args:
        folder: The folder, made if it does not exist.
        job: An identifier of the sweep that this run belongs to, and the number of the job in it.

    Yields:
        Nothing.

    Raises:
        TakenError: If another process has the folder, or another job of the same sweep had it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # This process must not close the file, nor read it elsewhere: both end a POSIX lock. Forked workers do not inherit it.
    with (folder / LOCK).open("a+") as file:
        if fcntl is not None:
            _lock(file, folder)
        before = _read(file)
        theirs = before.get("job")
        if job is not None and theirs is not None and theirs[0] == job[0] is not None and theirs[1] != job[1]:
            raise TakenError(
                f"The folder {folder} is that of job {theirs[1]} of this sweep, too. Let hydra.sweep.subdir name "
                r"all that the sweep varies, for instance hydra.sweep.subdir='${hydra.job.override_dirname}', or leave it out."
            )
        file.seek(0)
        file.truncate()
        json.dump({"host": socket.gethostname(), "process": os.getpid(), "job": job}, file)
        file.flush()
        yield


_OTHER = "Wait for its end, or choose another one (hydra.run.dir=, in a sweep hydra.sweep.dir=)."


def _lock(file: IO[str], folder: Path) -> None:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise TakenError(f"The folder {folder} is in use by {_owner(file)}. {_OTHER}") from None
    except OSError as error:  # some file systems have no locks
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise


def _owner(file: IO[str]) -> str:
    known = _read(file)
    return f"process {known['process']} on {known['host']}" if {"process", "host"} <= known.keys() else "another run"


def _read(file: IO[str]) -> dict[str, Any]:
    file.seek(0)
    try:
        known = json.load(file)
    except ValueError:
        return {}
    return known if isinstance(known, dict) else {}
