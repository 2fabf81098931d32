"""Methods whose pruned weights are zero throughout: gradients, weights and optimizer state follow the mask."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from typing_extensions import override

from bame_lightning.methods.both_ways import check_restored, check_rows
from bame_lightning.methods.enforcement import Enforcement
from bame_lightning.methods.holder import Holder
from bame_lightning.methods.method import Method, NextRead
from bame_lightning.weights import invariants
from bame_lightning.weights.layers import SparseWeight
from bame_lightning.weights.scale import rescale_
from bame_lightning.weights.sharding import local

LOOK_EVERY = 16
"""Steps between two passes over the weights of an optimizer that keeps zeros; others may have written to them."""


class Masked(Method):
    """Enforce masks at every step: sparse forward, sparse input gradient, sparse weight gradient. The masks stay.

    Gradients of pruned weights are zeroed before they are clipped. Where weight, gradient and optimizer state are zero, most
    optimizers leave them so (`keeps_zeros`). Then weights and state are zeroed only when masks change, when others have
    written to them, and every `LOOK_EVERY` steps. With any other optimizer they are zeroed after each of its steps.

    Args:
        rescale: As in `Method`.
        both_ways: Keep masks 2:4 along the output dimension, too: of four consecutive rows at most two keep a weight in a
            column, so that sparse tensor cores multiply with the transposed weight as well.
    """

    def __init__(self, *, rescale: bool = False, both_ways: bool = False) -> None:
        super().__init__(rescale=rescale)
        self.both_ways = both_ways
        if both_ways:
            self.cost = replace(self.cost, transposed_share=0.5)
        self._zeros = Enforcement()
        self._expected: dict[str, Bool[Tensor, "*shape"]] = {}
        self._touched: list[SparseWeight] = []

    # What a method overrides.

    def begin(self, restored: Mapping[str, Any] | None) -> None:
        """Prepare the evolving state before pruned weights are zeroed, or restore it."""

    def reads(self, holder: Holder) -> bool:
        """Whether this step needs dense gradients."""
        return False

    def read(self, holder: Holder, gradients: Mapping[str, Tensor]) -> None:
        """Read the dense gradients of the step so far, just before they are masked. The last call in a step counts.

        Args:
            holder: The optimizer of these weights.
            gradients: By name of the weight, as they lie in memory.
        """

    def evolve(self, holder: Holder) -> bool:
        """Change masks after a step; returns whether any may have changed."""
        return False

    def rescaled(self, sparse: SparseWeight, factor: float) -> None:
        """Follow a weight that was multiplied by a factor before the first update."""

    # The verbs.

    @override
    def start(self, restored: Mapping[str, Any] | None) -> None:
        self.run.withheld.keep(())
        if self.both_ways and restored is not None:
            check_restored(self.run.weights)
        self.begin(restored)
        self.enforce()
        self._remember_masks()

    @override
    def regroup(self) -> None:
        names = {sparse.name for sparse in self.run.weights}
        self.run.withheld.keep(names)
        self._zeros.keep(names)
        self.rescaling &= names
        self._touched = []
        self._remember_masks()

    @override
    @torch.no_grad()
    def after_backward(self, holder: Holder) -> None:
        # No backward pass is known to be the last one of a step, so each one reads the whole gradient so far.
        self.run.withheld.put_back(holder.weights)
        if self.reads(holder):
            self.read(holder, _gradients(holder.weights))
            self.run.withheld.withhold(holder.weights)
        self._zeros.mask_gradients(holder.weights)

    @override
    def before_update(self, holder: Holder, *, whole: bool) -> None:
        if whole and self.reads(holder):
            self.read(holder, _gradients(holder.weights))
        self._zeros.mask_gradients(holder.weights)
        if self.both_ways:
            # Not earlier: the first backward pass may show that the layer is the classifier, which stays dense.
            check_rows(self.run.weights)
        self._touched = self._zeros.written(holder.weights)
        # Torch does not tell about writes through `weight.data`; such values stay until all weights are checked.
        self.run.suspect(holder.weights if _due(holder) else self._touched)
        if holder.reloaded:
            # A gradient of an earlier step, under other masks: it would move weights that are pruned now.
            self.enforce(holder.weights)
            holder.reloaded = False
        # Not earlier: under manual optimization another backward pass may need the weights as they were. Nor now, if
        # the optimizer is about to differentiate the gradient.
        if self.rescaling:
            _rescale(self, [sparse for sparse in holder.weights if not sparse.has_graph])

    @override
    def after_update(self, holder: Holder) -> None:
        if self.rescaling:
            _rescale(self, [sparse for sparse in holder.weights if sparse.has_graph])
        if self.run.verify:
            invariants.check_gradients(holder.weights, self.run.steps)
        if _due(holder):
            self.enforce(holder.weights)
        else:
            self.enforce([*self._touched, *self._zeros.rewritten(holder.weights, self.run.clips)])
        evolved = self.evolve(holder)
        self.run.withheld.drop(holder.weights)
        holder.state.check_shown((sparse.name, sparse.weight) for sparse in holder.weights)
        if evolved:
            self._remember_masks()
        self._zeros.remember(holder.weights)

    @override
    def next_read(self, holder: Holder) -> NextRead:
        return NextRead(everything=self.reads(holder))

    @override
    def check(self) -> None:
        weights, steps = self.run.weights, self.run.steps
        invariants.check_counts(weights, steps)
        invariants.check_masks(weights, self._expected, steps)
        invariants.check_weights(weights, steps)
        if self.both_ways:
            invariants.check_both_ways(weights, steps)
        for holder in self.run.holders:
            invariants.check_optimizer_state(holder.weights, holder.state, steps)

    @override
    @torch.no_grad()
    def enforce(self, weights: Sequence[SparseWeight] | None = None) -> None:
        self._zeros.enforce(self.run.weights if weights is None else weights, self.run.holders, self.run.bits)

    def _remember_masks(self) -> None:
        if self.run.verify:
            self._expected = {sparse.name: sparse.kept.clone() for sparse in self.run.weights}


def _rescale(method: Masked, weights: Iterable[SparseWeight]) -> None:
    for sparse in weights:
        if sparse.name in method.rescaling and (factor := rescale_(sparse)) is not None:
            method.rescaling.remove(sparse.name)
            if factor != 1:
                method.rescaled(sparse, factor)


def _due(holder: Holder) -> bool:
    """Whether all weights of an optimizer are checked before the current step, and zeroed after it."""
    return not holder.keeps_zeros or holder.steps % LOOK_EVERY == 0


def _gradients(weights: Iterable[SparseWeight]) -> dict[str, Tensor]:
    """Gradients as they lie in memory, in the memory layout of their weights."""
    found = {}
    for sparse in weights:
        if sparse.weight.grad is not None:
            gradient = local(sparse.weight.grad.detach() if sparse.weight.grad.requires_grad else sparse.weight.grad)
            if gradient.stride() != local(sparse.weight).stride():
                gradient = torch.empty_like(local(sparse.weight.detach())).copy_(gradient)
            found[sparse.name] = gradient
    return found
