"""Read a checkpoint that anyone may have written: run no code from it, and say in a line what is wrong with it."""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_EXPECTED = "Give a Lightning checkpoint, or `torch.save(model.state_dict(), path)`."


class UnreadableError(ValueError):
    """The file holds no state dict that can be read safely."""


def load_untrusted(path: Path) -> Mapping[Any, Any]:
    """Load what `torch.save` wrote, tensors and plain types only, onto the CPU.

    Args:
        path: The file.

    Returns:
        Its top-level mapping.

    Raises:
        UnreadableError: If the file is missing, damaged or foreign, or refers to code.
    """
    if path.is_dir():
        raise UnreadableError("is a folder. Give the checkpoint file; consolidate a sharded checkpoint first.")
    if not path.is_file():
        raise UnreadableError(("is not a file" if path.exists() else "does not exist") + ". Check the path.")
    if path.stat().st_size == 0:
        raise UnreadableError("is empty. Copy or save the checkpoint again.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old formats and sparse tensors; nothing that a user must act on
            # Only the zip format can be mapped instead of read.
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    # A damaged or hostile file can fail in any way: IndexError, KeyError and EOFError have been seen.
    except Exception as error:
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            raise UnreadableError(
                f"refers to `{refused[1]}`, which may run code when loaded, so it was not loaded. If you trust the "
                "file, load it yourself and `torch.save` its state dict alone."
            ) from None
        raise UnreadableError(
            f"is damaged, or torch.save did not write it ({first_sentence(error)}). {_EXPECTED}"
        ) from None
    if not isinstance(loaded, Mapping):
        raise UnreadableError(f"holds no state dict but {type(loaded).__name__}. {_EXPECTED}")
    return loaded


def state_dict_of(checkpoint: Mapping[Any, Any]) -> dict[str, Tensor]:
    """Find the tensors of a model: under "state_dict" (Lightning), under "model", or at the top.

    Args:
        checkpoint: From `load_untrusted`.

    Returns:
        Name -> tensor. Entries that are not tensors, such as a module's extra state, are left out.

    Raises:
        UnreadableError: If there is no tensor, or an entry named `*weight` is not one.

    Example:
        >>> state_dict_of({"epoch": 3, "state_dict": {"fc.bias": torch.zeros(2)}})
        {'fc.bias': tensor([0., 0.])}
    """
    wrapped = (checkpoint[key] for key in ("state_dict", "model") if isinstance(checkpoint.get(key), Mapping))
    state = next(wrapped, checkpoint)
    for name, value in state.items():
        if isinstance(name, str) and name.endswith("weight") and not isinstance(value, Tensor):
            raise UnreadableError(f"has a `{name}` that is not a tensor but {type(value).__name__}. {_EXPECTED}")
    tensors = {name: value for name, value in state.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        raise UnreadableError(f"holds no tensors at the top, under 'state_dict' or under 'model'. {_EXPECTED}")
    return tensors


def load_weights(module: nn.Module, path: Path, argument: str) -> Mapping[Any, Any]:
    """Give a module the weights of a checkpoint of the same module.

    Args:
        module: The module.
        path: The file, as `load_untrusted` reads it.
        argument: What to call the file in messages.

    Returns:
        All that the file holds.

    Raises:
        ValueError: If the file cannot be read, or does not fit the module.
    """
    try:
        checkpoint = load_untrusted(path)
        module.load_state_dict(state_dict_of(checkpoint))
    except UnreadableError as error:
        raise ValueError(f"`{argument}` {path} {error}") from None
    except RuntimeError as error:
        raise ValueError(f"`{argument}` {path} does not fit the model: {' '.join(str(error).split())}") from None
    return checkpoint


def first_sentence(error: Exception) -> str:
    """Name an error in a line: its type, and its first sentence unless that is long.

    Args:
        error: From torch, whose messages run over many lines.

    Returns:
        Text without a final full stop.
    """
    sentence = re.split(r"[.\n]", str(error).strip())[0]
    return f"{type(error).__name__}: {sentence}" if 0 < len(sentence) <= 120 else type(error).__name__
