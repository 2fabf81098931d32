"""The form of the state that a callback saves: its version, and masks restored from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from bame_lightning.blocks.layout import oriented, to_blocks
from bame_lightning.blocks.masks import unpack_mask
from bame_lightning.blocks.pattern import NMPattern
from bame_lightning.weights.layers import LayerPlan, SparseWeight

VERSION_KEY = "nm_sparsity_version"
"""Key that marks a callback's state as one of sparse weights."""
STATE_VERSION = 6
"""Version of that state: for each name in `layers` what `SparseWeight.state_dict` returns, and a method's own keys."""
AUDITABLE = range(1, STATE_VERSION + 1)
"""Versions whose layers, patterns and masks have the same form as now; the rest of the state has changed."""


def check_version(state: Mapping[str, Any], method: str) -> None:
    """Check that this release reads a state.

    Args:
        state: What a callback has saved.
        method: Name of the method in messages.

    Raises:
        ValueError: If this release cannot read it.
    """
    version = state.get(VERSION_KEY)
    if version != STATE_VERSION:
        raise ValueError(
            f"The checkpoint's {method} state has version {version!r}, this release reads {STATE_VERSION}."
            " Resume with the release that wrote it, or load the weights and start with `init='nonzero'`."
        )


def restore_masks(saved: Mapping[str, Any], plans: Sequence[LayerPlan], method: str) -> list[SparseWeight]:
    """Build masks from a checkpoint's state, or say which layers do not fit.

    Args:
        saved: What `SparseWeight.state_dict` has returned, by name.
        plans: For each weight of the model, whether it becomes sparse.
        method: Name of the method in messages.

    Returns:
        The sparse weights, in the order of the plans.

    Raises:
        ValueError: If other layers are sparse, or layers have another shape or pattern.
    """
    wanted = {
        plan.name: (str(plan.pattern), list(plan.weight.shape), plan.transposed) for plan in plans if plan.pattern
    }
    # States of earlier releases have no transposed weights.
    found = {
        name: (layer["pattern"], list(layer["shape"]), layer.get("transposed", False)) for name, layer in saved.items()
    }
    differing = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if differing:
        name = differing[0]
        raise ValueError(
            f"The masks of {method} in the checkpoint do not fit this model: {len(differing)} layers differ, the first is "
            f"`{name}`, which is {_describe(found.get(name))} in the checkpoint and {_describe(wanted.get(name))} here. Resume "
            "with the model, `pattern` and `layers` that wrote it, or load the weights and start a new run."
        )
    return [_restore(saved[plan.name], plan) for plan in plans if plan.pattern]


def saved_masks(saved: Mapping[str, Mapping[str, Any]], model: nn.Module) -> list[SparseWeight]:
    """Find the weights of a model for which a saved state holds masks; leave out the others.

    Args:
        saved: What `SparseWeight.state_dict` has returned, by name.
        model: The model.
    """
    plans = [
        LayerPlan(name, "", weight, NMPattern.parse(saved[name]["pattern"]), "", saved[name].get("transposed", False))
        for name, weight in model.named_parameters(remove_duplicate=False)
        if name in saved and list(weight.shape) == list(saved[name]["shape"])
    ]
    return [_restore(saved[plan.name], plan) for plan in plans]


def _restore(saved: Mapping[str, Any], plan: LayerPlan) -> SparseWeight:
    assert plan.pattern is not None
    mask, initial = (
        oriented(unpack_mask(saved[key].to(plan.weight.device), plan.weight.shape), plan.transposed)
        for key in ("mask", "initial")
    )
    sparse = SparseWeight.of(plan, to_blocks(mask, plan.pattern.m))
    sparse.set_initial(sparse.rows.own(initial))
    return sparse


def _describe(layer: tuple[str, list[int], bool] | None) -> str:
    if layer is None:
        return "not sparse"
    pattern, shape, transposed = layer
    return f"{pattern} of shape {tuple(shape)}{' (in, out)' * transposed}"
