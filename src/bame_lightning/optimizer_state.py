"""What an optimizer keeps of a weight: zero it where pruned, and read the step it takes off it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple
from warnings import warn

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.optim import Optimizer

# State of torch's optimizers that holds one value per weight, and of others that use the same names.
ELEMENTWISE = set(
    {
        "acc_delta",  # Adadelta
        "ax",  # ASGD
        "exp_avg",  # Adam, AdamW, NAdam, RAdam, Adamax
        "exp_avg_sq",
        "exp_inf",  # Adamax
        "grad_avg",  # RMSprop, centered
        "max_exp_avg_sq",  # Adam, amsgrad
        "momentum_buffer",  # SGD, RMSprop
        "prev",  # Rprop
        "square_avg",  # RMSprop, Adadelta
        "sum",  # Adagrad
    }
)
# One value per weight as well, but zero would stop it for good.
STEP_SIZES = frozenset({"step_size"})  # Rprop


class UpdateRule(NamedTuple):
    r"""The step that an optimizer would take for a gradient g: $u = \text{rate} \cdot g$.

    Args:
        learning_rate: $\eta = lr / (1 - \text{momentum})$, what a lasting gradient moves a weight per step (SGD), or lr
            (adaptive optimizers); what weight decay multiplies.
        weight_decay: Weight decay, wd.
        second_moment: s, the running mean of squared gradients, shaped like the weight; None for SGD.
        correction: Divides s for its bias, $1 - \beta_2^t$.
        eps: Keeps the denominator positive.
    """

    learning_rate: float | Tensor
    weight_decay: float
    second_moment: Tensor | None = None
    correction: float | Tensor = 1.0
    eps: float = 0.0


def update_rule(optimizer: Optimizer, weight: nn.Parameter) -> UpdateRule:
    """Read off the optimizer how far it moves `weight` for a gradient.

    An optimizer that keeps a second moment (Adam, AdamW, RMSprop, Adagrad) divides by its root; any other is taken to
    step like SGD.

    Args:
        optimizer: An optimizer that holds `weight`.
        weight: One of its parameters.

    Returns:
        The rule at the current step.

    Raises:
        ValueError: If the optimizer maximizes.
    """
    group = next(group for group in optimizer.param_groups if any(p is weight for p in group["params"]))
    if group.get("maximize", False):
        raise ValueError(
            "BAME follows gradients downhill; the optimizer has `maximize=True`. Minimize the negated loss instead."
        )
    state: dict[str, Any] = optimizer.state.get(weight, {})
    momentum = group.get("momentum", 0.0)
    rate = group["lr"] * (1 - group.get("dampening", 0.0) * (momentum > 0)) / (1 - momentum)
    moment = next((state[key] for key in ("exp_avg_sq", "square_avg", "sum") if key in state), None)
    correction: float | Tensor = 1.0
    if "betas" in group and "step" in state:
        correction = 1 - group["betas"][1] ** state["step"]
    return UpdateRule(rate, group.get("weight_decay", 0.0), moment, correction, group.get("eps", 0.0))


def block_rates(
    rule: UpdateRule,
    second_moment: Float[Tensor, "blocks m"] | None,
    mask: Bool[Tensor, "blocks m"],
    n: int,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "blocks 1"]:
    r"""Step size of the optimizer in each block, $\eta_b$ with $u = \eta_b g$.

    Args:
        rule: The optimizer's rule.
        second_moment: s in these blocks; None for SGD.
        mask: True where kept. Pruned weights have no second moment of their own: the mean over kept ones stands in.
        n: Weights kept per block.
        dtype: Of the result.

    Returns:
        $\eta$ for SGD, $lr / (\sqrt{\bar s / \text{correction}} + \epsilon)$ for adaptive optimizers.
    """
    rate = torch.as_tensor(rule.learning_rate, dtype=dtype, device=mask.device)
    if second_moment is None:
        return rate.expand(len(mask), 1)
    correction = torch.as_tensor(rule.correction, dtype=dtype, device=mask.device)
    mean = (second_moment.to(dtype) * mask).sum(-1, keepdim=True) / n
    return rate / ((mean / correction).sqrt() + rule.eps)


def elementwise_state(optimizer: Optimizer, weight: nn.Parameter, name: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the optimizer state that holds one value per weight.

    Args:
        optimizer: An optimizer that holds `weight`.
        weight: One of its parameters.
        name: What to call the weight in messages.

    Yields:
        Key and tensor, shaped like the weight.

    Raises:
        ValueError: If state under an unknown key has the shape of a square weight: it may be a factor that mixes inputs or
            outputs (as Shampoo keeps), where a zero means something else.
    """
    for key, value in optimizer.state.get(weight, {}).items():
        if not isinstance(value, Tensor) or value.shape != weight.shape or key in STEP_SIZES:
            continue
        if key not in ELEMENTWISE:
            _check_unknown(optimizer, weight, name, key)
        yield key, value


def _check_unknown(optimizer: Optimizer, weight: nn.Parameter, name: str, key: str) -> None:
    kind = type(optimizer).__name__
    if weight.dim() == 2 and weight.shape[0] == weight.shape[1]:
        raise ValueError(
            f"`optimizer` {kind} keeps '{key}' for `{name}`, of the same square shape {tuple(weight.shape)}: one value per "
            f"weight and a matrix factor look alike there. Keep the layer dense with layers={{'{name}': 'dense'}}, use an "
            "optimizer of torch.optim, or add the key to `bame_lightning.optimizer_state.ELEMENTWISE` if it is elementwise."
        )
    warn(
        f"Optimizer {kind} is unknown; its state '{key}' has the shape of the weights and is taken to hold one value per "
        "weight: it is zeroed where weights are pruned.",
        stacklevel=2,
    )
