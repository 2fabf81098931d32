"""Read a checkpoint from anywhere: run no code from it, and say in one line what is wrong with it."""

from __future__ import annotations

import re
import sys
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.serialization import safe_globals

EXPECTED = "Give a Lightning checkpoint, or `torch.save(model.state_dict(), path)`."


# Some names in these modules run code. So only classes that are often saved beside weights are let in, as stand-ins.
_HARMLESS = re.compile(
    r"(argparse|collections|dataclasses|datetime|decimal|enum|fractions|pathlib|types|typing|uuid|torch\.nn|torch\.optim)\..+|"
    r"builtins\.(bool|bytes|complex|dict|float|frozenset|int|list|object|range|set|slice|str|tuple)"
)
_POWERFUL = {*sys.stdlib_module_names, "__builtin__", "torch"}
_MOST = 200
"""Classes that a file may refer to."""


class UnreadableError(ValueError):
    """The file holds no state dict that can be read safely."""


class StandIn:
    """Takes the place of an object that a file wants to make, such as a configuration; takes any arguments and does nothing."""

    told: ClassVar[str]
    """What it stands for, in words."""

    def __new__(cls, *args: Any, **kwargs: Any) -> StandIn:
        """Take anything."""
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def load_untrusted(path: Path) -> Mapping[Any, Any]:
    """Load a file of `torch.save` onto the CPU: tensors and plain types, and stand-ins for objects of other classes.

    Args:
        path: The file.

    Returns:
        Its top-level mapping.

    Raises:
        UnreadableError: If the file is missing, damaged, of another kind, or refers to something that can run code.
    """
    if path.is_dir():
        raise UnreadableError("is a folder. Give the checkpoint file; consolidate a sharded checkpoint first.")
    if not path.is_file():
        raise UnreadableError(("is not a file" if path.exists() else "does not exist") + ". Check the path.")
    if path.stat().st_size == 0:
        raise UnreadableError("is empty. Copy or save the checkpoint again.")
    try:
        loaded = _load(path)
    except UnreadableError:
        raise
    # A damaged or hostile file can fail in any way: IndexError, KeyError and EOFError have been seen.
    except Exception as error:
        raise UnreadableError(
            f"is damaged, or torch.save did not write it ({first_sentence(error)}). {EXPECTED}"
        ) from None
    if not isinstance(loaded, Mapping):
        kind = loaded.told if isinstance(loaded, StandIn) else type(loaded).__name__
        raise UnreadableError(f"holds no state dict but {kind}. {EXPECTED}")
    return loaded


def _load(path: Path) -> Any:
    """Load with torch's own restricted unpickler, which only makes tensors and stand-ins."""
    stand_ins: dict[str, type[StandIn]] = {}
    while True:
        try:
            with warnings.catch_warnings(), safe_globals([(kind, name) for name, kind in stand_ins.items()]):
                # Warnings are about old formats and sparse tensors, on which a user need not act.
                warnings.simplefilter("ignore")
                # Only the zip format can be mapped instead of read.
                return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except Exception as error:
            refused = re.search(r"GLOBAL (\S+)", str(error))
            if refused is None:
                if not stand_ins:
                    raise
                raise _refused(
                    next(reversed(stand_ins))
                ) from None  # such as a dictionary or list of a class of its own
            name = refused[1] if "." in refused[1] else f"builtins.{refused[1]}"  # which torch leaves out
            if name in stand_ins or len(stand_ins) == _MOST or not _may_stand_beside(name):
                raise _refused(name) from None
            stand_ins[name] = type(name.rpartition(".")[2], (StandIn,), {"told": f"an object of {name}"})


def _may_stand_beside(name: str) -> bool:
    return _HARMLESS.fullmatch(name) is not None or name.partition(".")[0] not in _POWERFUL


def _refused(name: str) -> UnreadableError:
    return UnreadableError(
        f"refers to `{name}`, which may run code when loaded, so it was not loaded. If you trust the "
        "file, load it yourself and `torch.save` its state dict alone."
    )


def first_sentence(error: Exception) -> str:
    """Name an error in a line: its type, and its first sentence unless that is long.

    Args:
        error: From torch, whose messages run over many lines.

    Returns:
        Text without a final full stop.

    Example:
        >>> first_sentence(TypeError("Two.forward() wants an argument. See there"))
        'TypeError: Two.forward() wants an argument'
    """
    sentence = re.split(r"\.\s|\n", str(error).strip())[0].rstrip(".")
    return f"{type(error).__name__}: {sentence}" if 0 < len(sentence) <= 120 else type(error).__name__
