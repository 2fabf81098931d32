"""Commands that are stopped, by Ctrl-C or by the system, say so, also by their exit status."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from bame_lightning.cli.claims import first_process

_WORDS = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class StoppedError(SystemExit):
    """The process was told to end; its exit status names the signal as shells do, 128 more than its number.

    Args:
        number: The signal.
        lines: Further lines to print.
    """

    def __init__(self, number: int, lines: Sequence[str] = ()) -> None:
        super().__init__(128 + number)
        self.lines = lines
        self.words = _WORDS.get(signal.Signals(number), signal.Signals(number).name)


class _Handler:
    """End the process at SIGTERM; while Lightning trains, it handles the signal first, at the end of the batch."""

    def __init__(self) -> None:
        self.waiting = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.waiting = signal.getsignal(signal.SIGTERM) is not self
        if not self.waiting:
            raise StoppedError(number)


_handler = _Handler()


@contextmanager
def stoppable(command: str, more: Callable[[], list[str]] = list) -> Iterator[None]:
    """End a command that is told to stop with a line on stderr and an exit status.

    Args:
        command: Its name.
        more: Finds further lines.

    Yields:
        Nothing.
    """
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _handler) if main else None
    try:
        yield
    except KeyboardInterrupt:
        stopped = StoppedError(signal.SIGINT)
    except StoppedError as error:
        stopped = error
    else:
        return
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)
    if first_process():
        for line in (f"{command}: stopped by {stopped.words}.", *stopped.lines, *more()):
            print(line, file=sys.stderr)
    sys.exit(stopped.code)


@contextmanager
def training_stopped(lines: Callable[[], list[str]]) -> Iterator[None]:
    """Recognise the signal behind what Lightning raises.

    Args:
        lines: Makes further lines to print.

    Yields:
        Nothing.

    Raises:
        StoppedError: If training was told to stop.
    """
    try:
        yield
    except (SystemExit, KeyboardInterrupt) as error:
        if isinstance(error, KeyboardInterrupt) or isinstance(error.__context__, KeyboardInterrupt):
            number = signal.SIGINT
        elif _handler.waiting:
            number, _handler.waiting = signal.SIGTERM, False
        else:
            raise
        raise StoppedError(number, lines()) from None


def check_stopped(*lines: str) -> None:
    """Stop now if a signal came when training could not stop any more: in its last batch or in the test.

    Args:
        *lines: Lines to print.

    Raises:
        StoppedError: If it did.
    """
    if _handler.waiting:
        _handler.waiting = False
        raise StoppedError(signal.SIGTERM, lines)
