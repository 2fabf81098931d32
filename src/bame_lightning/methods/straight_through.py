"""Methods that train dense latent weights through a mask: the network is sparse, the update is dense."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from typing_extensions import override

from bame_lightning.blocks.layout import from_blocks
from bame_lightning.blocks.masks import top_n_mask
from bame_lightning.blocks.transposable import transposable_mask
from bame_lightning.ledger.cost import FORWARD, INPUT_GRADIENT, SR_STE, Cost
from bame_lightning.methods.holder import Holder
from bame_lightning.methods.latent import LatentWeight
from bame_lightning.methods.method import Method, Replica
from bame_lightning.weights import invariants
from bame_lightning.weights.layers import SparseWeight
from bame_lightning.weights.mask_set import MaskSet, flip_rates


class StraightThrough(Method):
    """In every step keep the N largest latent weights of each block; pruned latent weights decay (SR-STE).

    Latent weights are in the parameters only between `before_update` and the end of the update.

    Args:
        decay: Decay of pruned weights, lambda.
    """

    name = "SRSTE"
    cost = SR_STE

    def __init__(self, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.latents: list[LatentWeight] = []
        self.masks = MaskSet(())

    def choose_mask(self, latent: LatentWeight, holder: Holder) -> Bool[Tensor, "out inp *kernel"] | None:
        """The mask for the next step, true where kept; None leaves it as it is."""
        kept = top_n_mask(latent.blocks().abs(), latent.sparse.pattern.n)
        return from_blocks(kept, latent.value.shape)

    def pull(self, latent: LatentWeight) -> None:
        """Change the gradient of a latent weight before the update."""
        latent.add_decay(self.decay)

    def settle(self, latent: LatentWeight) -> None:
        """Take back a latent weight that the update has changed."""
        latent.take_back()

    @override
    def start(self, restored: Mapping[str, Any] | None) -> None:
        if restored or not self.run.steps:
            self.latents, self.masks = [], MaskSet(())
        StraightThrough.regroup(self)
        if restored:
            self.masks.load_states(restored["layers"])
            for latent in self.latents:
                latent.load_state_dict(restored["layers"][latent.sparse.name])
        self.enforce()

    @override
    def regroup(self) -> None:
        known = {latent.sparse: latent for latent in self.latents}
        self.latents = [known.get(sparse) or LatentWeight(sparse) for sparse in self.run.weights]
        self.masks = self.masks.following(self.run.weights)

    @override
    @torch.no_grad()
    def enforce(self, weights: Sequence[SparseWeight] | None = None) -> None:
        # Optimizer state is that of the latent weights: dense.
        for latent in self.latents:
            latent.hide()

    @override
    @torch.no_grad()
    def before_update(self, holder: Holder, *, whole: bool) -> None:
        self.run.suspect(holder.weights)
        if holder.stepping:
            raise RuntimeError(
                f"The optimizer calls its closure more than once in a step (as SAM does), and {self.name} has put "
                "dense weights into the model for the update by then. Use an optimizer of one evaluation per step, or BAME."
            )
        if any(sparse.has_graph for sparse in holder.weights):
            optimizer = type(holder.optimizer).__name__
            raise ValueError(
                f"{self.name} puts dense weights into the model for the update, so {optimizer} could not "
                "differentiate gradients (`create_graph=True`) of the sparse ones. Use an optimizer without second "
                "derivatives, or BAME."
            )
        for latent in self._latents_of(holder):
            self.pull(latent)
            latent.expose()

    @override
    def after_update(self, holder: Holder) -> None:
        for latent in self._latents_of(holder):
            self.settle(latent)
            mask = self.choose_mask(latent, holder)
            if mask is not None:
                self.masks.change(self.masks.weights.index(latent.sparse), mask)
        self.enforce()

    def _latents_of(self, holder: Holder) -> list[LatentWeight]:
        here = {id(sparse) for sparse in holder.weights}
        return [latent for latent in self.latents if id(latent.sparse) in here]

    @override
    def check(self) -> None:
        invariants.check_counts(self.run.weights, self.run.steps)
        invariants.check_weights(self.run.weights, self.run.steps)

    @override
    def metrics(self) -> dict[str, Tensor]:
        return flip_rates([self.masks])

    @override
    def replicas(self) -> Iterator[Replica]:
        yield from super().replicas()
        for latent in self.latents:
            if latent.sparse.rows.whole:
                yield Replica("latent weight", latent.sparse.label, latent.value)

    @override
    def state(self) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
        flips = self.masks.states()
        return {latent.sparse.name: latent.state_dict() | flips[latent.sparse.name] for latent in self.latents}, {}

    @override
    def summary(self, mean: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]) -> dict[str, Any]:
        return {"flips": self.masks.total()}


class Transposable(StraightThrough):
    """SR-STE under masks that are N:M along the output dimension, too; they are renewed at intervals.

    Args:
        decay: Decay of pruned weights, lambda.
        refresh_every: Optimizer steps between two masks.
    """

    name = "TransposableSTE"
    cost = Cost("transposable STE", (FORWARD, INPUT_GRADIENT), transposed_share=0.0)

    def __init__(self, decay: float, refresh_every: int) -> None:
        super().__init__(decay)
        self.refresh_every = refresh_every

    @override
    def choose_mask(self, latent: LatentWeight, holder: Holder) -> Bool[Tensor, "out inp *kernel"] | None:
        if (holder.steps + 1) % self.refresh_every:
            return None
        return _transposable(latent)

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

    def _begin(self, known: set[SparseWeight]) -> None:
        """Make transposable masks of weights that are new."""
        for latent in self.latents:
            if latent.sparse not in known:
                latent.expose()
                latent.sparse.kept.copy_(_transposable(latent))
                latent.sparse.set_initial(latent.sparse.kept)
        self.enforce()

    @override
    def before_update(self, holder: Holder, *, whole: bool) -> None:
        # Not earlier: the first backward pass may show that the layer is the classifier, which stays dense.
        for sparse in self.run.weights:
            if not _fits(sparse):
                shared = "" if sparse.rows.whole else f" / {sparse.rows.parts} processes"
                raise ValueError(
                    f"`pattern` {sparse.pattern} cannot be transposable in `{sparse.label}`: {sparse.pattern.m} does not "
                    f"divide its output dimension {len(sparse.kept) * sparse.rows.parts}{shared}. Keep it dense with "
                    f"layers={{'{sparse.label}': 'dense'}}."
                )
        super().before_update(holder, whole=whole)


def _transposable(latent: LatentWeight) -> Bool[Tensor, "out inp *kernel"]:
    pattern = latent.sparse.pattern
    if not _fits(latent.sparse):
        return latent.sparse.kept.clone()
    return transposable_mask(latent.value.abs(), pattern.n, pattern.m)


def _fits(sparse: SparseWeight) -> bool:
    return len(sparse.kept) % sparse.pattern.m == 0
