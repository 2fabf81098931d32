"""Top-KAST inside blocks: forward on the N largest weights of a block, gradients for the C largest."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Bool
from torch import Tensor
from typing_extensions import override

from bame_lightning.blocks.layout import from_blocks
from bame_lightning.blocks.masks import top_n_mask, zero_pruned_
from bame_lightning.blocks.pattern import NMPattern
from bame_lightning.ledger.cost import PRODUCTS, Cost
from bame_lightning.methods.holder import Holder
from bame_lightning.methods.latent import LatentWeight
from bame_lightning.methods.straight_through import StraightThrough


class TopKast(StraightThrough):
    r"""Update the C largest latent weights of each block, of which the N largest form the network.

    Jayakumar et al., "Top-KAST: Top-K Always Sparse Training" (NeurIPS 2020), with its sets A and B chosen in blocks
    (ours): the N and the C largest. Weights outside B do not move, whatever momentum the optimizer holds for them (ours).
    The exploration penalty of a latent weight is half its square, times $\lambda$ in A, times $\lambda / D$ in B without
    A, with D = N / M.

    Args:
        penalty: Factor of the exploration penalty, $\lambda$.
        widen: C = min(M, widen N).
    """

    name = "TopKAST"
    cost = Cost("Top-KAST", PRODUCTS, reads=True)

    def __init__(self, penalty: float, widen: int) -> None:
        super().__init__(penalty)
        self.widen = widen
        self._reached: dict[str, Bool[Tensor, "out inp *kernel"]] = {}

    @override
    def pull(self, latent: LatentWeight) -> None:
        sparse, gradient = latent.sparse, latent.sparse.gradient
        if gradient is None:
            return
        largest = top_n_mask(latent.blocks().abs(), self._reach(sparse.pattern))
        reached = self._reached[sparse.name] = from_blocks(largest, latent.value.shape) | sparse.kept
        zero_pruned_(gradient, reached)
        rates = torch.where(sparse.kept, self.decay, self.decay / sparse.pattern.density)
        gradient.addcmul_(latent.value, (rates * reached).to(latent.value))

    @override
    def settle(self, latent: LatentWeight) -> None:
        reached = self._reached.pop(latent.sparse.name, None)
        if reached is not None:
            latent.sparse.values.copy_(torch.where(reached, latent.sparse.values, latent.value))
        super().settle(latent)

    @override
    def read_shares(self, holder: Holder) -> Mapping[str, float]:
        return {sparse.name: self.mean_read_share(sparse.pattern, 1) for sparse in holder.weights}

    @override
    def mean_read_share(self, pattern: NMPattern, steps: int) -> float:
        return (self._reach(pattern) - pattern.n) / max(1, pattern.m - pattern.n)

    def _reach(self, pattern: NMPattern) -> int:
        return min(pattern.m, self.widen * pattern.n)
