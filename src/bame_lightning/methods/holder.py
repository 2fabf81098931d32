"""The optimizers that hold sparse weights: each with steps, gradients and a window of its own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from bame_lightning.bame.schedule import Window
from bame_lightning.blocks.masks import zero_pruned_
from bame_lightning.methods.pace import Pace
from bame_lightning.weights.fixed_point import keeps_zeros
from bame_lightning.weights.layers import SparseWeight
from bame_lightning.weights.nested_optimizers import held_by, nested_optimizers
from bame_lightning.weights.positions import flat_memory
from bame_lightning.weights.views import Views
from bame_lightning.weights.weight_state import WeightState, restart_

AfterStep = Callable[[Optimizer, Any, Any], None]


class Holder:
    """An optimizer that holds sparse weights: which ones, and how many steps it has taken.

    Args:
        optimizer: The optimizer.
        weights: The sparse weights that it holds.

    Attributes:
        kind: Its class, by which torch lets steps be seen.
        state: What the optimizer keeps of its weights.
        steps: Optimizer steps so far.
        pace: How its steps and the batches of the run are related.
        window: When masks of its weights adapt, in its own steps.
        keeps_zeros: Whether what is zero in weights, gradients and state stays zero in its steps.
        stepping: Whether gradients were prepared for a step that is not over.
        backward: Whether a backward pass came since its last step (manual optimization).
        reloaded: Whether state was loaded into the optimizer since its last step.
        batches: Batches since its last step whose gradients have reached one of its weights (manual optimization).
    """

    def __init__(self, optimizer: Optimizer, weights: Sequence[SparseWeight]) -> None:
        self.optimizer = optimizer
        self.kind = type(optimizer)
        self.state = WeightState(optimizer)
        self.weights: list[SparseWeight] = []
        self.steps = 0
        self.pace = Pace()
        self.window = Window(0, 0, 1)
        self.stepping = self.backward = self.keeps_zeros = self.reloaded = False
        self.batches = 0
        self._reached = False
        self._versions: dict[int, int] = {}
        self._passes: list[Any] = []
        self._depth = 0
        self._inner: set[int] = set()
        self.hold(weights)
        self._inner_stepped = False
        self._undo: list[Callable[[], None]] = []
        self._memory = Views(flat_memory)

    def hold(self, weights: Sequence[SparseWeight]) -> None:
        """Take those of the sparse weights that the optimizer holds; call again when the sparse weights change."""
        held = held_by(self.optimizer)
        self.weights = [sparse for sparse in weights if id(sparse.weight) in held]
        ours = {id(sparse.weight) for sparse in self.weights}
        self._inner = {id(inner) for inner in nested_optimizers(self.optimizer) if ours & held_by(inner)}
        self._passes = [(None, -1)] * len(self.weights)

    def take_over(self, clocks: Iterable[Mapping[str, Any]]) -> None:
        """Go on from a saved clock: the first one that counted the steps of one of these weights."""
        names = {sparse.name for sparse in self.weights}
        for clock in clocks:
            if names & set(clock["layers"]):
                self.steps, self.pace = int(clock["steps"]), Pace.restored(clock["pace"])
                self.state.take_over(clock.get("state", {}))  # earlier releases did not save it
                return

    def clock(self) -> dict[str, Any]:
        """The number of steps so far, and the layers that took them, in plain types."""
        return {
            "layers": [sparse.name for sparse in self.weights],
            "steps": self.steps,
            "pace": self.pace.state_dict(),
            "state": self.state.state_dict(),
        }

    def attach(self, before_inner: Callable[[Holder], None], after: AfterStep) -> None:
        """Watch every step from now on.

        Torch's hooks see the steps of most optimizers. If `step` was patched or compiled, or `Optimizer.__init__` never ran,
        `step` of the object itself is wrapped instead.

        Args:
            before_inner: Called before an optimizer inside this one steps while this one does not, as the inner optimizer
                of SAM does in its `second_step`.
            after: Called when a step is over, with this optimizer.

        Raises:
            ValueError: If the steps of the optimizer cannot be watched.
        """
        self.detach()
        nested = nested_optimizers(self.optimizer)
        # A hook that comes before ours may move weights after the update; those that come later are seen at the next step.
        hooks = getattr(self.optimizer, "_optimizer_step_post_hooks", {})
        self.keeps_zeros = keeps_zeros(self.optimizer) and not hooks

        # Optimizers may be compiled together with their hooks. The code here must not be.
        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def enter(optimizer: Any, args: Any, kwargs: Any) -> None:
            if not self._depth:
                self._inner_stepped = False
                if id(optimizer) in self._inner and not self.stepping:
                    before_inner(self)
            self._depth += 1

        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def leave(optimizer: Any, args: Any, kwargs: Any) -> None:
            # Not below 0: of a step that was going on when hooks were attached only the end is seen.
            self._depth = max(0, self._depth - 1)
            self._inner_stepped |= id(optimizer) in self._inner
            if not self._depth:
                # If a wrapper did not let its inner optimizer step, it has only gathered gradients.
                self.stepping &= self._inner_stepped or not self._inner
                after(self.optimizer, args, kwargs)

        def reload(_: Any) -> None:
            self.reloaded = True

        for optimizer in (self.optimizer, *nested):
            self._undo += _see_steps(optimizer, enter, leave)
        if self.keeps_zeros:
            self._undo.append(self.optimizer.register_load_state_dict_post_hook(reload).remove)

    def detach(self) -> None:
        """Leave the optimizer as it was found."""
        for undo in self._undo:
            undo()
        self._undo = []
        self._depth = 0
        self.stepping = False
        self._memory.forget()

    def rest(self, weights: Sequence[SparseWeight], places: Sequence[Tensor]) -> None:
        """Reset optimizer state where weights were pruned, to what it is for a weight that rests at zero.

        Args:
            weights: The weights.
            places: For each, the places in its memory.
        """
        for sparse, pruned in zip(weights, places, strict=True):
            for key, value in self.state.elementwise(sparse.weight, sparse.name):
                rest = self.state.rest(key)
                if sparse.oriented(value).stride() == sparse.kept.stride():
                    self._memory.of((sparse.name, key), value).index_fill_(0, pruned, rest)
                elif rest:
                    sparse.oriented(value).masked_fill_(~sparse.kept, rest)
                else:
                    zero_pruned_(sparse.oriented(value), sparse.kept)

    def masks_of_copies(self, weights: Iterable[SparseWeight]) -> dict[str, Bool[Tensor, "out inp *kernel"]]:
        """Copy the masks of the weights that the optimizer keeps copies of, by name, for `restart_copies`."""
        return {s.name: s.kept.clone() for s in weights if self.state.copies(s.weight, s.name)}

    def restart_copies(self, before: Mapping[str, Bool[Tensor, "out inp *kernel"]]) -> None:
        """Where weights were revived, set the copies of them that the optimizer keeps to their new values.

        Args:
            before: What `masks_of_copies` returned before masks changed.
        """
        for sparse in self.weights if before else ():
            for copy in self.state.copies(sparse.weight, sparse.name) if sparse.name in before else ():
                restart_(sparse.oriented(copy), sparse.values, sparse.kept & ~before[sparse.name])

    def start_batch(self) -> None:
        """Call before each batch: a step that an exception has ended does not count."""
        self._depth = 0
        self._reached = False
        self._versions = {id(sparse.weight): sparse.weight._version for sparse in self.weights}

    @property
    def moved(self) -> list[SparseWeight]:
        """Weights that somebody has written to since the batch began, as far as torch tells."""
        return [s for s in self.weights if s.weight._version != self._versions.get(id(s.weight), s.weight._version)]

    def before_backward(self) -> None:
        """Call before each backward pass of manual optimization."""
        self._passes = [_version(sparse.weight.grad) for sparse in self.weights]

    def after_backward(self) -> None:
        """Call after each backward pass: the batch counts for this optimizer if the pass reached one of its weights."""
        found = [_version(sparse.weight.grad) for sparse in self.weights]
        reached = any(a[0] is not b[0] or a[1] != b[1] for a, b in zip(self._passes, found, strict=True))
        self._passes, self.backward = [], True
        self.batches += reached and not self._reached
        self._reached |= reached


def _version(gradient: torch.Tensor | None) -> tuple[torch.Tensor | None, int]:
    return gradient, -1 if gradient is None else gradient._version


def _see_steps(optimizer: Any, enter: AfterStep, leave: AfterStep) -> list[Callable[[], None]]:
    """Call `enter` and `leave` around every step of an optimizer; returns what undoes it."""
    patched = vars(optimizer).get("step")
    # Learning-rate schedulers patch `step`, too, but call the class's.
    hooked = getattr(type(optimizer).step, "hooked", False) and hasattr(optimizer, "_optimizer_step_post_hooks")
    if hooked and (patched is None or hasattr(patched, "_wrapped_by_lr_sched")):
        handles: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(enter),
            optimizer.register_step_post_hook(leave),
        ]
        return [handle.remove for handle in handles]
    step, active = optimizer.step, [True]

    @functools.wraps(step)
    def seen(*args: Any, **kwargs: Any) -> Any:
        if active:
            enter(optimizer, args, kwargs)
        result = step(*args, **kwargs)
        if active:
            leave(optimizer, args, kwargs)
        return result

    def undo() -> None:
        active.clear()  # somebody may have wrapped this wrapper since
        if vars(optimizer).get("step") is seen:
            if patched is None:
                del optimizer.step
            else:
                optimizer.step = patched

    try:
        optimizer.step = seen
    except (AttributeError, TypeError) as error:
        raise ValueError(
            f"`configure_optimizers` returns {type(optimizer).__name__}, whose steps cannot be seen: it calls neither "
            f"`Optimizer.__init__` nor lets its `step` be wrapped ({error}). Call `super().__init__`, or use another optimizer."
        ) from None
    return [undo]
