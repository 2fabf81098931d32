"""Read the weights of a file or a folder, whoever wrote it, and say what was not read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bame_lightning.checkpoints.files.distributed import METADATA, read_distributed
from bame_lightning.checkpoints.files.exported import declared_layers, expanded
from bame_lightning.checkpoints.files.sets import choose, plain_names
from bame_lightning.checkpoints.files.shards import other_shards, read_index
from bame_lightning.checkpoints.untrusted import EXPECTED, StandIn, UnreadableError, first_sentence, load_untrusted

_INDEX = ("*.safetensors.index.json", "*.bin.index.json", "*.index.json")
_ALONE = ("*.safetensors", "*.bin", "*.ckpt", "*.pt", "*.pth")
_ADAPTER = "adapter_config.json"
_LIGHTNING = "pytorch-lightning_version"


@dataclass(frozen=True)
class Weights:
    """One set of weights, and what else the file holds.

    Args:
        tensors: Plain name -> tensor.
        names: Name in the file -> plain name.
        key: Their key in the file; empty if they are at its top.
        checkpoint: Everything that the file holds.
        declared: Sparse layers that the metadata of an export name; None if the file is no export.
        dropped: Wrappers that were dropped from names.
        unread: In words, what was not read.
    """

    tensors: Mapping[str, Tensor]
    names: Mapping[str, str]
    key: str
    checkpoint: Mapping[Any, Any]
    declared: Mapping[str, Any] | None = None
    dropped: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()

    @property
    def lightning(self) -> bool:
        """Whether Lightning wrote them."""
        return _LIGHTNING in self.checkpoint


def read_weights(path: Path, key: str | None = None) -> Weights:
    """Read one set of weights; code inside a file is never run.

    Args:
        path: A file of torch.save or safetensors, an index of shards, or a folder: a distributed checkpoint, shards with their
            index, or a single file of weights.
        key: Which set, if a file holds several; None takes "state_dict", else "model", else the only one.

    Returns:
        The weights.

    Raises:
        UnreadableError: If they cannot be read. The message continues a sentence that begins with the path.
    """
    checkpoint, declared, unread = _contents(path)
    chosen, sets = choose(checkpoint, key)
    names, dropped = plain_names(sets[chosen])
    unread += [f"'{other}' ({len(sets[other])} tensors; --key '{other}')" for other in sets if other != chosen]
    unread += [f"'{name}' ({value.told})" for name, value in checkpoint.items() if isinstance(value, StandIn)]
    unread += [f"'{name}'" for name in sets[chosen] if name not in names]
    tensors = {plain: sets[chosen][name] for name, plain in names.items()}
    return Weights(tensors, names, chosen, checkpoint, declared, dropped, tuple(unread))


def load_weights(module: nn.Module, path: Path, argument: str) -> Mapping[Any, Any]:
    """Give a module the weights of a checkpoint of the same module, compiled and wrapped or not.

    Args:
        module: The module.
        path: What `read_weights` reads.
        argument: Name of the file's argument in messages.

    Returns:
        All that the file holds.

    Raises:
        ValueError: If the file cannot be read, or does not fit the module.
    """
    try:
        weights = read_weights(path)
        theirs, _ = plain_names(module.state_dict())
        own = {plain: name for name, plain in theirs.items()}
        module.load_state_dict({own.get(name, name): tensor for name, tensor in weights.tensors.items()})
    except UnreadableError as error:
        raise ValueError(f"`{argument}` {path} {error}") from None
    except RuntimeError as error:
        raise ValueError(f"`{argument}` {path} does not fit the model: {' '.join(str(error).split())}") from None
    return weights.checkpoint


def _contents(path: Path) -> tuple[Mapping[Any, Any], Mapping[str, Any] | None, list[str]]:
    """Read everything that a path holds, the sparse layers that it names, and what was left out."""
    if path.is_dir():
        return _folder(path)
    if path.is_file() and path.name.endswith(".index.json"):
        return read_index(path, lambda shard: _contents(shard)[0]), None, []
    alone = other_shards(path)
    unread = [alone] if alone else []
    if _is_safetensors(path):
        tensors, metadata = read_safetensors(path)
        return expanded(tensors, metadata), declared_layers(metadata), unread
    return load_untrusted(path), None, unread


def _folder(path: Path) -> tuple[Mapping[Any, Any], Mapping[str, Any] | None, list[str]]:
    if (path / METADATA).is_file():
        return read_distributed(path), None, []
    if (path / _ADAPTER).is_file():
        raise UnreadableError(
            f"is a folder of an adapter ({_ADAPTER}), whose product is added to the weights of a base model. Merge it into the "
            "base model (in peft `merge_and_unload`), and save that."
        )
    for glob in _INDEX:
        if len(found := sorted(path.glob(glob))) == 1:
            return _contents(found[0])
    for glob in _ALONE:
        if len(found := sorted(path.glob(glob))) == 1:
            contents, declared, unread = _contents(found[0])
            others = sorted({other.name for one in _ALONE for other in path.glob(one)} - {found[0].name})
            return contents, declared, [*unread, *others]
    there = sorted(str(file.relative_to(path)) for glob in _ALONE for file in path.rglob(glob))
    holds = (
        f"It holds {', '.join(there[:5])}{', ...' if len(there) > 5 else ''}: give one of them." if there else EXPECTED
    )
    raise UnreadableError(f"is a folder without `{METADATA}`, an index of shards, or a single file of weights. {holds}")


def _is_safetensors(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(9)
    return head[8:] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file as it is.

    Args:
        path: The file.

    Returns:
        Tensors by name, and the file's metadata.

    Raises:
        UnreadableError: If it is damaged.
    """
    # Training imports this module, and must not import what Lightning does not.
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 no dictionary
    except (SafetensorError, RuntimeError, KeyError) as error:
        raise UnreadableError(f"is damaged ({first_sentence(error)}). Copy or export it again.") from None
