"""What a step of a method costs, beside dense training: the formula follows from the products that are sparse."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT = PRODUCTS = ("forward", "input_gradient", "weight_gradient")
"""The products of a training step. In a dense layer all three cost the same."""


@dataclass(frozen=True)
class Shares:
    """Share of the dense cost of one weight that a training step needs.

    Args:
        forward: Share of the forward pass.
        input_gradient: Share of the gradient with respect to the input.
        weight_gradient: Share of the gradient with respect to the weight.
    """

    forward: float = 1.0
    input_gradient: float = 1.0
    weight_gradient: float = 1.0


@dataclass(frozen=True)
class Cost:
    """Which products of a step multiply with N:M sparse weights, and which only with dense ones.

    Args:
        title: What people call the method.
        sparse: The products of `PRODUCTS` that are sparse.
        reads: Whether the dense weight gradient of some pruned positions is computed, too.
        transposed_share: Least share of the dense cost at which hardware multiplies with the transposed weight: 1 if that
            has no pattern, 1/2 if it is 2:4, 0 if it is N:M or the input gradient has a mask of its own.

    Example:
        >>> cost = Cost("BAME", PRODUCTS, reads=True)
        >>> cost.formula, cost.shares(density=0.25, read=0.5)
        ('3f + r(1-f)', Shares(forward=0.25, input_gradient=0.25, weight_gradient=0.625))
    """

    title: str
    sparse: Collection[str] = ()
    reads: bool = False
    transposed_share: float = 1.0

    @property
    def formula(self) -> str:
        """A step in dense forward passes: f is the density, r the share of pruned positions that is read."""
        sparse, dense = len(self.sparse), len(PRODUCTS) - len(self.sparse)
        terms = (f"{sparse if sparse > 1 else ''}f" * (sparse > 0), str(dense) * (dense > 0), "r(1-f)" * self.reads)
        return " + ".join(filter(None, terms))

    def shares(self, density: float, read: float = 0.0) -> Shares:
        """What a step needs of one weight.

        Args:
            density: N / M.
            read: Share of the pruned positions whose weight gradient is computed, r.
        """
        shares = {product: density if product in self.sparse else 1.0 for product in PRODUCTS}
        shares[WEIGHT_GRADIENT] += read * (1 - shares[WEIGHT_GRADIENT])
        return Shares(**shares)


SR_STE = Cost("SR-STE", (FORWARD,))
"""Sparse forward, both gradients dense: what this field compares with."""
