"""A static mask: the bound in FLOPs, and the accuracy that evolution has to beat."""

from __future__ import annotations

from bame_lightning.callbacks.base import SparseCallback


class StaticMask(SparseCallback):
    """Train under the masks made at the start; they never change.

    Takes the arguments of `SparseCallback`.

    Example:
        >>> str(StaticMask("2:4", init="random").pattern)
        '2:4'
    """
