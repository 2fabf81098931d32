"""The part of every command that needs no heavy import: version, help, and what it waits for.

The modules with which commands start (`train.py`, `audit.py`, ...) do not import torch. The modules that do the work are
imported where the work begins.
"""

from __future__ import annotations

import argparse
import errno
import functools
import platform
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

from typing_extensions import override

import bame_lightning
from bame_lightning.cli.interruption import stoppable

WRITES = "The command writes into the folder: copy it to where you may write."

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
"""Numbers of `OSError` that mean a full disk."""

Answer = Callable[..., int]
"""Runs a command: from its arguments (by default those of the command line) to its exit status."""
_TOLD = ("torch", "lightning", "hydra-core")


def command_parser(name: str, description: str, epilog: str) -> argparse.ArgumentParser:
    """Make the parser of a command that takes flags.

    Args:
        name: Name of the command.
        description: What it does; printed as it is.
        epilog: Text after the flags; printed as it is.

    Returns:
        A parser that knows `--help` and `--version`.
    """
    made = argparse.ArgumentParser(
        prog=name, description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.register("action", None, _Once)
    made.add_argument("--version", action="version", version=version(name), help="show the version and exit")
    return made


class _Once(argparse.Action):
    """Take a value as argparse does, but refuse one that is given twice; argparse would take the last."""

    @override
    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        if getattr(namespace, self.dest) != self.default:
            raise argparse.ArgumentError(self, f"is given twice: {getattr(namespace, self.dest)} and {values}")
        setattr(namespace, self.dest, values)


def version(name: str) -> str:
    """Name the versions of a command and of the libraries under it.

    Args:
        name: Name of the command.

    Returns:
        A line.
    """
    others = ", ".join(f"{package} {metadata.version(package)}" for package in _TOLD)
    return f"{name} {bame_lightning.__version__} ({others}, Python {platform.python_version()})"


def answers(name: str, remedy: str) -> Callable[[Answer], Answer]:
    """End a command that is stopped, or cannot use its input, with a line on stderr and an exit status.

    Args:
        name: Name of the command.
        remedy: A sentence that follows the system's message about a file.

    Returns:
        A decorator.
    """

    def decorate(answer: Answer) -> Answer:
        @functools.wraps(answer)
        def main(argv: Sequence[str] | None = None) -> int:
            with stoppable(name):
                try:
                    return answer(argv)
                except (ValueError, OSError) as error:
                    print(f"{name}: error: {printable(words_of(error, remedy))}", file=sys.stderr)
            return 1

        return main

    return decorate


def words_of(error: Exception, remedy: str, full: str = "Make room.") -> str:
    """Tell an error in a line.

    Args:
        error: What was raised; the message of one of ours says all.
        remedy: A sentence that follows what the system says of a file.
        full: The sentence for a full disk.

    Returns:
        The line.
    """
    if not isinstance(error, OSError) or (error.filename is None and error.errno not in FULL):
        return " ".join(str(error).split())
    where = "" if error.filename is None else f"{error.filename}: "
    return f"{where}{error.strerror}. {full if error.errno in FULL else remedy}"


def printable(text: str) -> str:
    """Escape characters that control a terminal: names may come from an untrusted file."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def loading(name: str, what: str) -> None:
    """Tell the user at a terminal what takes seconds; write nothing into logs and pipes.

    Args:
        name: Name of the command.
        what: The packages that are imported.
    """
    if sys.stderr.isatty():
        print(f"{name}: loading {what} ...", file=sys.stderr, flush=True)
