"""What every command can say before it imports anything heavy: its version, its help, and what it waits for.

The modules that commands start with (`train.py`, `audit.py`, ...) import no torch; what does the work is imported where it
begins.
"""

from __future__ import annotations

import argparse
import platform
import sys
from importlib import metadata

import bame_lightning

WRITES = "The command writes into the folder: copy it to where you may write."
_TOLD = ("torch", "lightning", "hydra-core")


def command_parser(name: str, description: str, epilog: str) -> argparse.ArgumentParser:
    """Make the parser of a command that takes flags.

    Args:
        name: Name of the command.
        description: What it does; printed as it is.
        epilog: What follows the flags; printed as it is.

    Returns:
        A parser that knows `--help` and `--version`.
    """
    made = argparse.ArgumentParser(
        prog=name, description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--version", action="version", version=version(name), help="show the version and exit")
    return made


def version(name: str) -> str:
    """Name a command's version, and those of what it stands on.

    Args:
        name: Name of the command.

    Returns:
        A line.
    """
    others = ", ".join(f"{package} {metadata.version(package)}" for package in _TOLD)
    return f"{name} {bame_lightning.__version__} ({others}, Python {platform.python_version()})"


def told(error: Exception, remedy: str) -> str:
    """Say what is wrong in a line; what the system says of a file names no remedy.

    Args:
        error: What was raised.
        remedy: A sentence that follows what the system says.

    Returns:
        The line.
    """
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}. {remedy}"
    return str(error)


def loading(name: str, what: str) -> None:
    """Tell who waits at a terminal what takes seconds; logs and pipes are spared.

    Args:
        name: Name of the command.
        what: What is imported.
    """
    if sys.stderr.isatty():
        print(f"{name}: loading {what} ...", file=sys.stderr, flush=True)
