"""2:4 weights in the form of torch's `SparseSemiStructuredTensorCUTLASS`, made without a GPU (`docs/export.md`)."""

from __future__ import annotations

import json

import torch
from jaxtyping import Int16, Shaped
from torch import Tensor
from torch.sparse import SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from bame_lightning.checkpoints.export.trained import ExportError, Trained, layers_of
from bame_lightning.checkpoints.files.exported import HALF, LAYERS, META, SEMI_STRUCTURED, VERSION

# Also compressed by torch, but left out: int8, which this project does not train, and float32, of which sparse tensor cores
# multiply 1:2 only (torch drops the second weight of a pair silently, and its `to_dense` changes bits).
_TYPES = (torch.float16, torch.bfloat16)


def why_not(weight: Shaped[Tensor, "out inp *kernel"]) -> str:
    """Say why torch cannot hold a weight in semi-structured form.

    Args:
        weight: The weight, with zeros where pruned.

    Returns:
        The reason; empty if it can.

    Example:
        >>> why_not(torch.tensor([0.0, 0.0, 1.0, 1.0]).half().tile(32, 16))
        ''
        >>> why_not(torch.tensor([0.0, 0.0, 1.0, 1.0]).tile(32, 16))
        'sparse tensor cores multiply 2:4 in half precision, not float32 (`--dtype float16` or bfloat16 rounds to it)'
    """
    if weight.dim() != 2:
        return f"torch multiplies matrices only, not {weight.dim()}-dimensional weights"
    if weight.dtype not in _TYPES:
        kind = str(weight.dtype).removeprefix("torch.")
        return f"sparse tensor cores multiply 2:4 in half precision, not {kind} (`--dtype float16` or bfloat16 rounds to it)"
    # torch's own table; a layer that breaks it is refused by the constructor on a GPU.
    limits = SparseSemiStructuredTensorCUTLASS._DTYPE_SHAPE_CONSTRAINTS[weight.dtype]
    rows, columns = limits.sparse_min_rows, limits.sparse_min_cols
    if weight.shape[0] % rows or weight.shape[1] % columns:
        return f"its shape {tuple(weight.shape)} is no multiple of ({rows}, {columns})"
    if ((weight.reshape(-1, 4) != 0).sum(-1) > 2).any():
        return "it has more than 2 non-zeros in 4 consecutive weights"
    return ""


def compress(
    weight: Shaped[Tensor, "out inp"],
) -> tuple[Shaped[Tensor, "out half"], Int16[Tensor, "out words"]]:
    """Compress a weight for which `why_not` is empty.

    Args:
        weight: The weight, with zeros where pruned.

    Returns:
        Two of every four values, shape (out, in / 2), and torch's metadata: where they lie.
    """
    packed, meta = sparse_semi_structured_from_dense_cutlass(weight.contiguous())  # type: ignore[no-untyped-call]
    return packed, meta


def semi_structured_tensors(trained: Trained) -> tuple[dict[str, Tensor], dict[str, str], dict[str, str]]:
    """Lay out a trained model for a semi-structured file.

    Args:
        trained: The model.

    Returns:
        Tensors by name; the file's metadata; the sparse weights that stay dense in the file, with the reasons.

    Raises:
        ExportError: If no weight fits, or the file needs a name of the model for something else.
    """
    reasons = {
        name: "it is stored as (in, out), where torch's are (out, in)"
        if name in trained.transposed
        else why_not(tensor)
        for name, tensor in trained.tensors.items()
        if name in trained.patterns
    }
    dense = {name: reason for name, reason in reasons.items() if reason}
    if len(dense) == len(reasons):
        told = "; ".join(f"{name}: {reason}" for name, reason in list(dense.items())[:3])
        raise ExportError(
            f"has no sparse weight that torch can hold in semi-structured form ({told}"
            f"{f'; {len(dense) - 3} more' if len(dense) > 3 else ''}). Use `--format packed`, which holds every pattern."
        )
    tensors: dict[str, Tensor] = {}
    layers = {}
    for name, tensor in trained.tensors.items():
        if reasons.get(name, "dense"):
            tensors[name] = tensor
            continue
        for part in (name + HALF, name + META):
            if part in trained.tensors:
                raise ExportError(f"holds a tensor `{part}`, a name that the semi-structured layout needs. Rename it.")
        tensors[name + HALF], tensors[name + META] = compress(tensor)
        layers[name] = {"pattern": str(trained.patterns[name]), "shape": list(tensor.shape)}
    metadata = {
        "format": SEMI_STRUCTURED,
        "version": VERSION,
        "layers": json.dumps(layers),
        LAYERS: json.dumps(layers_of(trained)),
        "same_as": json.dumps(dict(trained.same_as)),
    }
    return tensors, metadata, dense
