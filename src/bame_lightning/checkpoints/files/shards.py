"""Weights in several files, with an index that says which file holds which weight."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bame_lightning.checkpoints.untrusted import UnreadableError

_SHARD = re.compile(r"-0*(\d+)-of-0*(\d+)\.")


def read_index(path: Path, read: Callable[[Path], Mapping[str, Any]]) -> dict[str, Any]:
    """Read all the shards that an index names, from the index's own folder only.

    Args:
        path: The index, `*.index.json`, with a "weight_map" of names to files.
        read: Reads one shard.

    Returns:
        All weights of the index.

    Raises:
        UnreadableError: If the index is malformed, or a shard or a weight is missing.
    """
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        places = {str(name): str(file) for name, file in index["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnreadableError(f"is no index of shards ({type(error).__name__}): it lacks a `weight_map`.") from None
    found: dict[str, Any] = {}
    for file in dict.fromkeys(places.values()):
        shard = inside(path.parent, file)
        try:
            weights = read(shard)
        except UnreadableError as error:
            raise UnreadableError(f"names the shard {file}, which {error}") from None
        missing = [name for name, place in places.items() if place == file and name not in weights]
        if missing:
            raise UnreadableError(
                f"names `{missing[0]}` in the shard {file}, which does not hold it. Download it again."
            )
        found |= {name: weights[name] for name, place in places.items() if place == file}
    return found


def inside(folder: Path, file: str) -> Path:
    """Find a file that another file of its folder names; that file may be hostile.

    Args:
        folder: The folder.
        file: Name of the file.

    Returns:
        Its path.

    Raises:
        UnreadableError: If the name leads out of the folder, or there is no such file.
    """
    if Path(file).name != file:
        raise UnreadableError(f"names the file {file!r:.60}, which does not lie in its own folder, so it was not read.")
    if not (folder / file).is_file():
        raise UnreadableError(f"needs the file {file}, which is not in {folder}. Copy or download all files.")
    return folder / file


def other_shards(path: Path) -> str:
    """Say what a shard that is read alone leaves out.

    Args:
        path: The file.

    Returns:
        A phrase; empty if its name is not that of a shard.

    Example:
        >>> other_shards(Path("model-00002-of-00003.safetensors"))
        'the other 2 of 3 shards (give the index or the folder to read all)'
    """
    found = _SHARD.search(path.name)
    if found is None or int(found[2]) < 2:
        return ""
    return f"the other {int(found[2]) - 1} of {found[2]} shards (give the index or the folder to read all)"
