"""The files that `bame-export` writes: recognise them, expand them to dense weights, and read which layers are sparse."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bame_lightning.blocks.layout import oriented
from bame_lightning.blocks.pattern import NMPattern
from bame_lightning.checkpoints.files.packing import unpack_weight
from bame_lightning.checkpoints.untrusted import UnreadableError

PACKED, SEMI_STRUCTURED = "bame_lightning.packed", "bame_lightning.semi_structured"
VERSION = "1"
VALUES, INDICES = ".nm_values", ".nm_indices"
HALF, META = ".packed", ".meta"
LAYERS = "nm_layers"
"""Key of the metadata that names every sparse layer of a file if `layers` does not."""


def expanded(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
    """Expand the tensors of a packed or semi-structured file to a dense state dict.

    Args:
        tensors: Tensors of a safetensors file.
        metadata: Its metadata.

    Returns:
        The state dict, with zeros where weights are pruned; the tensors themselves if the file is of another kind.

    Raises:
        UnreadableError: If the file is of another version, or tensors and metadata do not fit.
    """
    found, kind = dict(tensors), metadata.get("format")
    if kind not in (PACKED, SEMI_STRUCTURED):
        return found
    if metadata.get("version") != VERSION:
        raise UnreadableError(
            f"is of version {metadata.get('version')!r:.10} of {kind}. Read it with the release that wrote it."
        )
    unpack = _packed if kind == PACKED else _semi_structured
    try:
        for name, layer in json.loads(metadata["layers"]).items():
            found[name] = unpack(found, name, layer)
        return found | {alias: found[name] for alias, name in json.loads(metadata["same_as"]).items()}
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UnreadableError(f"is damaged ({type(error).__name__}: {error}). Export it again.") from error


def declared_layers(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """Read which layers a file says are sparse.

    Args:
        metadata: Metadata of a safetensors file.

    Returns:
        Name -> "pattern", "shape" and, if the weight is, "transposed", not yet checked; None if the file does not say.

    Raises:
        UnreadableError: If the metadata are damaged.
    """
    text = metadata.get(LAYERS) or (metadata.get("layers") if metadata.get("format") == PACKED else None)
    if text is None:
        return None
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UnreadableError("has damaged metadata of its layers. Export it again.")
    return found


def _packed(tensors: dict[str, Tensor], name: str, layer: Mapping[str, Any]) -> Tensor:
    pattern, transposed = NMPattern.parse(layer["pattern"]), layer.get("transposed", False)
    shape = torch.Size(reversed(layer["shape"]) if transposed else layer["shape"])
    weight = unpack_weight(tensors.pop(name + VALUES), tensors.pop(name + INDICES), pattern, shape)
    return oriented(weight, transposed).contiguous()


def _semi_structured(tensors: dict[str, Tensor], name: str, layer: Mapping[str, Any]) -> Tensor:
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass as dense

    return dense(tensors.pop(name + HALF), tensors.pop(name + META))  # type: ignore[no-any-return, no-untyped-call]
