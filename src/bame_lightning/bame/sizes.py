"""The size of pruned weights' gradients beside that of the weights: with it evidence does not depend on a layer's scale."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bame_lightning.bame.table import BlockTable
from bame_lightning.blocks.masks import zero_pruned_

MEMORY = 0.9
"""Weight of the past in the running mean of squared gradients, at each reading of all blocks."""


class Sizes:
    """Sizes of gradients and weights, from readings of all blocks.

    Args:
        table: Blocks of the weights.

    Attributes:
        noise: Running mean of squared gradients of pruned weights; shape (weights,).
        unit: Root mean square of kept weights over that of pruned weights' gradients. With this step a typical gradient moves
            evidence by a typical weight; shape (weights,).
    """

    def __init__(self, table: BlockTable) -> None:
        self._weights, self._pattern, self._blocks = table.weights, table.pattern, table.counts
        self._split = table.counts.tolist()
        self.noise = torch.zeros(len(table.weights), dtype=table.dtype, device=table.device)
        self.unit = torch.zeros_like(self.noise)

    def measure(
        self,
        gradient: Float[Tensor, "blocks m"],
        kept: Float[Tensor, "blocks n"],
        frozen: Bool[Tensor, " blocks"] | None,
        finite: Bool[Tensor, ""],
        present: list[bool],
    ) -> None:
        """Follow both sizes, over all rows of each weight. Gradients of frozen blocks do not count and are zeroed.

        Args:
            gradient: Dense gradients, zero where weights are kept.
            kept: Weights where they are kept.
            frozen: Blocks whose mask is final; None if none ever is.
            finite: False leaves everything as it is.
            present: Which weights have a gradient.
        """
        n, m = self._pattern.n, self._pattern.m
        if frozen is None:
            unfrozen = self._blocks.to(self.noise.dtype)
        else:
            zero_pruned_(gradient, ~frozen[:, None])
            unfrozen = torch.stack([(~part).sum() for part in torch.split(frozen, self._split)]).to(self.noise.dtype)
        sums = torch.stack((self._squares(gradient), self._squares(kept), unfrozen))
        squares, weights, blocks = self._total(sums)
        square = squares / (blocks * (m - n)).clamp_min(1)
        running = torch.where(self.noise > 0, torch.lerp(square, self.noise, MEMORY), square)
        # The square of a finite gradient may overflow.
        seen = finite & running.isfinite()
        if not all(present):
            seen = seen & torch.tensor(present, device=seen.device)
        self.noise = torch.where(seen, running, self.noise)
        # Every block keeps the same number of weights.
        parts = torch.tensor([sparse.rows.parts * n for sparse in self._weights], device=weights.device)
        self.unit = torch.where(self.noise > 0, (weights / (self._blocks * parts) / self.noise).sqrt(), 0)

    def _squares(self, values: Float[Tensor, "blocks k"]) -> Float[Tensor, " weights"]:
        return torch.stack(torch._foreach_norm(torch.split(values, self._split))).square()

    def _total(self, values: Float[Tensor, "kinds weights"]) -> Iterable[Float[Tensor, " weights"]]:
        """Sum over all rows of each weight."""
        if all(sparse.rows.whole for sparse in self._weights):
            return values.unbind()
        own = zip(self._weights, values.unbind(1), strict=True)
        return torch.stack([sparse.rows.total(value.contiguous()) for sparse, value in own], dim=1).unbind()
