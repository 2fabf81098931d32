"""`TopKAST`: forward on the largest weights of a block, gradients for some more, in a Trainer."""

from __future__ import annotations

from collections.abc import Mapping

from bame_lightning.blocks.pattern import NMPattern
from bame_lightning.callbacks.driver import SparseCallback, shown
from bame_lightning.methods.top_kast import TopKast


class TopKAST(SparseCallback):
    r"""Keep the N largest latent weights of each block, and compute gradients for the C largest.

    A weight that is not in the network is trained, too, as long as it is among the C largest of its block; all others do not
    move. In every step the mask is made anew (Jayakumar et al., "Top-KAST: Top-K Always Sparse Training", NeurIPS 2020;
    choosing within blocks is ours). Latent weights are in the parameters during the optimizer's update only, as in `SRSTE`.

    Args:
        pattern: "N:M" or an `NMPattern`.
        layers: Rules that override the default choice of layers, as in `BAMECallback`.
        penalty: Exploration penalty, lambda: the decay of weights in the network. Weights outside it that get a gradient
            decay M / N times as much.
        widen: C = min(M, widen N).
        verify: Check all invariants after every step (slow, for debugging).

    Raises:
        ValueError: If an argument is malformed.

    Example:
        >>> TopKAST("1:16", widen=2).widen
        2
    """

    method: TopKast
    penalty: float = shown("method.decay", "Exploration penalty.")
    widen: int = shown("method.widen", "C as a multiple of N.")

    def __init__(
        self,
        pattern: str | NMPattern,
        *,
        layers: Mapping[str, str | NMPattern] | None = None,
        penalty: float = 1e-4,
        widen: int = 4,
        verify: bool = False,
    ) -> None:
        if not penalty >= 0:
            raise ValueError(f"`penalty` must not be negative; got {penalty}.")
        if not isinstance(widen, int) or widen < 1:
            raise ValueError(f"`widen` must be a whole number of times N, at least 1; got {widen!r}.")
        super().__init__(pattern, TopKast(penalty, widen), layers=layers, verify=verify)
