"""`SRSTE` and `TransposableSTE`: dense latent weights behind a sparse network, in a Trainer."""

from __future__ import annotations

from collections.abc import Mapping

from bame_lightning.blocks.pattern import NMPattern
from bame_lightning.callbacks.driver import SparseCallback, shown
from bame_lightning.methods.straight_through import StraightThrough, Transposable


class SRSTE(SparseCallback):
    r"""Sparse-refined straight-through estimator: every step keeps the N largest latent weights of each block.

    Forward and backward run on $b \odot w$ with the mask b of the latent weight w; the gradient g with respect to $b \odot w$
    goes straight to all of w, and pruned weights decay: $w \leftarrow w - \gamma (g + \lambda (1 - b) \odot w)$ (Zhou et al.,
    "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch", ICLR 2021).

    Latent weights are in the parameters only between `on_before_optimizer_step` and the end of the update. At any other time,
    as in validation or a checkpoint, the network is sparse. This callback's state holds the latent values of pruned weights.
    The decay is added after a loss scaler has unscaled the gradients, and before they are clipped (under
    manual optimization after `training_step` has clipped them).

    Args:
        pattern: "N:M" or an `NMPattern`.
        layers: Rules that override the default choice of layers, as in `BAMECallback`.
        decay: Decay of pruned weights, lambda.
        verify: Check all invariants after every step (slow, for debugging).

    Raises:
        ValueError: If an argument is malformed.

    Example:
        >>> SRSTE("2:4").decay
        0.0002
    """

    method: StraightThrough
    decay: float = shown("method.decay", "Decay of pruned weights.")

    def __init__(
        self,
        pattern: str | NMPattern,
        *,
        layers: Mapping[str, str | NMPattern] | None = None,
        decay: float = 2e-4,
        verify: bool = False,
    ) -> None:
        if not decay >= 0:
            raise ValueError(f"`decay` must not be negative; got {decay}.")
        super().__init__(pattern, StraightThrough(decay), layers=layers, verify=verify)


class TransposableSTE(SparseCallback):
    """SR-STE under masks that are N:M along the input and the output dimension: the input gradient is sparse, too.

    The mask is renewed every `refresh_every` optimizer steps, because it is expensive to find. This is the method of Hubara et
    al., "Accelerated Sparse Neural Training" (NeurIPS 2021). The decay of pruned weights, as in SR-STE, is ours.

    Args:
        pattern: "N:M" or an `NMPattern`. M must divide the output dimension of every sparse layer, too.
        layers: Rules that override the default choice of layers, as in `BAMECallback`.
        decay: Decay of pruned weights, lambda.
        refresh_every: Optimizer steps between two masks.
        verify: Check all invariants after every step (slow, for debugging).

    Raises:
        ValueError: If an argument is malformed.
    """

    method: Transposable
    decay: float = shown("method.decay", "Decay of pruned weights.")
    refresh_every: int = shown("method.refresh_every", "Optimizer steps between two masks.")

    def __init__(
        self,
        pattern: str | NMPattern,
        *,
        layers: Mapping[str, str | NMPattern] | None = None,
        decay: float = 2e-4,
        refresh_every: int = 40,
        verify: bool = False,
    ) -> None:
        if not decay >= 0:
            raise ValueError(f"`decay` must not be negative; got {decay}.")
        if refresh_every < 1:
            raise ValueError(f"`refresh_every` must be at least 1 optimizer step; got {refresh_every}.")
        super().__init__(pattern, Transposable(decay, refresh_every), layers=layers, verify=verify)
