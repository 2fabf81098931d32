"""Methods whose pruned weights are zero throughout: gradients, weights and optimizer state follow the mask."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from bame_lightning.blocks.masks import zero_pruned_
from bame_lightning.callbacks.base import SparseCallback
from bame_lightning.ledger.flops import Shares
from bame_lightning.weights import invariants
from bame_lightning.weights.layers import SparseWeight
from bame_lightning.weights.scale import CHANCE, alignment
from bame_lightning.weights.weight_state import WeightState, restart_


class MaskedCallback(SparseCallback):
    """Enforce masks at every step: sparse forward, sparse input gradient, sparse weight gradient.

    Gradients of pruned weights are zeroed before Lightning clips them; after the optimizer's step pruned weights and their
    element-wise optimizer state are zeroed; then a method may change the masks. Takes the arguments of `SparseCallback`.
    """

    _expected: dict[str, Bool[Tensor, "*shape"]]
    _withheld: dict[str, Tensor]
    _states: dict[int, WeightState]

    # What a method overrides.

    def start_method(self, restored: Mapping[str, Any] | None) -> None:
        """Prepare what evolves, before pruned weights are zeroed; or restore it from what `state_dict` returned."""

    def reads_gradients(self) -> bool:
        """Whether this step needs dense gradients."""
        return False

    def read_gradients(self) -> None:
        """Look at the dense gradients of the step so far, just before they are masked; the last look counts."""

    def evolve(self, optimizer: Optimizer) -> bool:
        """Change masks after an optimizer step, which may have moved pruned weights; returns whether any may have changed."""
        return False

    def rescaled(self, sparse: SparseWeight, factor: float) -> None:
        """Follow a weight that was multiplied by a factor before the first update."""

    # What the base calls.

    @override
    def start(self, restored: Mapping[str, Any] | None) -> None:
        self._withheld, self._states = {}, {}
        self.start_method(restored)
        self.enforce()
        self._remember_masks()

    @override
    def regroup(self) -> None:
        names = {sparse.name for sparse in self.weights}
        self._withheld = {name: gradient for name, gradient in self._withheld.items() if name in names}
        self._rescaling &= names
        self._remember_masks()

    @override
    def handle_gradients(self) -> None:
        self.read_gradients()
        self.mask_gradients()

    @override
    @torch.no_grad()
    def before_backward(self) -> None:
        # Users may have zeroed gradients since the last pass: what was withheld of them is void, too.
        for sparse in self.now.weights:
            if sparse.gradient is None:
                self._withheld.pop(sparse.name, None)
            elif sparse.name in self._withheld:
                zero_pruned_(self._withheld[sparse.name], sparse.gradient.any())

    @override
    @torch.no_grad()
    def after_backward(self) -> None:
        # The last pass of a step is not known to be the last one, so each look is at the whole gradient so far.
        for sparse in self.now.weights:
            if sparse.gradient is not None and sparse.name in self._withheld:
                sparse.gradient.add_(self._withheld[sparse.name])
        self.read_gradients()
        if self.reads_gradients():
            for sparse in self.now.weights:
                if sparse.gradient is not None:
                    self._withheld[sparse.name] = sparse.gradient.clone()
                    zero_pruned_(self._withheld[sparse.name], sparse.pruned)
        self.mask_gradients()

    @override
    def mask_gradients(self) -> None:
        for sparse in self.now.weights:
            if sparse.has_graph:
                # The optimizer will differentiate the gradient, so that it must not change in place.
                kept = sparse.oriented(sparse.kept)
                assert sparse.weight.grad is not None
                sparse.weight.grad = torch.where(kept, sparse.weight.grad, 0)
            elif sparse.gradient is not None:
                zero_pruned_(sparse.gradient, sparse.kept)

    @override
    def before_update(self) -> None:
        # Not earlier: under manual optimization another backward pass may need the weights as they were. Nor now, where
        # the optimizer is about to differentiate the gradient.
        if self._rescaling:
            self._rescale([sparse for sparse in self.now.weights if not sparse.has_graph])

    def _rescale(self, weights: Iterable[SparseWeight]) -> None:
        for sparse in weights:
            if sparse.name not in self._rescaling or sparse.gradient is None:
                continue
            weight = sparse.values
            # A mean over all rows, wherever they lie.
            aligned = alignment(sparse.rows.gather(weight), sparse.rows.gather(sparse.gradient))
            if aligned.isfinite():  # otherwise nothing is known yet
                self._rescaling.remove(sparse.name)
                if aligned > CHANCE:
                    factor = sparse.pattern.density**-0.5
                    weight.mul_(factor)
                    self.rescaled(sparse, factor)

    @override
    def after_update(self, optimizer: Optimizer) -> None:
        if self._rescaling:
            self._rescale([sparse for sparse in self.now.weights if sparse.has_graph])
        if self.verify:
            invariants.check_gradients(self.now.weights, self.steps)
        state = self._state(optimizer)
        copies = {s.name: found for s in self.now.weights if (found := state.copies(s.weight, s.name))}
        before = {sparse.name: sparse.kept.clone() for sparse in self.now.weights if sparse.name in copies}
        evolved = self.evolve(optimizer)
        for sparse in self.now.weights:
            self._withheld.pop(sparse.name, None)
            for copy in copies.get(sparse.name, ()):
                restart_(sparse.oriented(copy), sparse.values, sparse.kept & ~before[sparse.name])
        # State was zero wherever weights were pruned, so a revived weight starts without history, too.
        self.enforce(optimizer)
        state.check_shown((sparse.name, sparse.weight) for sparse in self.now.weights)
        if evolved:
            self._remember_masks()

    @override
    def shares(self) -> dict[str, Shares]:
        return {sparse.name: Shares.static(sparse.pattern.density) for sparse in self.now.weights}

    @override
    def check(self) -> None:
        invariants.check_counts(self.weights, self.steps)
        invariants.check_masks(self.weights, self._expected, self.steps)
        invariants.check_weights(self.weights, self.steps)
        for followed in self._followed:
            invariants.check_optimizer_state(followed.weights, self._state(followed.optimizer), self.steps)

    @override
    def enforce(self, optimizer: Optimizer | None = None) -> None:
        for sparse in self.weights if optimizer is None else self.held(optimizer):
            zero_pruned_(sparse.values, sparse.kept)
            if optimizer is not None:
                for _, value in self._state(optimizer).elementwise(sparse.weight, sparse.name):
                    zero_pruned_(sparse.oriented(value), sparse.kept)

    def _state(self, optimizer: Optimizer) -> WeightState:
        if id(optimizer) not in self._states:
            self._states[id(optimizer)] = WeightState(optimizer)
        return self._states[id(optimizer)]

    @override
    def _remove_hooks(self) -> None:
        super()._remove_hooks()
        self._states = {}

    def _remember_masks(self) -> None:
        if self.verify:
            self._expected = {sparse.name: sparse.kept.clone() for sparse in self.weights}


class StaticMask(MaskedCallback):
    """Train under the masks made at the start; they never change.

    The bound in training FLOPs, and the accuracy that an evolution has to beat. Takes the arguments of `SparseCallback`.

    Example:
        >>> str(StaticMask("2:4", init="random").pattern)
        '2:4'
    """
