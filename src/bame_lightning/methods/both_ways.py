"""Masks that are 2:4 along the output dimension, too: requirements on patterns, checkpoints and processes."""

from __future__ import annotations

from collections.abc import Iterable

from jaxtyping import Bool, Float
from torch import Tensor

from bame_lightning.blocks.transposable import ROWS, both_ways_mask, fits_both_ways, fits_forward
from bame_lightning.weights.layers import LayerPlan, SparseWeight


def repaired(
    mask: Bool[Tensor, "blocks m"], weight: Float[Tensor, "blocks m"], plan: LayerPlan
) -> Bool[Tensor, "blocks m"]:
    """Repair the mask that `init` has made for a weight; both hold all rows, also those of other processes.

    Raises:
        ValueError: If the pattern does not allow it.
    """
    assert plan.pattern is not None
    if not fits_forward(plan.pattern):
        raise ValueError(
            f"`both_ways=True` makes masks 2:4 in both directions, so `pattern` must keep at most 2 of 4 consecutive "
            f"inputs, as 1:M and 2:4 do; got {plan.pattern}."
        )
    return both_ways_mask(mask, weight, len(plan.values) * plan.rows.parts)


def check_restored(weights: Iterable[SparseWeight]) -> None:
    """Check masks of a checkpoint.

    Raises:
        ValueError: If a mask is 2:4 along the input dimension only.
    """
    for sparse in weights:
        if not fits_both_ways(sparse.mask(), len(sparse.kept)):
            raise ValueError(
                f"`both_ways=True` goes on with masks that are 2:4 in both directions, but that of `{sparse.label}` in the "
                "checkpoint is not: its run did not set `both_ways`. Resume with both_ways=False, or load the weights and "
                "start a new run with `init='nonzero'`, which prunes what does not fit."
            )


def check_rows(weights: Iterable[SparseWeight]) -> None:
    """Check that each process holds whole groups of rows.

    Raises:
        ValueError: If a group is cut.
    """
    for sparse in weights:
        if not sparse.rows.whole and len(sparse.kept) % ROWS:
            raise ValueError(
                f"`both_ways=True` looks at {ROWS} consecutive rows of a weight, but {sparse.rows.parts} processes hold "
                f"{len(sparse.kept)} rows of `{sparse.label}` each, which {ROWS} does not divide. Use another number of "
                f"processes, or keep it dense with layers={{'{sparse.label}': 'dense'}}."
            )
