"""A reading of dense gradients, and how far it moves evidence."""

from __future__ import annotations

import math
from typing import NamedTuple


class Reading(NamedTuple):
    """Which dense gradients a step reads.

    Args:
        everywhere: Whether it reads all unfrozen blocks; otherwise it reads the contenders only.
        steps: How far evidence moves by it, in steps: those of `Evidence` at the start of the window, or those of the
            optimizer (`OneBatch`).
        forgets: How much evidence shrinks by it, as a multiple of 1 / steps of the window.
        share: Share of the pruned positions that it reads.
    """

    everywhere: bool
    steps: float
    forgets: float = 0.0
    share: float = 1.0


def noise_step(steps: int, m: int) -> float:
    r"""Step of evidence at which noise alone does not swap weights, relative to the weights, tau (ours).

    Suppose that n gradients are pure noise, and each moves evidence by tau times the root mean square of the weights. Then
    evidence is a random walk with standard deviation $\tau \sqrt{n}$, in units of that root mean square. The largest of M such
    walks is about $\tau \sqrt{n} \sqrt{2 \ln M}$. With $\tau = 1 / \sqrt{2 n \ln M}$ it just reaches a typical weight at the
    end of the window. A gradient that persists gets there in $1 / \tau$ steps.

    Args:
        steps: Steps of the window, n.
        m: Weights in a block, M.

    Returns:
        tau.
    """
    return 1 / math.sqrt(2 * steps * math.log(max(m, 2)))  # nothing is pruned in blocks of 1
