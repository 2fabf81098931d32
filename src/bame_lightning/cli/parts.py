"""The parts of a run that a configuration names: find them, also in the current folder, and give each its keys."""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hydra._internal.utils import _locate  # its public twin would log what is reported here
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf, open_dict

from bame_lightning.cli.errors import not_made, of_the_user
from bame_lightning.cli.values import close_keys, overridden, shown, standard_values


def find_here() -> None:
    """Let modules of the current folder be imported, after all installed ones; a console script would not look there."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)


def fitted(cfg: DictConfig) -> tuple[DictConfig, list[str]]:
    """Give every part of a configuration the keys that it takes; modules of the current folder are found.

    If the `_target_` of a part was replaced, keys of the replaced option that the new target does not take are left out.

    Args:
        cfg: The composed configuration.

    Returns:
        The configuration, and what was left out, in lines.

    Raises:
        ValueError: If a part does not exist, or is given a key that it does not take.
    """
    find_here()
    standard, fitting, lines = standard_values(), cfg.copy(), list[str]()
    with open_dict(fitting):
        for key, part in list(_parts(fitting)):
            takes = _keys(_target(key, part))
            if takes is None:
                continue
            replaced = OmegaConf.select(standard, f"{key}._target_") not in (None, part["_target_"])
            unknown = [str(name) for name in part if not str(name).startswith("_") and name not in takes]
            for name in unknown:
                if not replaced or not _left_over(f"{key}.{name}", cfg, standard):
                    raise ValueError(
                        f"`{key}.{name}` is no argument of {part['_target_']}. "
                        f"{close_keys(f'{key}.{name}', takes - set(_LATER.get(key, ())))}"
                    )
                del part[name]
            if unknown:
                lines.append(f"`{key}` {part['_target_']} takes no {', '.join(unknown)}: left out")
    return fitting, lines


_LATER = {"model": ("input_shape", "num_classes"), "optimizer": ("params",), "scheduler": ("optimizer", "total_steps")}
"""Arguments that a part gets when it is made, not from the configuration."""


def _parts(node: DictConfig, before: str = "") -> Iterator[tuple[str, DictConfig]]:
    for name in map(str, node):
        value = node._get_node(name)
        if isinstance(value, DictConfig) and not value._is_none() and not value._is_interpolation():
            if "_target_" in value:
                yield f"{before}{name}", value
            yield from _parts(value, f"{before}{name}.")


def _left_over(key: str, cfg: DictConfig, standard: DictConfig) -> bool:
    """Whether a value comes from the option whose target was replaced."""
    if any(key == other or (key.startswith(f"{other}.") and other.count(".")) for other in overridden()):
        return False
    return bool(OmegaConf.select(cfg, key) == OmegaConf.select(standard, key))


def _target(key: str, part: DictConfig) -> Any:
    path = str(part["_target_"])
    try:
        return _locate(path)
    except (InstantiationException, ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"`{key}._target_` must name something that can be imported; got {shown(path)}{_why(path, error)}"
        ) from None


def _why(path: str, error: Exception) -> str:
    """Say which part of a dotted path does not exist, and which does."""
    if not path:
        return "."
    module, _, name = path.rpartition(".")
    while module:
        try:
            there = importlib.import_module(module)
        except ModuleNotFoundError as missing:
            if missing.name is None or not f"{module}.".startswith(f"{missing.name}."):
                return f", where {module} needs {missing.name}, which is not installed."
        except Exception as broken:
            return f", whose module {module} fails: {type(broken).__name__}: {' '.join(str(broken).split())}."
        else:
            name = path.removeprefix(f"{module}.").partition(".")[0]
            close = difflib.get_close_matches(name, [other for other in vars(there) if not other.startswith("_")], 3)
            hint = f" Did you mean {', '.join(f'{module}.{other}' for other in close)}?" if close else ""
            return f", and {module} has no {name}.{hint}"
        module, _, name = module.rpartition(".")
    first = path.partition(".")[0]
    return f", and there is no module {first}, neither installed nor in the current folder {Path.cwd()}."


def _keys(target: Any) -> set[str] | None:
    """Names of the arguments that a target takes; None if it takes any, or they are unknown."""
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return {parameter.name for parameter in parameters if parameter.kind is not inspect.Parameter.VAR_POSITIONAL}


def made(name: str, make: Callable[..., Any], *arguments: Any, what: str, **options: Any) -> Any:
    """Make a part from arguments that the configuration does not hold.

    Args:
        name: Group that names the part.
        make: Makes it.
        *arguments: The arguments.
        what: Name of the arguments in messages.
        **options: Further arguments, by name.

    Returns:
        The part.

    Raises:
        ValueError: If the part takes other arguments, or cannot be made from these.
    """
    try:
        inspect.signature(make).bind(*arguments, **options)
    except TypeError as error:
        target = getattr(make, "func", make)
        path = f"{target.__module__}.{getattr(target, '__qualname__', target)}"
        raise ValueError(
            f"`{name}` {path} is called with ({what}), but {error}. A key of `{name}` can give it."
        ) from None
    try:
        return make(*arguments, **options)
    except Exception as error:
        if isinstance(error, OSError) or not (isinstance(error, TypeError) or of_the_user(error)):
            raise
        raise ValueError(not_made(name, error)) from error


def stepping(scheduler: Callable[..., Any]) -> Callable[[Any, int], Any]:
    """Let any schedule be made from an optimizer and the number of its steps, even if it does not take the number.

    Args:
        scheduler: Makes the schedule from the optimizer, or from both.

    Returns:
        A function that makes the schedule from both.
    """
    try:
        parameters = inspect.signature(scheduler).parameters
    except (TypeError, ValueError):
        return scheduler
    asks = "total_steps" in parameters

    def make(optimizer: Any, total_steps: int) -> Any:
        given = getattr(scheduler, "keywords", {})
        length = {"total_steps": total_steps} if asks and "total_steps" not in given else {}
        return made("scheduler", scheduler, optimizer, what="optimizer", **length)

    return make
