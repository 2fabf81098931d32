"""Commands whose arguments are overrides of a configuration."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import hydra
from omegaconf import DictConfig

from bame_lightning.cli.command import version
from bame_lightning.cli.conf import conf_dir
from bame_lightning.cli.errors import composition_errors
from bame_lightning.cli.interruption import stoppable
from bame_lightning.cli.jobs import unfinished
from bame_lightning.cli.words import check_dashes, readable


def hydra_command(name: str, config: str) -> Callable[[Callable[[DictConfig], Any]], Callable[[], Any]]:
    """Make a command of a function that takes a configuration, which Hydra composes from the command line.

    Args:
        name: Name of the command.
        config: Name of its configuration in `conf/`.

    Returns:
        A decorator.
    """

    def decorate(task: Callable[[DictConfig], Any]) -> Callable[[], Any]:
        compose = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=config)(task)

        @functools.wraps(task)
        def command() -> Any:
            if "--version" in sys.argv[1:]:  # Hydra would print its own
                print(version(name))
                return None
            check_dashes(name, sys.argv[1:])
            # First -m, on both sides of which argparse takes no values.
            sys.argv[1:] = sorted(readable(sys.argv[1:]), key=lambda word: word not in ("-m", "--multirun"))
            with stoppable(name, unfinished), composition_errors(name, config):
                return compose()

        return command

    return decorate
