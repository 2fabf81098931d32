"""Report a user's mistake in one line."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeGuard

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from bame_lightning.cli.claims import TakenError
from bame_lightning.cli.command import FULL, words_of
from bame_lightning.cli.jobs import record
from bame_lightning.cli.sweeps import in_sweep, unescaped
from bame_lightning.cli.words import no_option, unknown_key, unknown_option, unreadable
from bame_lightning.show.find_runs import ERROR

_USER_ERRORS = (
    *(ValueError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError),
    *(HydraException, OmegaConfBaseException),
)
_FULL_ERROR = "HYDRA_FULL_ERROR"
# By its name, so that an error before Lightning is imported need not wait for it.
_LIGHTNING_SAYS = "MisconfigurationException"


_composes = ExitStack()
"""Closed when Hydra has composed. Until then Hydra must leave errors whole, or it would shorten them in its own way."""


@contextmanager
def _whole_errors() -> Iterator[None]:
    wish = os.environ.get(_FULL_ERROR)  # whether the user wants whole tracebacks
    os.environ[_FULL_ERROR] = "1"
    yield
    del os.environ[_FULL_ERROR]
    if wish is not None:
        os.environ[_FULL_ERROR] = wish


@contextmanager
def composition_errors(command: str, config: str) -> Iterator[None]:
    """Turn an error of Hydra, before it calls the command, into one line on stderr and exit status 1.

    Args:
        command: Name to print before the message.
        config: Name of the command's configuration.

    Yields:
        Nothing.
    """
    _composes.enter_context(_whole_errors())
    try:
        yield
    except Exception as error:
        _composes.close()
        if os.environ.get(_FULL_ERROR) == "1" or not of_the_user(error):
            raise
        print(f"{command}: error: {_composing(error, config)}", file=sys.stderr)
        sys.exit(1)
    finally:
        _composes.close()


def _composing(error: Exception, config: str) -> str:
    said, words = " ".join(str(error).split()), sys.argv[1:]
    if missing := re.match(r"Could not override '([\w./@-]+)'", said):
        return unknown_key(config, missing[1], words)
    if isinstance(error, OverrideParseException):
        return unreadable(error.override)
    if option := re.match(r"In '[^']*': Could not (?:find|load) '([^']+)/([^'/]*)'", said):
        listed = re.search(r"Available options[^:]*:(.*?)Config", said)
        return unknown_option(option[1], option[2], listed[1].split() if listed else ())
    if several := re.match(r"(?:Ambiguous value for argument|Sweep parameters) '(.*?)'", said):
        return (
            f"{several[1]} has several values. -m runs each of them; [ ] around them make a list, and quotes one text."
        )
    if said.startswith("Config group override must be"):
        return no_option(words)
    return _message(error)


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
    _composes.close()
    try:
        yield
    except Exception as error:
        if in_sweep():
            _record(error, command)
            return
        if os.environ.get(_FULL_ERROR) == "1" or not of_the_user(error):
            raise
        print(f"{command}: error: {_message(error)}", file=sys.stderr)
        sys.exit(1)


def of_the_user(error: BaseException | None) -> TypeGuard[Exception]:
    """Whether an error says what a user did wrong; if not, its traceback says more."""
    if isinstance(error, OSError) and error.errno in FULL:
        return True
    return isinstance(error, _USER_ERRORS) or any(kind.__name__ == _LIGHTNING_SAYS for kind in type(error).__mro__)


def _message(error: Exception) -> str:
    # Hydra wraps the error of a constructor into lines about the call; the cause says what is wrong.
    part = re.search(r"full_key: (\S+)", str(error))
    if isinstance(error, InstantiationException) and isinstance(cause := error.__cause__, Exception):
        if part and not of_the_user(cause):
            return not_made(part[1], cause)
        error = cause
    remedy = "Move it away, change its rights, or name another path."
    full = "Make room, or name another path (hydra.run.dir=). Earlier checkpoints are whole."
    message = words_of(error, remedy, full)
    return message if of_the_user(error) else f"{type(error).__name__}: {message}"


def not_made(name: str, error: Exception) -> str:
    """Say that a part of a run cannot be made of its values, unless the error names one of them itself.

    Args:
        name: Key of the part.
        error: What was raised.

    Returns:
        A sentence or two.
    """
    message = " ".join(str(error).split())
    if isinstance(error, ValueError) and message.startswith("`"):  # one of ours
        return message
    end = "" if message.endswith((".", "!", "?")) else "."
    return f"`{name}` cannot be made of its values: {message}{end} {_FULL_ERROR}=1 shows where."


def _record(error: Exception, command: str) -> None:
    cfg = HydraConfig.get()
    line = f"{unescaped(' '.join(cfg.overrides.task))}: {_message(error)}"
    record(cfg, line)
    if not isinstance(error, TakenError):  # whose folder is another's
        trace = "".join(traceback.format_exception(error))
        Path(cfg.runtime.output_dir, ERROR).write_text(f"{line}\n\n{trace}")
    print(f"{command}: error: {line}", file=sys.stderr)
