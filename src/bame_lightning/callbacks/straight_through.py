"""Methods that train dense latent weights through a mask: the network is sparse, the update is dense."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from bame_lightning.blocks.layout import from_blocks
from bame_lightning.blocks.masks import top_n_mask
from bame_lightning.blocks.pattern import NMPattern
from bame_lightning.blocks.transposable import transposable_mask
from bame_lightning.callbacks.base import SparseCallback
from bame_lightning.callbacks.ranks import Copy
from bame_lightning.ledger.flops import Shares
from bame_lightning.methods.latent import LatentWeight
from bame_lightning.weights import invariants
from bame_lightning.weights.layers import SparseWeight


class SRSTE(SparseCallback):
    r"""Sparse-refined straight-through estimator: in every step a mask of the N largest latent weights of each block.

    Forward and backward run on $b \odot w$ with the mask b of the latent weight w; the gradient g with respect to $b \odot w$
    goes straight to all of w, and pruned weights decay: $w \leftarrow w - \gamma (g + \lambda (1 - b) \odot w)$ (Zhou et al.,
    "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch", ICLR 2021).

    Latent weights are in the parameters only between `on_before_optimizer_step` and the end of the update. Whoever looks at
    any other time (validation, a checkpoint) sees the sparse network; latent values of pruned weights are saved in this
    callback's state. The decay is added after a loss scaler has unscaled the gradients, and before they are clipped (under
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

    def __init__(
        self,
        pattern: str | NMPattern,
        *,
        layers: Mapping[str, str | NMPattern] | None = None,
        decay: float = 2e-4,
        verify: bool = False,
    ) -> None:
        super().__init__(pattern, layers=layers, rescale=False, verify=verify)
        if not decay >= 0:
            raise ValueError(f"`decay` must not be negative; got {decay}.")
        self.decay = decay
        self.latents: list[LatentWeight] = []
        self._exposed = False

    def choose_mask(self, latent: LatentWeight) -> Bool[Tensor, "out inp *kernel"] | None:
        """The mask for the next step, true where kept; None leaves it as it is."""
        kept = top_n_mask(latent.blocks().abs(), latent.sparse.pattern.n)
        return from_blocks(kept, latent.value.shape)

    @override
    def start(self, restored: Mapping[str, Any] | None) -> None:
        if restored or not self.steps:
            self.latents = []
        SRSTE.regroup(self)
        if restored:
            for latent in self.latents:
                latent.load_state_dict(restored["layers"][latent.sparse.name])
        self.enforce()

    @override
    def regroup(self) -> None:
        known = {latent.sparse: latent for latent in self.latents}
        self.latents = [known.get(sparse) or LatentWeight(sparse) for sparse in self.weights]

    @override
    def enforce(self, optimizer: Optimizer | None = None) -> None:
        # Optimizer state is that of the latent weights: dense.
        for latent in self.latents:
            latent.hide()
        self._exposed = False

    @override
    @torch.no_grad()
    def before_update(self) -> None:
        if self._exposed:
            raise RuntimeError(
                f"The optimizer calls its closure more than once in a step (as SAM does), and {type(self).__name__} has put "
                "dense weights into the model for the update by then. Use an optimizer of one evaluation per step, or BAME."
            )
        if any(sparse.has_graph for sparse in self.now.weights):
            optimizer = type(self.now.optimizer).__name__
            raise ValueError(
                f"{type(self).__name__} puts dense weights into the model for the update, so {optimizer} could not "
                "differentiate gradients (`create_graph=True`) of the sparse ones. Use an optimizer without second "
                "derivatives, or BAME."
            )
        for latent in self.moving(self.latents):
            latent.add_decay(self.decay)
            latent.expose()
        self._exposed = True

    @override
    def after_update(self, optimizer: Optimizer) -> None:
        for latent in self.moving(self.latents):
            latent.take_back()
            mask = self.choose_mask(latent)
            if mask is not None:
                latent.change_mask(mask)
        self.enforce()

    @override
    @torch.no_grad()
    def after_batch(self) -> None:
        # A step that a loss scaler skipped, or that an exception ended, leaves the latent weights exposed.
        if self._exposed:
            self.enforce()

    @override
    def shares(self) -> dict[str, Shares]:
        return {sparse.name: Shares.sr_ste(sparse.pattern.density) for sparse in self.now.weights}

    @override
    def check(self) -> None:
        invariants.check_counts(self.weights, self.steps)
        invariants.check_weights(self.weights, self.steps)

    @override
    def method_statistics(self) -> dict[str, Tensor]:
        flips = {latent.sparse.label: latent.last_flips / latent.value.numel() for latent in self.latents}
        total = torch.stack([latent.last_flips for latent in self.latents]).sum()
        rate = total / sum(latent.value.numel() for latent in self.latents)
        return {"bame/flip_rate": rate} | {f"bame/layer/{name}/flip_rate": value for name, value in flips.items()}

    @override
    def copies(self) -> Iterator[Copy]:
        yield from super().copies()
        for latent in self.latents:
            if latent.sparse.rows.whole:
                yield Copy("latent weight", latent.sparse.label, latent.value)

    @override
    def save(self, state: dict[str, Any]) -> None:
        for latent in self.latents:
            state["layers"][latent.sparse.name] |= latent.state_dict()

    @override
    def forget(self) -> None:
        super().forget()
        self.latents = []

    @override
    def _summary(self) -> dict[str, Any]:
        return super()._summary() | {
            "flips": sum(int(latent.sparse.rows.total(latent.flips)) for latent in self.latents)
        }


