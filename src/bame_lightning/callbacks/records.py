"""What a run leaves behind: its state in a checkpoint, and its summary."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bame_lightning.weights.mask_set import mask_statistics
from bame_lightning.weights.saved_state import STATE_VERSION, VERSION_KEY

if TYPE_CHECKING:
    from bame_lightning.callbacks.driver import SparseCallback


def state_of(callback: SparseCallback) -> dict[str, Any]:
    """The evolving state, in tensors and plain types."""
    flops = callback.ranks.mean(callback.books.state_dict())
    return {
        VERSION_KEY: STATE_VERSION,
        **callback.training.state(),
        **callback.members.state_dict(),
        "flops": {name: float(booked) for name, booked in flops.items()},
        "compute": callback.training.execution.state(),
    }


def summary_of(callback: SparseCallback) -> dict[str, Any]:
    """What the run did, in plain types; see `SparseCallback.summary`.

    Raises:
        RuntimeError: Before the first fit.
    """
    weights, ranks = callback.weights, callback.ranks
    if not weights and not callback.steps:
        raise RuntimeError(f"{type(callback).__name__} has not been fitted, so there is nothing to sum up.")
    masks = ranks.mean(mask_statistics(weights))
    return {
        "pattern": str(callback.pattern),
        "layers": {sparse.label: str(sparse.pattern) for sparse in weights},
        "density": float(masks["bame/density"]),
        "survival": float(masks["bame/survival"]),
        "steps": callback.steps,
        "flops": {name: float(value) for name, value in ranks.mean(callback.books.metrics()).items()},
        "compute": {name: choice.words for name, choice in callback.training.execution.choices.items()} or "dense",
        **callback.method.summary(ranks.mean),
    }
