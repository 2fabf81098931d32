"""What a weight is worth, and which swaps follow from it.

The *latent* weights of a block are its kept weights `w` and the evidence `v` of its pruned weights. A criterion says how much
each latent weight is worth: pruning a kept weight costs its worth, reviving a pruned one gains its worth.
"""

from __future__ import annotations

import math

from jaxtyping import Bool, Float
from torch import Tensor


def first_order_worth(
    latent: Float[Tensor, "blocks m"], gradient: Float[Tensor, "blocks m"]
) -> Float[Tensor, "blocks m"]:
    r"""Value latent weights by the first-order loss change in one batch, $|g_i x_i|$: the literal criterion.

    Pruning a kept weight costs $|g_i w_i|$. The evidence of a pruned weight is one step, $v_j = -\eta g_j$, so reviving it
    gains $\eta g_j^2$. This is our literal reading of the abstract's "expected loss reduction", not the authors' formula.

    Args:
        latent: Weights where kept, evidence where pruned.
        gradient: g, the dense gradient of this step.

    Returns:
        Expected loss without each weight, minus the loss with it.
    """
    return (gradient * latent).abs()


def select_mask(
    worth: Float[Tensor, "blocks m"],
    mask: Bool[Tensor, "blocks m"],
    n: int,
    adaptable: Bool[Tensor, "#blocks"] | None = None,
) -> Bool[Tensor, "blocks m"]:
    """Swap in every block while the best pruned weight is worth more than the worst kept one.

    Each swap prunes the kept weight of the least worth and revives the pruned weight of the greatest. In the end the n weights
    of the greatest worth are kept, after at most min(n, m - n) swaps. On a tie the mask stays as it is; between equals the
    lower index swaps first.

    Args:
        worth: Value of each latent weight, at least 0, never NaN.
        mask: The mask in force, exactly `n` kept per block.
        n: Weights kept per block.
        adaptable: Blocks that may change, or one value for all of them; None for all.

    Returns:
        The new mask, exactly `n` kept per block.
    """
    mask = mask.clone()
    for _ in range(min(n, mask.shape[-1] - n)):
        cost, weakest = worth.masked_fill(~mask, math.inf).min(-1, keepdim=True)
        gain, strongest = worth.masked_fill(mask, -math.inf).max(-1, keepdim=True)
        swap = gain > cost
        if adaptable is not None:
            swap &= adaptable[:, None]
        # Where nothing is swapped an index may have no meaning: infinite values equal the value for masked places.
        mask.scatter_(-1, weakest, mask.gather(-1, weakest) & ~swap)
        mask.scatter_(-1, strongest, mask.gather(-1, strongest) | swap)
    return mask