class TransposableSTE(SRSTE):
    """SR-STE under masks that are N:M along the input and the output dimension: the input gradient is sparse, too.

    The mask is renewed every `refresh_every` optimizer steps, since finding it is dear. Hubara et al., "Accelerated Sparse
    Neural Training" (NeurIPS 2021) train so; that pruned weights decay as in SR-STE is ours.

    Args:
        pattern: "N:M" or an `NMPattern`. M must divide the output dimension of every sparse layer, too.
        layers: Rules that override the default choice of layers, as in `BAMECallback`.
        decay: Decay of pruned weights, lambda.
        refresh_every: Optimizer steps between two masks.
        verify: Check all invariants after every step (slow, for debugging).

    Raises:
        ValueError: If an argument is malformed.
    """

    transposable = True

    def __init__(
        self,
        pattern: str | NMPattern,
        *,
        layers: Mapping[str, str | NMPattern] | None = None,
        decay: float = 2e-4,
        refresh_every: int = 40,
        verify: bool = False,
    ) -> None:
        super().__init__(pattern, layers=layers, decay=decay, verify=verify)
        if refresh_every < 1:
            raise ValueError(f"`refresh_every` must be at least 1 optimizer step; got {refresh_every}.")
        self.refresh_every = refresh_every

    @override
    def choose_mask(self, latent: LatentWeight) -> Bool[Tensor, "out inp *kernel"] | None:
        if (self.now.steps + 1) % self.refresh_every:
            return None
        return self._transposable(latent)

    @override
    def start(self, restored: Mapping[str, Any] | None) -> None:
        known = {latent.sparse for latent in self.latents}  # a second fit keeps the masks of the first
        super().start(restored)
        if not restored:
            self._begin(known)

    @override
    def regroup(self) -> None:
        known = {latent.sparse for latent in self.latents}
        super().regroup()
        self._begin(known)

    def _begin(self, known: Container[SparseWeight]) -> None:
        """Make transposable masks of weights that are new."""
        for latent in self.latents:
            if latent.sparse not in known:
                latent.expose()
                latent.sparse.kept.copy_(self._transposable(latent))
                latent.sparse.set_initial(latent.sparse.kept)
        self.enforce()

    @override
    def before_update(self) -> None:
        # Not earlier: the first backward pass may show that the layer is the classifier, which stays dense.
        for sparse in self.weights:
            if not _fits(sparse):
                shared = "" if sparse.rows.whole else f" / {sparse.rows.parts} processes"
                raise ValueError(
                    f"`pattern` {sparse.pattern} cannot be transposable in `{sparse.label}`: {sparse.pattern.m} does not "
                    f"divide its output dimension {len(sparse.kept) * sparse.rows.parts}{shared}. Keep it dense with "
                    f"layers={{'{sparse.label}': 'dense'}}."
                )
        super().before_update()

    @override
    def shares(self) -> dict[str, Shares]:
        return {sparse.name: Shares.bi_mask(sparse.pattern.density) for sparse in self.now.weights}

    def _transposable(self, latent: LatentWeight) -> Bool[Tensor, "out inp *kernel"]:
        pattern = latent.sparse.pattern
        if not _fits(latent.sparse):
            return latent.sparse.kept.clone()
        return transposable_mask(latent.value.abs(), pattern.n, pattern.m)


def _fits(sparse: SparseWeight) -> bool:
    return len(sparse.kept) % sparse.pattern.m == 0
