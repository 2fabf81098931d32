"""What masks take from gradients between the backward passes of a step, so that whole gradients can be read."""

from __future__ import annotations

from collections.abc import Container, Iterable

import torch
from torch import Tensor

from bame_lightning.blocks.masks import zero_pruned_
from bame_lightning.weights.layers import SparseWeight


class Withheld:
    """Keep the gradients of pruned weights that were masked before a step's last backward pass (manual optimization)."""

    def __init__(self) -> None:
        self._of: dict[str, Tensor] = {}

    @torch.no_grad()
    def before_backward(self, weights: Iterable[SparseWeight]) -> None:
        """Forget what was withheld from gradients that users have zeroed since the last pass."""
        for sparse in weights:
            if sparse.gradient is None:
                self._of.pop(sparse.name, None)
            elif sparse.name in self._of:
                zero_pruned_(self._of[sparse.name], sparse.gradient.any())

    def put_back(self, weights: Iterable[SparseWeight]) -> None:
        """Make gradients whole again."""
        for sparse in weights:
            if sparse.gradient is not None and sparse.name in self._of:
                sparse.gradient.add_(self._of[sparse.name])

    def withhold(self, weights: Iterable[SparseWeight]) -> None:
        """Remember what masks are about to take from gradients."""
        for sparse in weights:
            if sparse.gradient is not None:
                self._of[sparse.name] = sparse.gradient.clone()
                zero_pruned_(self._of[sparse.name], sparse.pruned)

    def drop(self, weights: Iterable[SparseWeight]) -> None:
        """Forget what was withheld from some weights: their step is over."""
        for sparse in weights:
            self._of.pop(sparse.name, None)

    def keep(self, names: Container[str]) -> None:
        """Forget all weights but these."""
        self._of = {name: gradient for name, gradient in self._of.items() if name in names}
