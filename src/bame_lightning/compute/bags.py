"""Products by `embedding_bag`, a kernel of torch's own: no compiler needed, linear layers only."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from bame_lightning.blocks.pattern import NMPattern
from bame_lightning.compute.kept import KeptIndex
from bame_lightning.compute.operation import Linear, Operation

_TILE = 128
"""Samples that are multiplied at once; without tiles a batch of 1024 is several times slower."""


class BagProducts:
    """Compute a linear layer's products as sums over bags of inputs; the weight is zero where a mask prunes.

    Args:
        operation: A linear layer.
        mask: True where kept, shape (out, in).
        pattern: N:M, exactly N in each block.
        dtype: Of weights and activations.

    Raises:
        ValueError: If a block does not keep exactly N weights.
        TypeError: If the operation is not a linear layer.
    """

    name, device = "embedding_bag", "cpu"

    def __init__(
        self, operation: Operation, mask: Bool[Tensor, "out inp *kernel"], pattern: NMPattern, dtype: torch.dtype
    ) -> None:
        if not isinstance(operation, Linear):
            raise TypeError("embedding_bag multiplies linear layers only")
        self.index = KeptIndex(mask, pattern)
        self._inputs = mask.shape[1]
        self._version = -1
        self._order = self._rows = self._first = torch.empty(0, dtype=torch.int64)

    def update(self, mask: Bool[Tensor, "out inp"], rows: Int[Tensor, " chosen"] | None = None) -> int:
        """Follow a mask that has changed: `KeptIndex.update`."""
        return self.index.update(mask, rows)

    def values(self, weight: Float[Tensor, "out inp"]) -> Float[Tensor, "rows entries"] | None:
        """Gather the kept weights; None if one is not finite, or a pruned one not zero."""
        values = weight.gather(1, self.index.columns.long())
        right = values.isfinite().all() & (values.count_nonzero() == weight.count_nonzero())
        return values if right else None

    def forward(
        self, x: Float[Tensor, "*samples inp"], values: Tensor, bias: Tensor | None
    ) -> Float[Tensor, "*samples out"] | None:
        """The output; None if an input is not finite."""
        columns = self.index.columns
        first = torch.arange(0, columns.numel() + 1, columns.shape[1], dtype=columns.dtype)
        y = self._bags(x, columns.flatten(), first, values.flatten())
        return y if y is None or bias is None else y.add_(bias)

    def input_gradient(self, gradient: Tensor, values: Tensor, x: Tensor) -> Tensor | None:
        """The gradient of the input; None if `gradient` is not finite."""
        self._transpose()
        return self._bags(gradient, self._rows, self._first, values.flatten()[self._order])

    def weight_gradient(self, gradient: Tensor, x: Tensor, weight: Tensor, also: Tensor | None = None) -> None:
        """Leave this product to dense code: `embedding_bag` would be slower."""
        return

    def _bags(self, x: Tensor, index: Tensor, first: Tensor, values: Tensor) -> Tensor | None:
        samples = x.reshape(-1, x.shape[-1])
        if not samples.sum().isfinite() and not samples.isfinite().all():
            return None
        made = x.new_empty(len(samples), len(first) - 1)
        for part, to in zip(torch.split(samples, _TILE), torch.split(made, _TILE), strict=True):
            bags = functional.embedding_bag(
                index,
                part.t().contiguous(),
                first,
                mode="sum",
                per_sample_weights=values,
                include_last_offset=True,
            )
            to.copy_(bags.t())
        return made.view(*x.shape[:-1], -1)

    def _transpose(self) -> None:
        """Order the entries by their inputs."""
        if self._version == self.index.version:
            return
        columns = self.index.columns.flatten()
        self._order = columns.sort(stable=True).indices
        self._rows = (self._order // self.index.columns.shape[1]).to(columns.dtype)
        counts = torch.bincount(columns, minlength=self._inputs)
        self._first = functional.pad(counts.cumsum(0), (1, 0)).to(columns.dtype)
        self._version = self.index.version
