"""RigL inside blocks: drop by magnitude, grow by gradient."""

from __future__ import annotations

import math

from jaxtyping import Bool, Float
from torch import Tensor

from bame_lightning.bame.contenders import count_in_share


def drop_and_grow(
    weight: Float[Tensor, "blocks m"], gradient: Float[Tensor, "blocks m"], mask: Bool[Tensor, "blocks m"], share: float
) -> Bool[Tensor, "blocks m"]:
    """Swap one weight in some blocks: the kept one of smallest |w| for the pruned one of largest |g|.

    Evci et al., "Rigging the Lottery: Making All Tickets Winners" (ICML 2020), confined to blocks so that each keeps its
    number of weights (ours, as is the choice of blocks: those whose smallest kept weight is smallest in the layer).

    Args:
        weight: The weights.
        gradient: Their dense gradient.
        mask: True where kept; at least one kept and one pruned per block.
        share: Share of the blocks that swap, rounded up.

    Returns:
        The new mask, as many kept per block as before.
    """
    smallest, drop = weight.abs().masked_fill(~mask, math.inf).min(-1)
    grow = gradient.abs().masked_fill(mask, -1).argmax(-1)
    chosen = smallest.argsort(stable=True)[: count_in_share(share, len(mask))]
    new = mask.clone()
    new[chosen, drop[chosen]] = False
    new[chosen, grow[chosen]] = True
    return new
