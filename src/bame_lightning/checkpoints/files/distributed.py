"""Read folders of `torch.distributed.checkpoint` without using it: their metadata are a pickle, which could run code."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bame_lightning.checkpoints.files.shards import inside
from bame_lightning.checkpoints.untrusted import UnreadableError, first_sentence, load_untrusted

METADATA = ".metadata"
_REST = "meta.pt"  # where Lightning puts everything but tensors: the states of callbacks
_OPTIMIZER = "optim"  # not needed, and twice as large as the weights


class _Record:
    """Stands for any object of the metadata and holds the values that it was made of."""

    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> _Record:  # pickle does not always call `__init__`
        made = super().__new__(cls)
        made.args, made.state = args, {}
        return made

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.args, self.state = (state, {}) if isinstance(state, tuple) else ((), state)


class _Unpickler(pickle.Unpickler):
    """Makes only records and sizes, whatever class a file names, so that no code of a file is ever called."""

    def find_class(self, module: str, name: str) -> Any:
        kind = getattr(torch, name, None) if module == "torch" else None
        if isinstance(kind, torch.dtype) or kind is torch.Size:
            return kind
        return type(name, (_Record,), {})


def read_distributed(folder: Path) -> dict[str, Any]:
    """Read a distributed checkpoint: all tensors except those of optimizers, and the contents of Lightning's `meta.pt`.

    Args:
        folder: Holds `.metadata` and the files that it names.

    Returns:
        Nested as it was saved.

    Raises:
        UnreadableError: If something is damaged or missing.
    """
    try:
        with (folder / METADATA).open("rb") as file:
            metadata = _Unpickler(file).load().state
        tensors = {name: one for name, one in metadata["state_dict_metadata"].items() if "size" in one.state}
        chunks = _chunks(metadata["storage_data"])
        paths = metadata.get("planner_data") or {}
    except Exception as error:  # a pickle from anywhere can fail in any way
        raise UnreadableError(f"has a {METADATA} that is damaged ({first_sentence(error)}). Copy it again.") from None
    found: dict[str, Any] = {}
    for name, one in tensors.items():
        path = paths.get(name, (name,))
        if not str(path[0]).startswith(_OPTIMIZER):
            _put(found, path, _tensor(folder, name, one.state, chunks.get(name, [])))
    rest = load_untrusted(folder / _REST) if (folder / _REST).is_file() else {}
    return {**{key: value for key, value in rest.items() if key not in found}, **found}


def _chunks(storage: Mapping[Any, Any]) -> dict[str, list[tuple[tuple[int, ...], Mapping[str, Any]]]]:
    """Name of a tensor -> for each of its chunks, where it begins in the tensor and where it lies."""
    found: dict[str, list[tuple[tuple[int, ...], Mapping[str, Any]]]] = {}
    for index, place in storage.items():
        if index.state.get("offset") is not None:
            found.setdefault(index.state["fqn"], []).append((tuple(index.state["offset"]), place.state))
    return found


def _tensor(
    folder: Path, name: str, about: Mapping[str, Any], chunks: Iterable[tuple[tuple[int, ...], Mapping[str, Any]]]
) -> Tensor:
    try:
        whole = torch.empty(about["size"], dtype=about["properties"].args[0])
        filled = 0
        for offsets, place in chunks:
            part = _read(folder, place)
            where = tuple(slice(start, start + size) for start, size in zip(offsets, part.shape, strict=True))
            if whole[where].shape != part.shape:
                raise ValueError("a chunk lies outside")
            whole[where] = part
            filled += part.numel()
        if filled != whole.numel():
            raise ValueError("chunks are missing")
    except UnreadableError:
        raise
    except Exception as error:
        raise UnreadableError(
            f"holds `{name}`, which is damaged ({first_sentence(error)}). Copy the folder again."
        ) from None
    return whole


def _read(folder: Path, place: Mapping[str, Any]) -> Tensor:
    if place.get("transform_descriptors"):
        raise UnreadableError("is compressed by an extension. Save it without.")
    with inside(folder, place["relative_path"]).open("rb") as file:
        file.seek(place["offset"])
        part = torch.load(io.BytesIO(file.read(place["length"])), map_location="cpu", weights_only=True)
    if not isinstance(part, Tensor):
        raise ValueError("a chunk is no tensor")
    return part


def _put(found: dict[str, Any], path: Iterable[Any], value: Tensor) -> None:
    *above, last = path
    for key in above:
        found = found.setdefault(key, {})
    found[last] = value
