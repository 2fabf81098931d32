"""What a user did wrong, told in one line."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeGuard

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from omegaconf.errors import OmegaConfBaseException

from bame_lightning.cli.sweeps import in_sweep, unescaped
from bame_lightning.runs import ERROR

_IN_THE_WAY = (FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)
_USER_ERRORS = (ValueError, FileNotFoundError, *_IN_THE_WAY, HydraException, OmegaConfBaseException)
# By its name: who errs before Lightning is imported shall not wait for it.
_LIGHTNING_SAYS = "MisconfigurationException"


@contextmanager
def one_line_errors(command: str) -> Iterator[None]:
    """Turn an error that a wrong value causes into one line on stderr and exit status 1.

    A job of a sweep writes any error into its folder and goes on after the `with` block, so that the other jobs still
    run; `ReportFailures` then tells the user. Elsewhere, `HYDRA_FULL_ERROR=1` leaves errors as they are.

    Args:
        command: Name to print before the message.

    Yields:
        Nothing.
    """
    try:
        yield
    except Exception as error:
        if in_sweep():
            _record(error, command)
            return
        if os.environ.get("HYDRA_FULL_ERROR") == "1" or not _of_the_user(error):
            raise
        print(f"{command}: error: {_message(error)}", file=sys.stderr)
        sys.exit(1)


def _of_the_user(error: BaseException | None) -> TypeGuard[Exception]:
    return isinstance(error, _USER_ERRORS) or any(kind.__name__ == _LIGHTNING_SAYS for kind in type(error).__mro__)


def _message(error: Exception) -> str:
    # Hydra wraps what a constructor raises into lines about the call; what is wrong stands in the cause.
    if isinstance(error, InstantiationException) and _of_the_user(cause := error.__cause__):
        error = cause
    message = " ".join(str(error).split())
    if isinstance(error, _IN_THE_WAY) and error.filename is not None:  # the system's words, which name no remedy
        message = f"{error.filename}: {error.strerror}. Move it away, change its rights, or name another path."
    return message if _of_the_user(error) else f"{type(error).__name__}: {message}"


def _record(error: Exception, command: str) -> None:
    cfg = HydraConfig.get()
    line = f"{unescaped(' '.join(cfg.overrides.task))}: {_message(error)}"
    trace = "".join(traceback.format_exception(error))
    Path(cfg.runtime.output_dir, ERROR).write_text(f"{line}\n\n{trace}")
    print(f"{command}: error: {line}", file=sys.stderr)
