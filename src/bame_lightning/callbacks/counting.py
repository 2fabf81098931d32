"""Count the forward pass of a real training step, from within that step."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from bame_lightning.ledger.flops import MacCounter


class CountedStep:
    """Count the products of the next training step, up to its first backward pass.

    Dispatch modes form a stack. If ours were entered in one hook and left in another, it would take a user's mode off the
    stack, or be left inside a compiled step. So the strategy's `training_step` is replaced for one call, in which the mode is
    both entered and left. The model itself is not touched.

    Args:
        strategy: The strategy that is about to call `training_step`.
        model: The model, whose parameters the products are counted for.
    """

    def __init__(self, strategy: Any, model: nn.Module) -> None:
        self._strategy = strategy
        self._counter = MacCounter(model)
        self._patched = vars(strategy).get("training_step")
        self._removed = False
        step = strategy.training_step

        def counted(*args: Any, **kwargs: Any) -> Any:
            if self._removed:
                return step(*args, **kwargs)  # somebody has wrapped this wrapper since, and calls it again
            self._remove()
            with self._counter:
                return step(*args, **kwargs)

        # The whole step runs inside the optimizer's step, which may be compiled.
        self._counted: Any = torch.compiler.disable(counted)  # type: ignore[no-untyped-call]
        strategy.training_step = self._counted

    def end(self) -> MacCounter:
        """Count nothing more and leave the strategy as it was found; return the counts."""
        self._remove()
        self._counter.stop()
        return self._counter

    def _remove(self) -> None:
        self._removed = True
        if vars(self._strategy).get("training_step") is not self._counted:
            return
        if self._patched is None:
            del self._strategy.training_step
        else:
            self._strategy.training_step = self._patched
