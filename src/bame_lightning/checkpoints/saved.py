"""Which layers are sparse as a checkpoint says, in the state of a sparsity callback or in an export's metadata."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bame_lightning.blocks.masks import unpack_mask
from bame_lightning.blocks.pattern import NMPattern
from bame_lightning.checkpoints.files import Weights
from bame_lightning.checkpoints.untrusted import UnreadableError
from bame_lightning.weights.saved_state import AUDITABLE, VERSION_KEY

_TRAINED = ("state_dict", "model", "")
"""Keys of the trained weights; other sets are averages, or belong to other networks."""


def layers_in(weights: Weights) -> dict[str, Any] | None:
    """Find what a checkpoint says about its sparse layers.

    Args:
        weights: The weights that were read.

    Returns:
        Name of a weight -> its entry, not yet checked; None if the checkpoint says nothing about these weights.

    Raises:
        UnreadableError: If the entries are of another version, name no layers, or name one twice.
    """
    if weights.declared is not None:
        return dict(weights.declared)
    saved = saved_layers(weights.checkpoint)
    if saved is None:
        return None
    named = {weights.names.get(name, name): entry for name, entry in saved.items()}
    # A file that also holds a second network says nothing about that one.
    return named if weights.key in _TRAINED or named.keys() <= weights.tensors.keys() else None


def saved_layers(checkpoint: Mapping[Any, Any]) -> dict[str, Any] | None:
    """Find what sparsity callbacks saved about their layers.

    Args:
        checkpoint: Everything that a file holds.

    Returns:
        Name of a weight -> its saved entry, not yet checked; None if no sparsity callback saved anything.

    Raises:
        UnreadableError: If the state is of another version, names no layers, or names one twice.
    """
    callbacks = checkpoint.get("callbacks")
    values = callbacks.values() if isinstance(callbacks, Mapping) else ()
    states = [value for value in values if isinstance(value, Mapping) and VERSION_KEY in value]
    found: dict[str, Any] = {}
    for state in states:
        version, layers = state[VERSION_KEY], state.get("layers")
        # It may be anything: a tensor cannot be compared to a number.
        if repr(version) not in map(str, AUDITABLE):
            raise UnreadableError(
                f"has a callback state of `{VERSION_KEY}` {version!r:.20}, where this release reads {AUDITABLE[0]} to "
                f"{AUDITABLE[-1]}. "
                "Install the release of bame_lightning that wrote it."
            )
        if not isinstance(layers, Mapping) or not layers or not all(isinstance(name, str) for name in layers):
            raise UnreadableError("has a callback state that names no `layers`. Use a checkpoint as training wrote it.")
        if twice := found.keys() & layers.keys():
            raise UnreadableError(
                f"has two callback states that name `{min(twice)}`. Train with one sparsity callback."
            )
        found.update(layers)
    return found if states else None


def read_entry(
    name: str, entry: Any, state: Mapping[str, Tensor], *, masks: bool
) -> tuple[NMPattern, Tensor | None, bool]:
    """Check the entry of a layer.

    Args:
        name: Its weight.
        entry: The entry.
        state: All weights.
        masks: Whether the entry must hold a mask.

    Returns:
        Pattern, mask if there is one, and whether the input dimension is the first one.

    Raises:
        UnreadableError: If it is malformed, or does not fit the weight.
    """
    try:
        return _parse_entry(entry, state.get(name), masks)
    except ValueError as error:
        what = "a callback state" if masks else "metadata of an export"
        raise UnreadableError(
            f"has {what} whose layer `{name}` is malformed: {str(error).rstrip('.')}. Use a checkpoint as training wrote it."
        ) from None


def _parse_entry(entry: Any, weight: Tensor | None, masks: bool) -> tuple[NMPattern, Tensor | None, bool]:
    needed = ("pattern", "shape", "mask")[: 3 if masks else 2]
    if not isinstance(entry, Mapping) or not set(needed) <= set(entry):
        raise ValueError(f"it lacks {', '.join(f'`{key}`' for key in needed[:-1])} or `{needed[-1]}`")
    if weight is None:
        raise ValueError("the state dict has no such weight")
    shape, pattern = entry["shape"], NMPattern.parse(entry["pattern"])
    # By repr, because a value from a hostile file may not be comparable.
    if not isinstance(shape, list | tuple) or repr(list(shape)) != repr(list(weight.shape)):
        raise ValueError(f"its `shape` is {shape!r:.60}, where the weight has {list(weight.shape)}")
    # States of earlier releases have no transposed weights.
    transposed = entry.get("transposed", False)
    if not isinstance(transposed, bool) or (transposed and len(shape) != 2):
        raise ValueError(f"its `transposed` is {transposed!r:.20} for the shape {list(shape)}")
    if len(shape) < 2 or 0 in shape or indivisible(weight, pattern, transposed):
        raise ValueError(f"its shape {list(shape)} does not divide into blocks of the pattern {pattern}")
    if not masks:
        return pattern, None, transposed
    packed = entry["mask"]
    if not isinstance(packed, Tensor) or packed.dtype != torch.uint8 or packed.dim() != 1 or not _is_plain(packed):
        raise ValueError("its `mask` is not a vector of uint8")
    return pattern, unpack_mask(packed, weight.shape), transposed


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_meta


def indivisible(weight: Tensor, pattern: NMPattern, transposed: bool) -> str:
    """Say why a weight has no blocks of a pattern; empty if it has."""
    inputs = weight.shape[0 if transposed else 1]
    return f"{pattern.m} does not divide its input dimension {inputs}" if inputs % pattern.m else ""
