"""The packed layout of a model: which tensors and metadata a file holds (`docs/export.md`)."""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor

from bame_lightning.blocks.layout import oriented
from bame_lightning.checkpoints.export.trained import ExportError, Trained, layers_of
from bame_lightning.checkpoints.files.exported import INDICES, PACKED, VALUES, VERSION, expanded
from bame_lightning.checkpoints.files.packing import pack_weight, unpack_weight
from bame_lightning.checkpoints.files.read import read_safetensors
from bame_lightning.checkpoints.untrusted import UnreadableError

__all__ = ["pack_weight", "packed_tensors", "read_packed", "unpack_weight"]


def packed_tensors(trained: Trained) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Lay out a trained model for a packed file.

    Args:
        trained: The model.

    Returns:
        Tensors by name; the file's metadata.

    Raises:
        ExportError: If the file needs a name of the model for something else.
    """
    tensors: dict[str, Tensor] = {}
    for name, tensor in trained.tensors.items():
        pattern = trained.patterns.get(name)
        if pattern is None:
            tensors[name] = tensor
            continue
        for part in (name + VALUES, name + INDICES):
            if part in trained.tensors:
                raise ExportError(f"holds a tensor `{part}`, a name that the packed layout needs. Rename it.")
        transposed = name in trained.transposed
        weight, kept = oriented(tensor, transposed), oriented(trained.kept[name], transposed)
        tensors[name + VALUES], tensors[name + INDICES] = pack_weight(weight, kept, pattern)
    return tensors, {
        "format": PACKED,
        "version": VERSION,
        "layers": json.dumps(layers_of(trained)),
        "same_as": json.dumps(dict(trained.same_as)),
    }


def read_packed(path: Path) -> dict[str, Tensor]:
    """Read a packed file back to a state dict, with zeros where weights are pruned.

    Args:
        path: The file.

    Returns:
        The dense state dict.

    Raises:
        ExportError: If `bame-export --format packed` did not write the file.
    """
    try:
        tensors, metadata = read_safetensors(path)
        if (metadata.get("format"), metadata.get("version")) != (PACKED, VERSION):
            raise UnreadableError(
                f"is not in the format {PACKED}, version {VERSION}, but "
                f"{metadata.get('format')!r:.40}, {metadata.get('version')!r:.10}. Write it with this release's "
                "`bame-export --format packed`."
            )
        return expanded(tensors, metadata)
    except UnreadableError as error:
        raise ExportError(f"`{path}` {error}") from None
