"""Snapshots of masks over a run: bounded maps of every layer, in one small file."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from bame_lightning.checkpoints.replacing import replacing
from bame_lightning.show.maps import block_map, mask_map
from bame_lightning.weights.layers import SparseWeight

FILE = "snapshots.npz"
_VERSION = 1


@dataclass(frozen=True)
class Layer:
    """What stays the same in all snapshots of a layer.

    Args:
        label: Its name.
        pattern: "N:M".
        filters: Output dimension of the weight.
        positions: Weights of a filter.
        freezes: Whether blocks may freeze.
    """

    label: str
    pattern: str
    filters: int
    positions: int
    freezes: bool

    @property
    def m(self) -> int:
        """Weights in a block."""
        return int(self.pattern.split(":")[1])


@dataclass(frozen=True)
class LayerMaps:
    """A layer at one moment.

    Args:
        mask: As `maps.mask_map` makes it.
        oscillations: Oscillations so far, as `maps.block_map` makes them; None where a method does not count them.
        frozen: Share of frozen blocks, alike.
    """

    mask: Bool[Tensor, "filters positions"]
    oscillations: Float[Tensor, "rows columns"] | None = None
    frozen: Float[Tensor, "rows columns"] | None = None


@dataclass
class Snapshots:
    """All snapshots of a run, in order of time.

    Args:
        layers: The sparse layers.
        steps: Optimizer steps done at each snapshot.
        adaptations: Adaptations of the masks done; None where a method has no schedule.
        maps: For each snapshot the maps of all layers.
    """

    layers: list[Layer] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    adaptations: list[int | None] = field(default_factory=list)
    maps: list[list[LayerMaps]] = field(default_factory=list)

    def add(self, steps: int, adaptations: int | None, maps: list[LayerMaps]) -> None:
        """Append a snapshot, in place of one after as many steps."""
        self.drop_after(steps - 1)
        self.steps.append(steps)
        self.adaptations.append(adaptations)
        self.maps.append(maps)

    def drop_after(self, steps: int) -> None:
        """Forget what came after so many steps, which a resumed run takes again."""
        count = sum(step <= steps for step in self.steps)
        for values in (self.steps, self.adaptations, self.maps):
            del values[count:]

    def to_bytes(self) -> bytes:
        """Contents of a compressed npz file: masks as bits, block maps in half precision."""
        head = {
            "version": _VERSION,
            "steps": self.steps,
            "adaptations": self.adaptations,
            "layers": [vars(layer) for layer in self.layers],
        }
        arrays: dict[str, Any] = {"head": np.frombuffer(json.dumps(head).encode(), np.uint8)}
        for index, _ in enumerate(self.layers):
            maps = [snapshot[index] for snapshot in self.maps]
            if not maps:
                continue
            masks = torch.stack([one.mask for one in maps]).numpy()
            arrays[f"shape/{index}"] = np.array(masks.shape)
            arrays[f"mask/{index}"] = np.packbits(masks)
            for name in ("oscillations", "frozen"):
                found = [getattr(one, name) for one in maps]
                if all(values is not None for values in found):
                    arrays[f"{name}/{index}"] = torch.stack(found).numpy().astype(np.float16)
        file = io.BytesIO()
        np.savez_compressed(file, **arrays)
        return file.getvalue()

    @classmethod
    def from_bytes(cls, contents: bytes) -> Snapshots:
        """Undo `to_bytes`, but for the precision.

        Raises:
            ValueError: If the contents are something else.
        """
        try:
            with np.load(io.BytesIO(contents), allow_pickle=False) as archive:
                return cls._read({name: archive[name] for name in archive.files})
        except (BadZipFile, KeyError, EOFError, TypeError, ValueError) as error:
            raise ValueError(f"not snapshots of version {_VERSION} ({error})") from None

    @classmethod
    def _read(cls, arrays: Mapping[str, Any]) -> Snapshots:
        head = json.loads(arrays["head"].tobytes())
        if head["version"] != _VERSION:
            raise ValueError(f"version {head['version']}")
        found = cls([Layer(**layer) for layer in head["layers"]], head["steps"], head["adaptations"])
        found.maps = [[] for _ in found.steps]
        for index in range(len(found.layers) if found.steps else 0):
            shape = arrays[f"shape/{index}"]
            masks = np.unpackbits(arrays[f"mask/{index}"], count=int(shape.prod())).reshape(shape).astype(bool)
            blocks = [arrays.get(f"{name}/{index}") for name in ("oscillations", "frozen")]
            for time, maps in enumerate(found.maps):
                rest = [None if all_ is None else torch.from_numpy(all_[time].astype(np.float32)) for all_ in blocks]
                maps.append(LayerMaps(torch.from_numpy(masks[time]), *rest))
        return found


def layer_of(sparse: SparseWeight, *, freezes: bool) -> Layer:
    """Describe a sparse weight."""
    filters = len(sparse.kept)
    return Layer(sparse.label, str(sparse.pattern), filters, sparse.kept.numel() // filters, freezes)


def layer_maps(
    sparse: SparseWeight,
    oscillations: Shaped[Tensor, " blocks"] | None = None,
    frozen: Bool[Tensor, " blocks"] | None = None,
) -> LayerMaps:
    """Make the maps of a sparse weight.

    Args:
        sparse: The weight and its mask.
        oscillations: Oscillations per block, if they are counted.
        frozen: True where frozen, if blocks may freeze.

    Returns:
        Maps in main memory.
    """
    filters = len(sparse.kept)
    blocks = [None if values is None else block_map(values, filters).cpu() for values in (oscillations, frozen)]
    return LayerMaps(mask_map(sparse.kept, sparse.pattern.m).cpu(), *blocks)


def read_snapshots(folder: Path) -> Snapshots | None:
    """Read the snapshots of a run.

    Args:
        folder: The run's folder.

    Returns:
        The snapshots; None if the run has recorded none.

    Raises:
        ValueError: If the file cannot be read.
    """
    path = folder / FILE
    try:
        return Snapshots.from_bytes(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path} is {error}. Remove it to go on without maps.") from None


def write_snapshots(contents: bytes, path: Path) -> None:
    """Write a file so that a reader sees either the old or the new contents, never a part.

    Args:
        contents: What `Snapshots.to_bytes` returned.
        path: The file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        part.write_bytes(contents)
