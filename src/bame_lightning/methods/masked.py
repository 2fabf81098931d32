"""Methods whose pruned weights are zero throughout: gradients, weights and optimizer state follow the mask."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.distributed.tensor import DTensor
from typing_extensions import override

from bame_lightning.blocks.masks import as_integers, zero_pruned_
from bame_lightning.blocks.transposable import ROWS, both_ways_mask, fits_both_ways, fits_forward
from bame_lightning.methods.holder import Holder
from bame_lightning.methods.method import Method
from bame_lightning.weights import invariants
from bame_lightning.weights.layers import LayerPlan, SparseWeight
from bame_lightning.weights.scale import CHANCE, alignment
from bame_lightning.weights.sharding import local
from bame_lightning.weights.weight_state import restart_

LOOK_EVERY = 16
"""Steps between two passes over the weights of an optimizer that keeps zeros: somebody else may have written to them."""


class Masked(Method):
    """Enforce masks at every step: sparse forward, sparse input gradient, sparse weight gradient. The masks stay.

    Gradients of pruned weights are zeroed before they are clipped. Where weight, gradient and optimizer state are zero, most
    optimizers leave them so (`keeps_zeros`). Whatever such an optimizer holds is zeroed when masks change, when somebody
    else has written to it, and every `LOOK_EVERY` steps; what any other holds, after each of its steps.

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
        self._withheld: dict[str, Tensor] = {}
        self._expected: dict[str, Bool[Tensor, "*shape"]] = {}
        self._versions: dict[str, tuple[int, int]] = {}
        self._touched: list[SparseWeight] = []
        self._masked: dict[str, int] = {}
        self._factors: dict[str, Tensor] = {}

    # What a method overrides.

    def begin(self, restored: Mapping[str, Any] | None) -> None:
        """Prepare what evolves, before pruned weights are zeroed; or restore it."""

    def reads(self, holder: Holder) -> bool:
        """Whether this step needs dense gradients."""
        return False

    def read(self, holder: Holder, gradients: Mapping[str, Tensor]) -> None:
        """Look at the dense gradients of the step so far, just before they are masked; the last look counts.

        Args:
            holder: The optimizer whose gradients they are.
            gradients: As they lie in memory, by name of the weight.
        """

    def evolve(self, holder: Holder) -> bool:
        """Change masks after a step; returns whether any may have changed."""
        return False

    def rewrites(self, holder: Holder) -> bool:
        """Whether `evolve` zeroes all that is pruned after the step that is going on."""
        return False

    def rescaled(self, sparse: SparseWeight, factor: float) -> None:
        """Follow a weight that was multiplied by a factor before the first update."""

    # The verbs.

    @override
    def first_mask(
        self, mask: Bool[Tensor, "blocks m"], weight: Float[Tensor, "blocks m"], plan: LayerPlan
    ) -> Bool[Tensor, "blocks m"]:
        if not self.both_ways:
            return mask
        assert plan.pattern is not None
        if not fits_forward(plan.pattern):
            raise ValueError(
                f"`both_ways=True` makes masks 2:4 in both directions, so `pattern` must keep at most 2 of 4 consecutive "
                f"inputs, as 1:M and 2:4 do; got {plan.pattern}."
            )
        return both_ways_mask(mask, weight, len(plan.values) * plan.rows.parts)

    @override
    def start(self, restored: Mapping[str, Any] | None) -> None:
        self._withheld = {}
        if self.both_ways and restored is not None:
            self._check_restored()
        self.begin(restored)
        self.enforce()
        self._remember_masks()

    def _check_restored(self) -> None:
        for sparse in self.run.weights:
            if not fits_both_ways(sparse.mask(), len(sparse.kept)):
                raise ValueError(
                    f"`both_ways=True` goes on with masks that are 2:4 in both directions, but that of `{sparse.label}` in the "
                    "checkpoint is not: its run did not set `both_ways`. Resume with both_ways=False, or load the weights and "
                    "start a new run with `init='nonzero'`, which prunes what does not fit."
                )

    @override
    def regroup(self) -> None:
        names = {sparse.name for sparse in self.run.weights}
        self._withheld = {name: gradient for name, gradient in self._withheld.items() if name in names}
        self.rescaling &= names
        self._remember_masks()

    @override
    @torch.no_grad()
    def before_backward(self, holder: Holder) -> None:
        # Users may have zeroed gradients since the last pass: what was withheld of them is void, too.
        for sparse in holder.weights:
            if sparse.gradient is None:
                self._withheld.pop(sparse.name, None)
            elif sparse.name in self._withheld:
                zero_pruned_(self._withheld[sparse.name], sparse.gradient.any())

    @override
    @torch.no_grad()
    def after_backward(self, holder: Holder) -> None:
        # The last pass of a step is not known to be the last one, so each look is at the whole gradient so far.
        for sparse in holder.weights:
            if sparse.gradient is not None and sparse.name in self._withheld:
                sparse.gradient.add_(self._withheld[sparse.name])
        if self.reads(holder):
            self.read(holder, _gradients(holder.weights))
            for sparse in holder.weights:
                if sparse.gradient is not None:
                    self._withheld[sparse.name] = sparse.gradient.clone()
                    zero_pruned_(self._withheld[sparse.name], sparse.pruned)
        self._mask_gradients(holder)

    @override
    def gradients_ready(self, holder: Holder) -> None:
        if self.reads(holder):
            self.read(holder, _gradients(holder.weights))
        self._mask_gradients(holder)

    @override
    def gradients_clipped(self, holder: Holder) -> None:
        self._mask_gradients(holder)

    def _mask_gradients(self, holder: Holder) -> None:
        """Zero gradients where weights are pruned, in one operation for all but those that have a graph."""
        bits, factors = [], []
        for sparse in holder.weights:
            gradient = sparse.weight.grad
            if gradient is None:
                continue
            if gradient.requires_grad:
                # The optimizer will differentiate the gradient, so that it must not change in place.
                sparse.weight.grad = torch.where(sparse.oriented(sparse.kept), gradient, 0)
                continue
            bits.append(as_integers(local(gradient)))
            factors.append(self._factor(sparse))
        if bits:
            torch._foreach_mul_(bits, factors)
        self._masked = {s.name: s.weight.grad._version for s in holder.weights if s.weight.grad is not None}

    def _rewritten(self, holder: Holder) -> list[SparseWeight]:
        """Weights to whose gradients somebody has written after they were masked, other than to clip them, as to add noise."""
        found = ((sparse, sparse.weight.grad) for sparse in holder.weights)
        return [
            sparse
            for sparse, gradient in found
            if gradient is not None and gradient._version > self._masked.get(sparse.name, 0) + self.run.clips
        ]

    def _factor(self, sparse: SparseWeight) -> Tensor:
        """The mask as zeros and ones, as the weight lies in memory."""
        found = self._factors.get(sparse.name)
        if found is None or found.data_ptr() != sparse.kept.data_ptr():
            found = self._factors[sparse.name] = sparse.oriented(sparse.kept).view(torch.int8)
        return found

    @override
    def before_update(self, holder: Holder) -> None:
        if self.both_ways:
            # Not earlier: the first backward pass may show that the layer is the classifier, which stays dense.
            self._check_rows()
        self._touched = self._written(holder)
        # Not earlier: under manual optimization another backward pass may need the weights as they were. Nor now, where
        # the optimizer is about to differentiate the gradient.
        if self.rescaling:
            self._rescale([sparse for sparse in holder.weights if not sparse.has_graph])

    def _check_rows(self) -> None:
        for sparse in self.run.weights:
            if not sparse.rows.whole and len(sparse.kept) % ROWS:
                raise ValueError(
                    f"`both_ways=True` looks at {ROWS} consecutive rows of a weight, but {sparse.rows.parts} processes hold "
                    f"{len(sparse.kept)} rows of `{sparse.label}` each, which {ROWS} does not divide. Use another number of "
                    f"processes, or keep it dense with layers={{'{sparse.label}': 'dense'}}."
                )

    def _rescale(self, weights: Iterable[SparseWeight]) -> None:
        for sparse in weights:
            if sparse.name not in self.rescaling or sparse.gradient is None:
                continue
            weight = sparse.values
            # A mean over all rows, wherever they lie.
            aligned = alignment(sparse.rows.gather(weight), sparse.rows.gather(sparse.gradient))
            if aligned.isfinite():  # otherwise nothing is known yet
                self.rescaling.remove(sparse.name)
                if aligned > CHANCE:
                    factor = sparse.pattern.density**-0.5
                    weight.mul_(factor)
                    self.rescaled(sparse, factor)

    @override
    def after_update(self, holder: Holder) -> None:
        if self.rescaling:
            self._rescale([sparse for sparse in holder.weights if sparse.has_graph])
        if self.run.verify:
            invariants.check_gradients(holder.weights, self.run.steps)
        if not holder.keeps_zeros or holder.steps % LOOK_EVERY == 0:
            self.enforce(holder.weights)
        else:
            self.enforce([*self._touched, *self._rewritten(holder)])
        evolved = self.evolve(holder)
        for sparse in holder.weights:
            self._withheld.pop(sparse.name, None)
        holder.state.check_shown((sparse.name, sparse.weight) for sparse in holder.weights)
        if evolved:
            self._remember_masks()
        self._remember_versions(holder.weights)

    @override
    def reads_everything(self, holder: Holder) -> bool:
        return self.reads(holder)

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
    def enforce(self, weights: Sequence[SparseWeight] | None = None) -> None:
        weights = self.run.weights if weights is None else weights
        if not weights:
            return
        found = [(as_integers(local(sparse.weight.detach())), self._factor(sparse)) for sparse in weights]
        wanted = {id(sparse) for sparse in weights}
        resting: list[tuple[Tensor, Tensor, float]] = []
        for holder in self.run.holders:
            for sparse in holder.weights:
                if id(sparse) in wanted:
                    for key, value in holder.state.elementwise(sparse.weight, sparse.name):
                        found.append((as_integers(value.detach()), self._factor(sparse)))
                        if rest := holder.state.rest(key):
                            resting.append((value, sparse.oriented(sparse.kept), rest))
        torch._foreach_mul_(*zip(*found, strict=True))
        for value, kept, rest in resting:
            value.masked_fill_(~kept, rest)
        self._remember_versions(weights)

    @override
    def forget(self) -> None:
        self.rescaling, self._withheld, self._versions, self._factors, self._touched = set(), {}, {}, {}, []

    def restart_copies(self, holder: Holder, before: Mapping[str, Bool[Tensor, "out inp *kernel"]]) -> None:
        """Start copies of weights that an optimizer keeps anew where weights were revived.

        Args:
            holder: The optimizer.
            before: Copies of masks as they were, by name of the weight.
        """
        for sparse in holder.weights:
            for copy in holder.state.copies(sparse.weight, sparse.name) if sparse.name in before else ():
                restart_(sparse.oriented(copy), sparse.values, sparse.kept & ~before[sparse.name])

    @override
    def suspects(self, holder: Holder) -> Sequence[SparseWeight]:
        # Torch does not tell who has written through `weight.data`; such values stay until all are looked at.
        everything = not holder.keeps_zeros or holder.steps % LOOK_EVERY == 0 or self.rewrites(holder)
        return holder.weights if everything else self._written(holder)

    def _written(self, holder: Holder) -> list[SparseWeight]:
        """Weights that somebody has written to since the last step, as far as torch tells."""
        seen = self._versions
        return [sparse for sparse in holder.weights if seen.get(sparse.name) != _version(sparse.weight)]

    def _remember_versions(self, weights: Iterable[SparseWeight]) -> None:
        self._versions |= {sparse.name: _version(sparse.weight) for sparse in weights}

    def _remember_masks(self) -> None:
        if self.run.verify:
            self._expected = {sparse.name: sparse.kept.clone() for sparse in self.run.weights}


def _version(weight: Tensor) -> tuple[int, int]:
    """What changes when somebody writes to a weight, or puts other memory behind it, as far as torch tells."""
    return weight._version, 0 if isinstance(weight, DTensor) else weight.data_ptr()


def _gradients(weights: Iterable[SparseWeight]) -> dict[str, Tensor]:
    """Gradients as they lie in memory, laid out as their weights."""
    found = {}
    for sparse in weights:
        if sparse.weight.grad is not None:
            gradient = local(sparse.weight.grad.detach() if sparse.weight.grad.requires_grad else sparse.weight.grad)
            if gradient.stride() != local(sparse.weight).stride():
                gradient = torch.empty_like(local(sparse.weight.detach())).copy_(gradient)
            found[sparse.name] = gradient
    return found
