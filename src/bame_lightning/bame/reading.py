"""A reading of dense gradients, and how far it moves evidence."""

from __future__ import annotations

import math
from typing import NamedTuple


class Reading(NamedTuple):
    """Which dense gradients a step reads.

    Args:
        everywhere: Read all unfrozen blocks; otherwise the contenders only.
        steps: How far evidence moves by it, in steps of its kind: `Evidence`'s at the start of the window, or the
            optimizer's (`OneBatch`).
        forgets: How much evidence shrinks by it, as a multiple of 1 / steps of the window.
        share: Share of the pruned positions that it reads.
    """

    everywhere: bool
    steps: float
    forgets: float = 0.0
    share: float = 1.0


def noise_step(steps: int, m: int) -> float:
    r"""Step of evidence at which noise alone does not swap weights, relative to the weights, tau (ours).

    Moved along n gradients that are nothing but noise, by steps of tau times the root mean square of the weights each,
    evidence is a random walk of deviation $\tau \sqrt{n}$, in weights; the largest of M such values is about
    $\tau \sqrt{n} \sqrt{2 \ln M}$. It just reaches a typical weight by the end of the window if
    $\tau = 1 / \sqrt{2 n \ln M}$. Where gradients persist, evidence gets there in $1 / \tau$ steps.

    Args:
        steps: Steps of the window, n.
        m: Weights in a block, M.

    Returns:
        tau.
    """
    return 1 / math.sqrt(2 * steps * math.log(max(m, 2)))  # nothing is pruned in blocks of 1
