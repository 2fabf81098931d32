"""Whether the scale of a layer matters, after pruning has changed it."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from bame_lightning.weights.layers import SparseWeight

CHANCE = 0.1
"""If `alignment` is below this, a layer's scale is taken not to matter. Before a batch norm it is 1e-5 to 5e-3 (bfloat16)."""


def alignment(
    weight: Float[Tensor, "out inp *kernel"], gradient: Float[Tensor, "out inp *kernel"]
) -> Float[Tensor, ""]:
    r"""Measure how far filters are aligned with their gradients, relative to chance (ours).

    If a batch norm follows, the scale of a filter does not matter: $L(a w_r) = L(w_r)$ for every filter r and a > 0, and so
    $\langle w_r, g_r \rangle = 0$ (Euler's theorem on homogeneous functions). Elsewhere the cosine of the two is at least
    that of random directions, about $1 / \sqrt{k}$ for k kept weights.

    Args:
        weight: The sparse weight.
        gradient: Its gradient, zero where pruned.

    Returns:
        Mean of $|\cos(w_r, g_r)| \sqrt{k_r}$ over the filters with a gradient: about 1 or more where scale matters, `CHANCE`
        or less where it does not. NaN if no filter has a gradient, or one is not finite.
    """
    w, g = weight.flatten(1).float(), gradient.flatten(1).float()
    size = w.norm(dim=1) * g.norm(dim=1)
    relative = (w * g).sum(1).abs() / size * w.count_nonzero(1).sqrt()
    mean: Tensor = relative[size != 0].mean()
    return mean


def rescale_(sparse: SparseWeight) -> float | None:
    """Multiply kept weights by sqrt(M / N), in place, if their first gradient shows that their scale matters.

    Args:
        sparse: The weight, with its gradient. All processes decide the same for all rows.

    Returns:
        The factor, 1 if the scale does not matter; None if nothing is known yet.
    """
    if sparse.gradient is None:
        return None
    aligned = alignment(sparse.rows.gather(sparse.values), sparse.rows.gather(sparse.gradient))
    if not aligned.isfinite():
        return None
    factor = sparse.pattern.density**-0.5 if aligned > CHANCE else 1.0
    if factor != 1:
        sparse.values.mul_(factor)
    return factor
