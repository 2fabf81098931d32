"""What a user did wrong, told in one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException, HydraException, InstantiationException
from hydra.types import RunMode
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf.errors import OmegaConfBaseException

_USER_ERRORS = (ValueError, FileNotFoundError, HydraException, OmegaConfBaseException, MisconfigurationException)


@contextmanager
def one_line_errors(command: str) -> Iterator[None]:
    """Turn an error that a wrong value causes into one line on stderr and exit status 1.

    In a sweep the other jobs still run, and Hydra reports the error at the end. `HYDRA_FULL_ERROR=1` leaves errors as
    they are.

    Args:
        command: Name to print before the message.

    Yields:
        Nothing.
    """
    try:
        yield
    except _USER_ERRORS as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        # Hydra wraps what a constructor raises into lines about the call; what is wrong stands in the cause.
        wrapped = isinstance(error, InstantiationException) and isinstance(error.__cause__, _USER_ERRORS)
        message = f"{command}: error: {' '.join(str(error.__cause__ if wrapped else error).split())}"
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            raise CompactHydraException(message) from error
        print(message, file=sys.stderr)
        sys.exit(1)
