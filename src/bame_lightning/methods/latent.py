"""A dense latent weight behind a sparse one: the state of straight-through methods."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bame_lightning.blocks.layout import to_blocks
from bame_lightning.blocks.masks import zero_pruned_
from bame_lightning.weights.layers import SparseWeight


class LatentWeight:
    """The latent values of a sparse weight.

    Args:
        sparse: The weight, still dense, and its mask.

    Attributes:
        value: Latent values after the last update, shaped like the weight.
    """

    def __init__(self, sparse: SparseWeight) -> None:
        self.sparse = sparse
        self.value = sparse.values.clone()

    def add_decay(self, decay: float) -> None:
        """Add `decay` times the latent value to the gradient of every pruned weight."""
        gradient = self.sparse.gradient
        if gradient is not None:
            gradient.add_(self.value * self.sparse.pruned, alpha=decay)

    def expose(self) -> None:
        """Put the latent values of pruned weights into the parameter, for the optimizer to update.

        Kept weights stay as they are: others may have changed them since the last step, as an averaging callback does.
        """
        weight = self.sparse.values
        weight.copy_(torch.where(self.sparse.kept, weight, self.value))

    def take_back(self) -> None:
        """Take the updated values out of the parameter."""
        self.value.copy_(self.sparse.values)

    def hide(self) -> None:
        """Make the parameter sparse by the mask."""
        zero_pruned_(self.sparse.values, self.sparse.kept)

    def state_dict(self) -> dict[str, Any]:
        """Latent values of pruned weights (the model holds the others), in the row-major order of the weight."""
        # Every row has as many pruned weights as any other.
        return {"latent": self.sparse.rows.gather(self.value[self.sparse.pruned]).cpu().clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; mask and weight must have been restored before."""
        rows = self.sparse.rows
        self.value[self.sparse.pruned] = rows.own(state["latent"]).to(self.value)

    def blocks(self) -> Float[Tensor, "blocks m"]:
        """Latent values in blocks."""
        return to_blocks(self.value, self.sparse.pattern.m)
