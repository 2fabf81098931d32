"""Optimizers under which zero stays zero."""

from __future__ import annotations

from typing import Any

import torch

from bame_lightning.weights.nested_optimizers import nested_optimizers

KNOWN = frozenset(
    {
        torch.optim.SGD,
        torch.optim.Adam,
        torch.optim.AdamW,
        torch.optim.NAdam,
        torch.optim.RAdam,
        torch.optim.RMSprop,
        torch.optim.Adagrad,
        torch.optim.Adadelta,
        torch.optim.Rprop,
    }
)
"""Optimizers whose update is zero where weight, gradient and state are zero; `tests/weights/test_fixed_point.py` shows it.

Their subclasses are not among them, because they may update otherwise. Nor is ASGD, which keeps an average, nor Adamax, whose
state becomes `eps`.
"""


def keeps_zeros(optimizer: Any) -> bool:
    """Whether a weight at zero stays there if its gradient and state are zero, with momentum and weight decay, too.

    Args:
        optimizer: The optimizer.

    Returns:
        False also if that is unknown: for optimizers that are not torch's, for those with others inside, and for those that
        would divide zero by zero.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> keeps_zeros(torch.optim.AdamW([weight])), keeps_zeros(torch.optim.AdamW([weight], eps=0.0))
        (True, False)
    """
    # Learning-rate schedulers patch `step`, too, but call the class's.
    patched = "step" in vars(optimizer) and not hasattr(optimizer.step, "_wrapped_by_lr_sched")
    if type(optimizer) not in KNOWN or patched or nested_optimizers(optimizer):
        return False
    return all(group.get("eps", 1.0) > 0 for group in optimizer.param_groups)
