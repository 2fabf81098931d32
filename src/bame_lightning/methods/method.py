# ruff: noqa: B027 most verbs are for some methods only
"""What a method of sparse training does in a step: the protocol, and what all methods share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor

from bame_lightning.bame.schedule import Schedule, Window
from bame_lightning.blocks.masks import as_integers
from bame_lightning.blocks.pattern import NMPattern
from bame_lightning.ledger.cost import PRODUCTS, Cost, Shares
from bame_lightning.methods.holder import Holder
from bame_lightning.methods.withheld import Withheld
from bame_lightning.weights.layers import SparseWeight
from bame_lightning.weights.views import Views


class Replica(NamedTuple):
    """A tensor that every rank holds, and that must be the same on all of them.

    Args:
        what: Its name in messages.
        layer: Its layer.
        value: The tensor.
    """

    what: str
    layer: str
    value: Tensor


class NextRead(NamedTuple):
    """Which part of the dense gradients a step reads.

    Args:
        everything: Whether it reads all of them.
        contenders: Otherwise, the pruned positions whose gradients it reads: by name of the weight, numbered by output row,
            kernel position and input, row by row.
    """

    everything: bool
    contenders: Mapping[str, Tensor] = MappingProxyType({})


def _as_it_is(flag: Tensor) -> Tensor:
    return flag


def _unseen(weights: Sequence[SparseWeight]) -> None:
    """Observe nothing."""


@dataclass(eq=False)
class Run:
    """A run of training, as a method sees it.

    Args:
        weights: The sparse weights.
        holders: The optimizers that hold them.
        steps: Steps of all optimizers so far.
        window: When masks adapt, in optimizer steps, if optimizers step once a batch.
        verify: Whether to check invariants at every step.
        clips: How often clipping writes to a gradient after it was masked.
        everywhere: Tells whether a boolean scalar is true in all processes that hold other rows.
        suspect: Called before an update with weights that others may have written to since the last one.
        withheld: Holds what masks take from gradients between the backward passes of a step.
        bits: Remembers the bits of weights and optimizer state, until training ends.
        observers: Make a context for each adaptation, which may compare before and after, until training ends.
    """

    weights: list[SparseWeight] = field(default_factory=list)
    holders: list[Holder] = field(default_factory=list)
    steps: int = 0
    window: Window = field(default_factory=lambda: Window(0, 0, 1))
    verify: bool = False
    clips: int = 0
    everywhere: Callable[[Tensor], Tensor] = _as_it_is
    suspect: Callable[[Sequence[SparseWeight]], None] = _unseen
    withheld: Withheld = field(default_factory=Withheld)
    bits: Views = field(default_factory=lambda: Views(as_integers))
    observers: list[Callable[[], AbstractContextManager[None]]] = field(default_factory=list)


class Method(ABC):
    """A method of sparse training. Its verbs are called in the order in which they stand here.

    Args:
        rescale: At a layer's first gradient, multiply what is kept by sqrt(M / N), unless a batch norm makes the scale
            irrelevant (`weights.scale.alignment`).

    Attributes:
        run: The run that it is part of; whoever drives the method keeps it up to date.
        rescaling: Names of the weights whose scale is still to be decided.
        name: What messages call it.
        schedule: When masks change, for methods that change them now and then.
        never: Begins the warning that the window of the schedule is too short for any change.
        both_ways: Whether masks are 2:4 along the output dimension, too.
        cost: What a step costs.
    """

    name = "StaticMask"
    schedule: Schedule | None = None
    never = ""
    both_ways = False
    cost = Cost("static", PRODUCTS)

    def __init__(self, *, rescale: bool = False) -> None:
        self.run = Run()
        self.rescale = rescale
        self.rescaling: set[str] = set()

    @abstractmethod
    def start(self, restored: Mapping[str, Any] | None) -> None:
        """Make the weights of the run sparse, if they are not yet; prepare the evolving state, or restore it.

        Args:
            restored: The state of a checkpoint; None in a new run, or in a second fit that goes on where the first one ended.
        """

    def regroup(self) -> None:
        """Follow a change of weights or holders: forget weights that left, begin with those that joined, which are still dense.

        Another run may follow one that all weights have left.
        """

    def after_backward(self, holder: Holder) -> None:
        """Change gradients after a backward pass (manual optimization): more passes may add to them, users may clip them."""

    @abstractmethod
    def before_update(self, holder: Holder, *, whole: bool) -> None:
        """Change gradients before they are clipped, and prepare for the optimizer's update.

        Args:
            holder: The optimizer.
            whole: Whether gradients are whole and as dense as the backward pass made them. False if `after_backward` has
                seen each pass; users may then have changed gradients since.
        """

    @abstractmethod
    def after_update(self, holder: Holder) -> None:
        """Make the weights sparse again, and evolve; not called for a step that a loss scaler skips."""

    @abstractmethod
    def enforce(self, weights: Sequence[SparseWeight] | None = None) -> None:
        """Make weights, and the state that optimizers keep of them, fit the masks.

        Args:
            weights: The weights to treat; all of them unless given.
        """

    def next_read(self, holder: Holder) -> NextRead:
        """Tell which part of the dense gradients of its weights the next step reads."""
        return NextRead(everything=True)

    def read_shares(self, holder: Holder) -> Mapping[str, float]:
        """Share of the pruned positions whose dense gradient the latest step has read, by name; empty if it read none."""
        return {}

    def mean_read_share(self, pattern: NMPattern, steps: int) -> float:
        """An upper bound of `read_shares`, on average over a run of so many steps."""
        return 0.0

    @abstractmethod
    def check(self) -> None:
        """Check the invariants that hold between two updates; called only if the run is verified."""

    def metrics(self) -> dict[str, Tensor]:
        """Metrics of the method, on the weights' device. Where weights are sharded, they cover this process's rows."""
        return {}

    def replicas(self) -> Iterator[Replica]:
        """The tensors that must be the same on every rank, in the same order on all."""
        for sparse in self.run.weights:
            if sparse.rows.whole:
                yield Replica("mask", sparse.label, sparse.kept)
                yield Replica("weight", sparse.label, sparse.values)

    def state(self) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
        """The evolving state for a checkpoint: that of each weight by its name, and that of the run."""
        return {}, {}

    def summary(self, mean: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]) -> dict[str, Any]:
        """The method's counts in plain types.

        Args:
            mean: Takes means over processes that hold different rows.
        """
        return {}


def costs(method: Method, holder: Holder) -> dict[str, Shares]:
    """Share of the dense cost of each weight that the latest step needed, by name."""
    read = method.read_shares(holder)
    return {s.name: method.cost.shares(s.pattern.density, read.get(s.name, 0.0)) for s in holder.weights}
