"""Checks of the promises of N:M sparse training; a failed check names what is broken. `verify=True` runs them every step."""

from __future__ import annotations

from collections.abc import Iterable

from jaxtyping import Bool
from torch import Tensor

from bame_lightning.blocks.transposable import MOST, ROWS, column_counts
from bame_lightning.weights.layers import SparseWeight
from bame_lightning.weights.weight_state import WeightState


class InvariantError(AssertionError):
    """An invariant of N:M sparse training does not hold."""


def check_weights(weights: Iterable[SparseWeight], step: int) -> None:
    """Check that every pruned weight is exactly zero.

    Args:
        weights: Weights under masks.
        step: Optimizer steps done, for the message.

    Raises:
        InvariantError: If one is not.
    """
    for sparse in weights:
        _check(sparse, sparse.values, 0.0, "weight", "something changed weights after the optimizer step", step)


def check_gradients(weights: Iterable[SparseWeight], step: int) -> None:
    """Check that every pruned weight's gradient is exactly zero, as clipping and the optimizer see it.

    Args:
        weights: Weights under masks.
        step: Optimizer steps done, for the message.

    Raises:
        InvariantError: If one is not.
    """
    for sparse in weights:
        if sparse.gradient is not None:
            cause = "something changed gradients after they were masked in `on_before_optimizer_step`"
            _check(sparse, sparse.gradient, 0.0, "gradient", cause, step)


def check_optimizer_state(weights: Iterable[SparseWeight], state: WeightState, step: int) -> None:
    """Check that element-wise optimizer state is exactly zero, or what it started with, where weights are pruned.

    Args:
        weights: Weights under masks.
        state: State of the optimizer that holds them.
        step: Optimizer steps done, for the message.

    Raises:
        InvariantError: If one is not.
    """
    for sparse in weights:
        for key, value in state.elementwise(sparse.weight, sparse.name):
            cause = "something changed the optimizer's state after its step"
            _check(sparse, sparse.oriented(value), state.rest(key), f"optimizer state '{key}'", cause, step)


def check_counts(weights: Iterable[SparseWeight], step: int) -> None:
    """Check that every block keeps exactly N of its M positions.

    Args:
        weights: Weights under masks.
        step: Optimizer steps done, for the message.

    Raises:
        InvariantError: If a block keeps more or fewer.
    """
    for sparse in weights:
        kept = sparse.mask().sum(-1)
        wrong = kept != sparse.pattern.n
        if wrong.any():
            block = int(wrong.nonzero()[0, 0])
            raise InvariantError(
                f"Count: after step {step}, `{sparse.name}` ({sparse.pattern}) keeps {int(kept[block])} positions in block "
                f"{block}, and a wrong number in {int(wrong.sum())} of {len(kept)} blocks: the mask has drifted."
            )


def check_both_ways(weights: Iterable[SparseWeight], step: int) -> None:
    """Check that masks are 2:4 along the output dimension, too.

    Args:
        weights: Weights under masks of a run with `both_ways=True`.
        step: Optimizer steps done, for the message.

    Raises:
        InvariantError: If four consecutive rows of a column keep more than two weights.
    """
    for sparse in weights:
        counts = column_counts(sparse.mask(), len(sparse.kept))
        wrong = (counts > MOST).nonzero()
        if len(wrong):
            group, column = wrong[0].tolist()
            most = int(counts[group, column])
            raise InvariantError(
                f"Both ways: after step {step}, `{sparse.name}` ({sparse.pattern}) keeps {most} weights in "
                f"column {column} of the four rows from {group * ROWS} on, where {MOST} fit, and too many in {len(wrong)} such "
                "places: the mask has drifted."
            )


def check_masks(weights: Iterable[SparseWeight], expected: dict[str, Bool[Tensor, "*shape"]], step: int) -> None:
    """Check that masks are those that the last adaptation left.

    Args:
        weights: Weights under masks.
        expected: Copies of `kept`, by name, taken when the masks last changed on purpose.
        step: Optimizer steps done, for the message.

    Raises:
        InvariantError: If a mask changed in between.
    """
    for sparse in weights:
        changed = int((sparse.kept != expected[sparse.name]).sum())
        if changed:
            raise InvariantError(
                f"Mask: after step {step}, the mask of `{sparse.name}` ({sparse.pattern}) differs in {changed} positions "
                "from what the last adaptation left: something else wrote to it."
            )


def _check(sparse: SparseWeight, value: Tensor, rest: float, what: str, cause: str, step: int) -> None:
    wrong = (value != rest) & ~sparse.kept
    if wrong.any():
        first = tuple(wrong.nonzero()[0].tolist())
        raise InvariantError(
            f"{what.capitalize()}: after step {step}, {int(wrong.sum())} pruned positions of `{sparse.name}` "
            f"({sparse.pattern}) are not {rest or 'zero'}, the first at {first}: {cause}."
        )
