"""A dense latent weight behind a sparse one: the state of straight-through methods."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bame_lightning.blocks.layout import to_blocks
from bame_lightning.blocks.masks import zero_pruned_
from bame_lightning.blocks.statistics import flipped_positions
from bame_lightning.weights.layers import SparseWeight


class LatentWeight:
    """The latent values of a sparse weight.

    Args:
        sparse: The weight, still dense, and its mask.

    Attributes:
        value: Latent values as of the last update, shaped like the weight.
        flips: Mask positions changed so far; scalar.
        last_flips: Those that the last step changed; scalar.
    """

    def __init__(self, sparse: SparseWeight) -> None:
        self.sparse = sparse
        self.value = sparse.values.clone()
        self.flips = torch.zeros((), dtype=torch.int64, device=self.value.device)
        self.last_flips = torch.zeros((), dtype=torch.int64, device=self.value.device)

    def add_decay(self, decay: float) -> None:
        """Add `decay` times the latent value to the gradient of every pruned weight."""
        gradient = self.sparse.gradient
        if gradient is not None:
            gradient.add_(self.value * self.sparse.pruned, alpha=decay)

    def expose(self) -> None:
        """Put the latent values of pruned weights into the parameter, for the optimizer to update.

        Kept weights stay what they are: somebody may have changed them since the last step, as an averaging callback does.
        """
        weight = self.sparse.values
        weight.copy_(torch.where(self.sparse.kept, weight, self.value))

    def take_back(self) -> None:
        """Take the updated values out of the parameter."""
        self.value.copy_(self.sparse.values)

    def hide(self) -> None:
        """Make the parameter sparse by the mask."""
        zero_pruned_(self.sparse.values, self.sparse.kept)

    def change_mask(self, mask: Bool[Tensor, "out inp *kernel"]) -> None:
        """Put another mask in force, true where kept, and count what it changed."""
        self.last_flips = flipped_positions(self.sparse.kept, mask)
        self.flips = self.flips + self.last_flips
        self.sparse.kept.copy_(mask)

    def state_dict(self) -> dict[str, Any]:
        """Latent values of pruned weights (the model holds the others), in the row-major order of the weight; flips."""
        rows = self.sparse.rows
        # Every row has as many pruned weights as any other.
        latent = rows.gather(self.value[self.sparse.pruned])
        state = {"latent": latent, "flips": rows.total(self.flips), "last_flips": rows.total(self.last_flips)}
        return {key: value.cpu().clone() for key, value in state.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; mask and weight must have been restored before."""
        rows = self.sparse.rows
        self.value[self.sparse.pruned] = rows.own(state["latent"]).to(self.value)
        self.flips, self.last_flips = (
            rows.part_of(state[key].to(self.value.device)) for key in ("flips", "last_flips")
        )

    def blocks(self) -> Float[Tensor, "blocks m"]:
        """Latent values in blocks."""
        return to_blocks(self.value, self.sparse.pattern.m)
