"""The packed layout: of every block its N values, and where they lie as ceil(log2 M) bits each (`docs/export.md`)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Bool, Shaped, UInt8
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bame_lightning.blocks import from_blocks, oriented, to_blocks
from bame_lightning.export.errors import ExportError
from bame_lightning.export.trained import Trained
from bame_lightning.masks import pack_mask, unpack_mask
from bame_lightning.pattern import NMPattern

FORMAT = "bame_lightning.packed"
VERSION = "1"
VALUES, INDICES = ".nm_values", ".nm_indices"


def index_bits(m: int) -> int:
    """Bits that the position in a block takes, ceil(log2 m).

    Args:
        m: Weights in a block.

    Returns:
        The bits; 0 for blocks of a single weight.

    Example:
        >>> [index_bits(m) for m in (1, 2, 4, 5, 16)]
        [0, 1, 2, 3, 4]
    """
    return (m - 1).bit_length()


def pack_weight(
    weight: Shaped[Tensor, "out inp *kernel"], kept: Bool[Tensor, "out inp *kernel"], pattern: NMPattern
) -> tuple[Shaped[Tensor, "blocks n"], UInt8[Tensor, " bytes"]]:
    """Store the kept weights of every block and their positions.

    Args:
        weight: The weight, with zeros where pruned.
        kept: True at exactly N weights of every block, zeros among them or not.
        pattern: Its pattern.

    Returns:
        Kept values, shape (blocks, N), by position in their block; the positions, each `index_bits(M)` bits from the
        lowest up, one after the other from the lowest bit of the first byte, the last byte filled up with zeros.

    Raises:
        ValueError: If the mask does not keep exactly N, or a non-zero lies outside of it.

    Example:
        >>> weight = torch.tensor([[0.0, 5.0, 0.0, 6.0]])
        >>> values, indices = pack_weight(weight, weight != 0, NMPattern(2, 4))
        >>> values, indices.item() == 0b11_01
        (tensor([[5., 6.]]), True)
    """
    blocks, mask = to_blocks(weight.detach(), pattern.m), to_blocks(kept, pattern.m)
    if (mask.sum(-1) != pattern.n).any():
        raise ValueError(f"`kept` must keep exactly {pattern.n} of every {pattern.m} weights.")
    if ((blocks != 0) & ~mask).any():
        raise ValueError("`weight` must be zero where `kept` is False.")
    index = mask.nonzero()[:, 1].view(-1, pattern.n)
    values = blocks[mask].view(-1, pattern.n)
    width = index_bits(pattern.m)
    if width == 0:
        return values, torch.empty(0, dtype=torch.uint8)
    bits = index.to(torch.int32)[..., None] >> torch.arange(width, dtype=torch.int32) & 1
    return values, pack_mask(bits.bool())


def unpack_weight(
    values: Shaped[Tensor, "blocks n"], indices: UInt8[Tensor, " bytes"], pattern: NMPattern, shape: torch.Size
) -> Shaped[Tensor, "out inp *kernel"]:
    """Undo `pack_weight`.

    Args:
        values: Kept values of every block.
        indices: Their positions, packed.
        pattern: Pattern of the weight.
        shape: Its shape, (out, in, *kernel).

    Returns:
        The weight, contiguous, zero where pruned.

    Raises:
        ValueError: If the sizes do not fit together, or a position lies outside of its block.
    """
    if values.numel() * pattern.m != shape.numel() * pattern.n or values.shape[-1] != pattern.n:
        raise ValueError(f"{tuple(values.shape)} values do not make a {pattern} weight of shape {tuple(shape)}.")
    width = index_bits(pattern.m)
    bits = unpack_mask(indices, torch.Size((*values.shape, width)))
    index = (bits.to(torch.int64) << torch.arange(width)).sum(-1)
    if (index >= pattern.m).any():
        raise ValueError(f"A position lies outside of its block of {pattern.m} weights.")
    blocks = values.new_zeros(len(values), pattern.m)
    # Indexing copies bits, where `scatter` gives a NaN another payload and knows no types of eight bits.
    blocks[torch.arange(len(values))[:, None], index] = values
    return from_blocks(blocks, shape).contiguous()


def packed_tensors(trained: Trained) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Lay out a trained model for a packed file.

    Args:
        trained: The model.

    Returns:
        Tensors by name; the file's metadata.

    Raises:
        ExportError: If a name of the model means something else in the file.
    """
    tensors: dict[str, Tensor] = {}
    layers = {}
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
        layers[name] = {"pattern": str(pattern), "shape": list(tensor.shape)} | (
            {"transposed": True} if transposed else {}
        )
    return tensors, {
        "format": FORMAT,
        "version": VERSION,
        "layers": json.dumps(layers),
        "same_as": json.dumps(dict(trained.same_as)),
    }


def read_packed(path: Path) -> dict[str, Tensor]:
    """Read a packed file back to a state dict, with zeros where weights are pruned.

    Args:
        path: The file.

    Returns:
        The dense state dict.

    Raises:
        ExportError: If the file is none that `bame-export --format packed` wrote.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata: Mapping[str, str] = file.metadata() or {}
            # Metadata first: what they say decides whether tensors are looked at.
            if (metadata.get("format"), metadata.get("version")) != (FORMAT, VERSION):
                raise ExportError(
                    f"is not in the format {FORMAT}, version {VERSION}, but "
                    f"{metadata.get('format')!r:.40}, {metadata.get('version')!r:.10}. Write it with this release's "
                    "`bame-export --format packed`."
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 it is no dictionary
        for name, layer in json.loads(metadata["layers"]).items():
            pattern, transposed = NMPattern.parse(layer["pattern"]), layer.get("transposed", False)
            shape = torch.Size(reversed(layer["shape"]) if transposed else layer["shape"])
            weight = unpack_weight(tensors.pop(name + VALUES), tensors.pop(name + INDICES), pattern, shape)
            tensors[name] = oriented(weight, transposed).contiguous()
        return tensors | {alias: tensors[name] for alias, name in json.loads(metadata["same_as"]).items()}
    except ExportError as error:
        raise ExportError(f"`{path}` {error}") from None
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ExportError(f"`{path}` is damaged ({type(error).__name__}: {error}). Export it again.") from error
