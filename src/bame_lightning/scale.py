"""The scale of a layer after pruning: how much is lost, and whether it matters."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

CHANCE = 0.1
"""`alignment` below which a layer's scale is taken not to matter; a batch norm gives 1e-5 to 5e-3 (bfloat16)."""


def norm_lost(weight: Float[Tensor, "out inp *kernel"], pruned: Bool[Tensor, "out inp *kernel"]) -> Float[Tensor, ""]:
    """Norm of a weight over that of what is kept of it; 1 if nothing but zeros is kept.

    Args:
        weight: The weight before it is pruned.
        pruned: True where it will be zero.

    Returns:
        The factor that gives what is kept the norm of the whole; at least 1.
    """
    kept = weight.masked_fill(pruned, 0).norm(dtype=torch.float32)
    return torch.where(kept > 0, weight.norm(dtype=torch.float32) / kept, 1)


def alignment(
    weight: Float[Tensor, "out inp *kernel"], gradient: Float[Tensor, "out inp *kernel"]
) -> Float[Tensor, ""]:
    r"""How far filters are aligned with their gradients, relative to chance (ours).

    Behind a batch norm the scale of a filter does not matter: $L(a w_r) = L(w_r)$ for every filter r and a > 0, and so
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
