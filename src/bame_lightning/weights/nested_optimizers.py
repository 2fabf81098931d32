"""Optimizers inside other optimizers, which wrap or chain them."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

_NO_OPTIMIZERS = ("state", "param_groups", "defaults")
"""Attributes that are not searched for optimizers: they are as large as the model, or hold none."""


def held_by(*optimizers: Any) -> set[int]:
    """`id`s of the parameters that optimizers hold."""
    return {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}


def nested_optimizers(optimizer: Any) -> list[Any]:
    """The optimizers inside an optimizer: those that it wraps or chains, and those inside these."""
    found: list[Any] = [optimizer]
    for outer in found:
        attributes = [value for name, value in vars(outer).items() if name not in _NO_OPTIMIZERS]
        containers = [value for value in attributes if isinstance(value, dict | list | tuple)]
        parts = (value for part in containers for value in (part.values() if isinstance(part, dict) else part))
        for value in (*attributes, *parts):
            if _is_optimizer(value) and all(value is not other for other in found):
                found.append(value)
    return found[1:]


def _is_optimizer(value: Any) -> bool:
    return isinstance(value, Optimizer) or (
        hasattr(value, "param_groups") and not isinstance(value, type) and callable(getattr(value, "step", None))
    )
