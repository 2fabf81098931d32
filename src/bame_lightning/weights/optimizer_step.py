"""The step that an optimizer takes."""

from __future__ import annotations

from typing import Any, NamedTuple
from warnings import warn

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.optim import Optimizer

from bame_lightning.weights.nested_optimizers import held_by, nested_optimizers


class UpdateRule(NamedTuple):
    r"""The step that an optimizer would take for a gradient g: $u = \text{rate} \cdot g$.

    Args:
        learning_rate: For SGD $\eta = lr / (1 - \text{momentum})$, by which a lasting gradient of 1 moves a weight per
            step; for adaptive optimizers lr.
        second_moment: s, the running mean of squared gradients, shaped like the weight; None for SGD.
        correction: Divides s for its bias, $1 - \beta_2^t$.
        eps: Keeps the denominator positive.
    """

    learning_rate: float | Tensor
    second_moment: Tensor | None = None
    correction: float | Tensor = 1.0
    eps: float = 0.0


def update_rule(optimizer: Optimizer, weight: nn.Parameter) -> UpdateRule:
    """Read off the optimizer how far it moves `weight` for a gradient.

    Optimizers with a `momentum` step like SGD; Adam, AdamW, NAdam, RAdam, RMSprop and Adagrad divide by the root of their
    second moment. RAdam's first, unrectified steps, amsgrad and Adagrad's `lr_decay` are not followed. The step of any
    other optimizer is unknown: with a warning it is taken to be that of SGD without momentum.

    Args:
        optimizer: An optimizer that holds `weight`.
        weight: One of its parameters.

    Returns:
        The rule at the current step.

    Raises:
        ValueError: If the optimizer maximizes.
    """
    # The one that updates the weight is the innermost that holds it.
    inside = [inner for inner in nested_optimizers(optimizer) if id(weight) in held_by(inner)]
    holder = inside[-1] if inside else optimizer
    group = next(group for group in holder.param_groups if any(p is weight for p in group["params"]))
    if group.get("maximize", False):
        raise ValueError(
            "BAME follows gradients downhill; the optimizer has `maximize=True`. Minimize the negated loss instead."
        )
    state: dict[str, Any] = holder.state.get(weight, {})
    momentum = group.get("momentum", 0.0)
    rate = group["lr"] * (1 - group.get("dampening", 0.0) * (momentum > 0)) / (1 - momentum)
    # Adadelta keeps a `square_avg`, too, but steps by a ratio of two means.
    keys = () if "rho" in group else ("exp_avg_sq", "square_avg", "sum")
    moment = next((state[key] for key in keys if key in state), None)
    if moment is None and "momentum" not in group:
        warn(
            f"How far {type(optimizer).__name__} moves a weight is not known; evidence of pruned weights moves by lr times "
            "the gradient. Use SGD, Adam, AdamW, RMSprop or Adagrad for evidence of the right size.",
            stacklevel=2,
        )
    correction: float | Tensor = 1.0
    if "betas" in group and "step" in state:
        correction = 1 - group["betas"][1] ** state["step"]
    return UpdateRule(rate, moment, correction, group.get("eps", 0.0))


def block_rates(
    rule: UpdateRule,
    second_moment: Float[Tensor, "blocks m"] | None,
    gradient: Float[Tensor, "blocks m"],
    mask: Bool[Tensor, "blocks m"],
    n: int,
) -> Float[Tensor, "blocks 1"]:
    r"""Step size of the optimizer in each block, $\eta_b$ with $u = \eta_b g$.

    Pruned weights have no second moment of their own: the mean $\bar s$ over the kept ones stands in, but no less than the
    mean square of the gradient that was read (ours). For where kept weights get no gradient (a dead input), or have
    just been revived, $\bar s$ is about 0, and one reading would throw the evidence as far as $lr / \epsilon$.

    Args:
        rule: The optimizer's rule.
        second_moment: s in these blocks; None for SGD.
        gradient: g, the dense gradient of these blocks.
        mask: True where kept.
        n: Weights kept per block.

    Returns:
        $\eta$ for SGD, $lr / (\sqrt{\max(\bar s / \text{correction}, \overline{g^2})} + \epsilon)$ for adaptive optimizers
        (0 where nothing is known at all), in the type of `gradient`.
    """
    rate = torch.as_tensor(rule.learning_rate, dtype=gradient.dtype, device=mask.device)
    if second_moment is None:
        return rate.expand(len(mask), 1)
    correction = torch.as_tensor(rule.correction, dtype=gradient.dtype, device=mask.device)
    kept = (second_moment.to(gradient.dtype) * mask).sum(-1, keepdim=True) / n
    mean = torch.maximum(kept / correction, gradient.square().mean(-1, keepdim=True))
    return torch.where(mean > 0, rate / (mean.sqrt() + rule.eps), 0)
