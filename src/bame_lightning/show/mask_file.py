"""Snapshots of masks over a run: bounded maps of every layer, in one small file."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from bame_lightning.show.maps import block_map, mask_map
from bame_lightning.weights.layers import SparseWeight

FILE = "snapshots.npz"
_VERSION = 2
MOST = 32
"""The largest number of oscillations that is counted apart; blocks with more are counted with it."""


@dataclass(frozen=True)
class Layer:
    """The part of a layer that is the same in all snapshots.

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
        oscillations: Oscillations so far of the blocks of the map; None if the method does not count them.
        frozen: Whether they are frozen; None if nothing freezes.
        tally: How many blocks of the whole layer have oscillated 0, 1, 2, ... times, the last one `MOST` times or more.
    """

    mask: Bool[Tensor, "filters positions"]
    oscillations: Int[Tensor, "filters columns"] | None = None
    frozen: Bool[Tensor, "filters columns"] | None = None
    tally: Int[Tensor, " times"] | None = None


@dataclass
class Trace:
    """The positions that one block kept, adaptation by adaptation.

    Args:
        label: Name of the layer.
        filter: Filter that the block belongs to.
        block: Its number within the filter.
        since: Adaptations done when the trace begins.
        oscillations: Oscillations of the block at the last look.
        kept: The mask of the block after `since`, `since` + 1, ... adaptations.
    """

    label: str
    filter: int
    block: int
    since: int
    oscillations: int
    kept: Bool[Tensor, "times m"]

    @property
    def title(self) -> str:
        """Say which block it is, and how often it oscillated."""
        times = "once" if self.oscillations == 1 else f"{self.oscillations:,} times"
        return f"{self.label}, filter {self.filter:,}, block {self.block:,}: oscillated {times}"

    @property
    def changes(self) -> int:
        """How often the mask of the block has changed in the trace."""
        return int((self.kept[1:] ^ self.kept[:-1]).any(-1).sum())

    @property
    def key(self) -> tuple[str, int, int]:
        """Which block it is."""
        return self.label, self.filter, self.block


@dataclass
class Snapshots:
    """All snapshots of a run, in order of time.

    Args:
        layers: The sparse layers.
        steps: Optimizer steps done at each snapshot.
        adaptations: Adaptations of the masks done; None if the method has no schedule.
        maps: For each snapshot the maps of all layers.
        traces: The blocks that oscillated most.
    """

    layers: list[Layer] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    adaptations: list[int | None] = field(default_factory=list)
    maps: list[list[LayerMaps]] = field(default_factory=list)
    traces: list[Trace] = field(default_factory=list)

    def add(self, steps: int, adaptations: int | None, maps: list[LayerMaps]) -> None:
        """Append a snapshot; it replaces one after the same number of steps."""
        self.drop_after(steps - 1)
        self.steps.append(steps)
        self.adaptations.append(adaptations)
        self.maps.append(maps)

    def drop_after(self, steps: int) -> None:
        """Forget what came after so many steps, because a resumed run takes them again."""
        count = sum(step <= steps for step in self.steps)
        for values in (self.steps, self.adaptations, self.maps):
            del values[count:]

    def to_bytes(self) -> bytes:
        """Contents of a compressed npz file, masks as bits."""
        head = {
            "version": _VERSION,
            "steps": self.steps,
            "adaptations": self.adaptations,
            "layers": [vars(layer) for layer in self.layers],
            "traces": [{**vars(trace), "kept": list(trace.kept.shape)} for trace in self.traces],
        }
        arrays: dict[str, Any] = {"head": np.frombuffer(json.dumps(head).encode(), np.uint8)}
        for index, _ in enumerate(self.layers):
            maps = [snapshot[index] for snapshot in self.maps]
            if not maps:
                continue
            masks = torch.stack([one.mask for one in maps]).numpy()
            arrays[f"shape/{index}"] = np.array(masks.shape)
            arrays[f"mask/{index}"] = np.packbits(masks)
            for name in _OF_BLOCKS:
                found = [getattr(one, name) for one in maps]
                if all(values is not None for values in found):
                    arrays[f"{name}/{index}"] = torch.stack(found).numpy()
        arrays |= {f"trace/{index}": np.packbits(trace.kept.numpy()) for index, trace in enumerate(self.traces)}
        file = io.BytesIO()
        np.savez_compressed(file, **arrays)
        return file.getvalue()

    @classmethod
    def from_bytes(cls, contents: bytes) -> Snapshots:
        """Undo `to_bytes`.

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
            masks = _bits(arrays[f"mask/{index}"], shape.tolist())
            blocks = {name: arrays[f"{name}/{index}"] for name in _OF_BLOCKS if f"{name}/{index}" in arrays}
            for time, maps in enumerate(found.maps):
                rest = {name: torch.from_numpy(values[time]) for name, values in blocks.items()}
                maps.append(LayerMaps(mask=masks[time], **rest))
        for index, trace in enumerate(head["traces"]):
            found.traces.append(Trace(**{**trace, "kept": _bits(arrays[f"trace/{index}"], trace["kept"])}))
        return found


_OF_BLOCKS = ("oscillations", "frozen", "tally")


def _bits(packed: Any, shape: Sequence[int]) -> Bool[Tensor, ...]:
    return torch.from_numpy(np.unpackbits(packed, count=int(np.prod(shape))).reshape(shape).astype(bool))


def most_restless(traces: Sequence[Trace], at_most: int = 8) -> list[Trace]:
    """Choose the blocks that oscillated most; among equals, those with the longest trace."""
    return sorted(traces, key=lambda trace: (-trace.oscillations, -trace.changes))[:at_most]


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
    filters, m = len(sparse.kept), sparse.pattern.m
    cut = [None if values is None else block_map(values, filters, m).cpu() for values in (oscillations, frozen)]
    tally = None if oscillations is None else oscillations.clamp_max(MOST).bincount(minlength=MOST + 1).cpu()
    return LayerMaps(mask_map(sparse.kept, m).cpu(), cut[0], cut[1], tally)


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
