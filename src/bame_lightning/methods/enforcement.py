"""Put zeros where weights are pruned: in gradients, weights and optimizer state; and see where others have written."""

from __future__ import annotations

from collections.abc import Container, Hashable, Iterable, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from bame_lightning.blocks.masks import as_integers
from bame_lightning.methods.holder import Holder
from bame_lightning.weights.layers import SparseWeight
from bame_lightning.weights.sharding import local
from bame_lightning.weights.views import Views


class Enforcement:
    """Put zeros where weights are pruned, in one operation for all weights; tell which weights others have written to."""

    def __init__(self) -> None:
        self._factors: dict[str, Tensor] = {}
        self._masked: dict[str, int] = {}
        self._versions: dict[str, tuple[int, int]] = {}

    def mask_gradients(self, weights: Sequence[SparseWeight]) -> None:
        """Zero gradients where weights are pruned."""
        bits, factors = [], []
        for sparse in weights:
            gradient = sparse.weight.grad
            if gradient is None:
                continue
            if gradient.requires_grad:
                # The optimizer will differentiate the gradient, so it must not change in place.
                with torch.enable_grad():
                    sparse.weight.grad = torch.where(sparse.oriented(sparse.kept), gradient, 0)
                continue
            bits.append(as_integers(local(gradient)))
            factors.append(self._factor(sparse))
        if bits:
            torch._foreach_mul_(bits, factors)
        self._masked = {s.name: s.weight.grad._version for s in weights if s.weight.grad is not None}

    def enforce(self, weights: Sequence[SparseWeight], holders: Iterable[Holder], bits: Views) -> None:
        """Make weights, and the state that optimizers keep of them, fit the masks.

        Args:
            weights: The weights.
            holders: The optimizers of the run.
            bits: Remembers the bits of weights and state.
        """
        if not weights:
            return
        found = [(_bits(bits, sparse.name, sparse.weight), self._factor(sparse)) for sparse in weights]
        wanted = {id(sparse) for sparse in weights}
        resting: list[tuple[Tensor, Tensor, float]] = []
        for holder in holders:
            for sparse in holder.weights:
                if id(sparse) in wanted:
                    for key, value in holder.state.elementwise(sparse.weight, sparse.name):
                        found.append((_bits(bits, (sparse.name, key), value), self._factor(sparse)))
                        if rest := holder.state.rest(key):
                            resting.append((value, sparse.oriented(sparse.kept), rest))
        torch._foreach_mul_(*zip(*found, strict=True))
        for value, kept, rest in resting:
            value.masked_fill_(~kept, rest)
        self.remember(weights)

    def remember(self, weights: Iterable[SparseWeight]) -> None:
        """Remember that weights are now as they should be."""
        self._versions |= {sparse.name: _version(sparse.weight) for sparse in weights}

    def written(self, weights: Iterable[SparseWeight]) -> list[SparseWeight]:
        """Weights that others have written to since `remember`, as far as torch tells."""
        return [sparse for sparse in weights if self._versions.get(sparse.name) != _version(sparse.weight)]

    def rewritten(self, weights: Iterable[SparseWeight], clips: int) -> list[SparseWeight]:
        """Weights whose gradients others have changed since they were masked, as by adding noise. Clipping does not count.

        Args:
            weights: The weights to look at.
            clips: How often clipping writes to a gradient.
        """
        found = ((sparse, sparse.weight.grad) for sparse in weights)
        return [
            sparse
            for sparse, gradient in found
            if gradient is not None and gradient._version > self._masked.get(sparse.name, 0) + clips
        ]

    def keep(self, names: Container[str]) -> None:
        """Forget all weights but these."""
        self._factors = {name: factor for name, factor in self._factors.items() if name in names}
        self._versions = {name: version for name, version in self._versions.items() if name in names}

    def _factor(self, sparse: SparseWeight) -> Tensor:
        """The mask as zeros and ones, as the weight lies in memory."""
        found = self._factors.get(sparse.name)
        if found is None or found.data_ptr() != sparse.kept.data_ptr():
            found = self._factors[sparse.name] = sparse.oriented(sparse.kept).view(torch.int8)
        return found


def _bits(bits: Views, name: Hashable, value: Tensor) -> Tensor:
    return as_integers(local(value.detach())) if isinstance(value, DTensor) else bits.of(name, value)


def _version(weight: Tensor) -> tuple[int, int]:
    """A value that changes when a weight is written to, or gets other memory, as far as torch tells."""
    return weight._version, 0 if isinstance(weight, DTensor) else weight.data_ptr()
