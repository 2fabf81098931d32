"""A run of sparse training, step by step, without Lightning: masks, the optimizers that hold them, and a method."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from bame_lightning.blocks.layout import to_blocks
from bame_lightning.blocks.masks import nonzero_mask, random_mask, top_n_mask
from bame_lightning.blocks.pattern import NMPattern
from bame_lightning.methods.both_ways import repaired
from bame_lightning.methods.execution import Compute, Execution
from bame_lightning.methods.holder import Holder
from bame_lightning.methods.method import Method
from bame_lightning.weights.layers import LayerPlan, SparseWeight, plan_layers
from bame_lightning.weights.nested_optimizers import held_by

Init = Literal["magnitude", "random", "nonzero"]
_MASKS = {
    "magnitude": lambda blocks, n: top_n_mask(blocks.abs(), n),
    "random": random_mask,
    "nonzero": nonzero_mask,
}


class SparseTraining:
    """Keep the weights of a network N:M sparse through the steps of its optimizers.

    In your own training loop, call `begin` once. In each step call `before_step` when gradients are whole, before you clip
    them. A hook of the optimizer does what follows an update. `BAMECallback` and its siblings drive the same object from the
    hooks of Lightning.

    Args:
        method: What happens in each step.
        init: Which weights the masks keep at first: "magnitude" keeps the largest, "random" any, "nonzero" those that are
            not zero in weights that are N:M sparse already.
        compute: How the layers' products are computed: "dense", "auto" or "sparse" (`Execution`).

    Attributes:
        run: Weights, optimizers and steps.
        execution: How products are computed.
        on_step: Called after each step, when the weights are sparse again.

    Raises:
        ValueError: If `init` or `compute` is none of these.

    Example:
        >>> from bame_lightning.methods.masked import Masked
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> training = SparseTraining(Masked())
        >>> training.begin(model, [optimizer], "1:4", steps=1)
        >>> model(torch.ones(3, 8)).sum().backward()
        >>> training.before_step(optimizer)
        >>> optimizer.step()
        >>> int(model[0].weight.count_nonzero()), training.run.steps
        (8, 1)
    """

    def __init__(self, method: Method, init: Init = "magnitude", compute: Compute = "dense") -> None:
        if init not in _MASKS:
            raise ValueError(f"`init` must be 'magnitude', 'random' or 'nonzero'; got {init!r}.")
        self.method = method
        self.run = method.run
        self.init = init
        self.execution = Execution(compute)
        self.attached = False
        self.stray = False
        """Whether something has written to weights in a step that was not announced."""
        self.on_step: Callable[[Holder], None] = _nothing
        self.before_inner: Callable[[Holder], None] = partial(_step_inside, self)

    def begin(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        pattern: str | NMPattern,
        layers: Mapping[str, str | NMPattern] | None = None,
        *,
        steps: int,
    ) -> None:
        """Put the weights of a network under masks, and follow its optimizers.

        Args:
            model: The network.
            optimizers: The optimizers that train it.
            pattern: "N:M".
            layers: Rules that override the default choice of layers, as in `BAMECallback`.
            steps: Optimizer steps of the run.
        """
        plans = plan_layers(model, NMPattern.parse(pattern), layers, held_by(*optimizers))
        self.run.weights = self.make_masks(plans)
        if self.method.schedule is not None:
            self.run.window = self.method.schedule.window(steps)
        sparse = {id(weight.weight) for weight in self.run.weights}
        self.follow([optimizer for optimizer in optimizers if sparse & held_by(optimizer)])
        self.method.start(None)
        self.execution.bind(model, self.run.weights)
        self.attach()

    def make_masks(self, plans: Iterable[LayerPlan], keep: Iterable[SparseWeight] = ()) -> list[SparseWeight]:
        """Make masks for what is planned to be sparse; the weights stay dense for now.

        Args:
            plans: For each weight, whether it becomes sparse and how.
            keep: Weights that are under masks already.

        Returns:
            All sparse weights, in the order of the plans.

        Raises:
            ValueError: If a mask cannot be made.
        """
        known, plans = {id(sparse.weight): sparse for sparse in keep}, [plan for plan in plans if plan.pattern]
        fresh = {plan.name: self._make_mask(plan) for plan in plans if id(plan.weight) not in known}
        if self.method.rescale and self.init != "nonzero":  # those were trained already
            self.method.rescaling |= fresh.keys()
        return [fresh.get(plan.name) or known[id(plan.weight)] for plan in plans]

    def _make_mask(self, plan: LayerPlan) -> SparseWeight:
        assert plan.pattern is not None
        # All rows are gathered first: the mask must be that of a single process.
        blocks = to_blocks(plan.rows.gather(plan.values), plan.pattern.m)
        try:
            mask = _MASKS[self.init](blocks, plan.pattern.n)
            mask = repaired(mask, blocks, plan) if self.method.both_ways else mask
            return SparseWeight.of(plan, mask)
        except ValueError as error:
            label = plan.name.removesuffix(".weight")
            raise ValueError(f"`{label}`: {error} Or keep it dense: layers={{'{label}': 'dense'}}.") from None

    # Which optimizers hold the weights: several may, each with steps of its own.

    def follow(self, optimizers: Iterable[Optimizer], clocks: Iterable[Mapping[str, Any]] = ()) -> None:
        """Give each optimizer that holds sparse weights a clock that counts its steps; saved clocks go on."""
        for holder in self.run.holders:
            holder.detach()
        self.run.holders = [Holder(optimizer, self.run.weights) for optimizer in optimizers]
        for holder in self.run.holders:
            holder.steps = self.run.steps // len(self.run.holders)  # unless a clock tells
            holder.window = self.run.window
            holder.take_over(clocks)

    def refollow(self, optimizers: Iterable[Optimizer]) -> None:
        """Follow the optimizers that hold the sparse weights now; weights and optimizers may have changed."""
        run, optimizers = self.run, list(optimizers)
        clocks, known = [holder.clock() for holder in run.holders], {id(h.optimizer): h for h in run.holders}
        for holder in run.holders:
            if all(holder.optimizer is not optimizer for optimizer in optimizers):
                holder.detach()
        run.holders = []
        for optimizer in optimizers:
            holder = known.get(id(optimizer)) or Holder(optimizer, run.weights)
            run.holders.append(holder)
            holder.hold(run.weights)
            if id(optimizer) not in known:
                holder.window = run.window
                holder.take_over(clocks)
                if self.attached:
                    self._attach(holder)

    def holder_of(self, optimizer: Any) -> Holder | None:
        """The holder of an optimizer; None if the optimizer holds no sparse weight."""
        return next((holder for holder in self.run.holders if holder.optimizer is optimizer), None)

    def attach(self) -> None:
        """Watch the steps of the optimizers from now on."""
        self.attached, self.stray = True, False
        for holder in self.run.holders:
            self._attach(holder)
            self.execution.prepare(holder, self.method)

    def _attach(self, holder: Holder) -> None:
        holder.attach(self.before_inner, self._after_step)

    def detach(self) -> None:
        """Leave the optimizers as they were found."""
        self.end_batch()
        for holder in self.run.holders:
            holder.detach()
        self.attached = False
        # With a reference to what drives it, this object could not be pickled.
        self.on_step, self.before_inner = _nothing, partial(_step_inside, self)
        self.run.observers = []
        self.run.bits.forget()
        self.execution.release()

    # One step.

    def before_step(self, optimizer: Any, *, whole: bool = True) -> None:
        """Call in each step, when an optimizer's gradients are whole and not yet clipped.

        Args:
            optimizer: The optimizer.
            whole: False if each backward pass has been followed, and users may have written the gradients last.

        Raises:
            ValueError: If it holds sparse weights, but is not the object that `begin` was given; a wrapper is another object.
                If its class has changed since.
        """
        holder = self.holder_of(optimizer)
        if holder is None:
            _refuse_stranger(self.run.holders, optimizer)
            return
        if type(optimizer) is not holder.kind:
            raise ValueError(
                f"`optimizer` was a {holder.kind.__name__} when training began and is a {type(optimizer).__name__} now, so its "
                "steps are no longer seen. Give it its class in `configure_optimizers`."
            )
        if self.run.verify:
            self.method.check()
        self.method.before_update(holder, whole=whole)
        holder.stepping = True

    @torch.no_grad()
    def end_batch(self) -> None:
        """Call after each batch: a step that a loss scaler has skipped, or an exception has ended, may leave weights dense."""
        for holder in self.run.holders:
            if holder.stepping:
                holder.stepping = False
                self.method.enforce(holder.weights)
            elif not self.run.steps:
                self.stray |= bool(holder.moved)

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        holder = self.holder_of(optimizer)
        if holder is None:
            return  # nothing that it holds is sparse any more
        if not holder.stepping:
            self.stray = True  # it comes from nowhere
            self.method.enforce(holder.weights)
            return
        holder.stepping = holder.backward = False
        self.method.after_update(holder)
        holder.steps += 1
        self.run.steps += 1
        self.on_step(holder)
        self.execution.follow(holder, self.method)

    # A checkpoint.

    def state(self) -> dict[str, Any]:
        """Masks and the evolving state, in tensors and plain types."""
        layers, more = self.method.state()
        return {
            "steps": self.run.steps,
            "clocks": [holder.clock() for holder in self.run.holders],
            "layers": {s.name: s.state_dict() | layers.get(s.name, {}) for s in self.run.weights},
            "rescaling": sorted(self.method.rescaling),
            **more,
        }

    def forget(self) -> None:
        """Forget the weights and their evolving state."""
        self.detach()
        self.execution.choices = {}
        self.run.weights, self.run.holders, self.run.steps = [], [], 0
        self.method.rescaling = set()
        self.method.regroup()


def _nothing(holder: Holder) -> None:
    """Do nothing after a step."""


def _step_inside(training: SparseTraining, holder: Holder) -> None:
    """Treat the step of an optimizer inside another one like any other step."""
    training.before_step(holder.optimizer)


def _refuse_stranger(holders: Iterable[Holder], optimizer: Any) -> None:
    """Refuse a step of sparse weights by an object that is not followed."""
    held = held_by(optimizer)
    for holder in holders:
        if any(id(sparse.weight) in held for sparse in holder.weights):
            raise ValueError(
                f"`optimizer` {type(optimizer).__name__} holds sparse weights, but the steps of "
                f"{type(holder.optimizer).__name__} are followed, another object. Give `before_step` what `begin` was "
                "given: of a wrapped optimizer, as Fabric's, both the wrapper, or both what it wraps."
            )
