"""Refuse, before training starts, strategies and optimizers under which masks could not hold."""

from __future__ import annotations

from typing import Any, NoReturn

import lightning as L
import torch
from torch.optim import Optimizer

from bame_lightning.blocks.pattern import NMPattern
from bame_lightning.callbacks.packages import averaging_callbacks, known
from bame_lightning.methods.holder import Holder
from bame_lightning.weights.nested_optimizers import held_by, nested_optimizers

_REMEDY = (
    "Use `strategy='ddp'`, or FSDP2: `ModelParallelStrategy(data_parallel_size=..., tensor_parallel_size=1)` with "
    "`fully_shard` in the module's `configure_model`."
)
_REFUSED = {
    "FSDPStrategy": (
        "FSDP1 flattens weights and cuts them anywhere, in the middle of blocks too, so that no process can keep N of M"
    ),
    "DeepSpeedStrategy": (
        "DeepSpeed updates flat copies of the weights in an optimizer of its own, which masks do not reach"
    ),
}


def refuse_strategy(trainer: L.Trainer) -> None:
    """Refuse strategies under which masks could not hold; sharded weights themselves are checked by `Rows.of`.

    Args:
        trainer: The Trainer, before it has set up anything.

    Raises:
        ValueError: If masks could not hold.
    """
    name = type(trainer.strategy).__name__
    strategy: Any = trainer.strategy
    for refused, why in _REFUSED.items():
        if isinstance(strategy, known("strategies", refused)):
            raise ValueError(f"`strategy` {name} cannot train N:M sparse weights: {why}. {_REMEDY}")
    if isinstance(strategy, known("strategies", "ModelParallelStrategy")):
        tensor_parallel = strategy.device_mesh["tensor_parallel"].size()
        if tensor_parallel > 1:
            raise ValueError(
                f"`strategy` {name} has `tensor_parallel_size` {tensor_parallel}, and tensor parallelism may cut blocks of "
                f"weights along the input dimension. {_REMEDY}"
            )
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, averaging_callbacks()):
                raise ValueError(
                    f"`callbacks` holds {type(callback).__name__}, whose average of the weights is not sharded as `strategy` "
                    f"{name} shards them, so masks cannot follow it. Leave it out, or use `strategy='ddp'`."
                )


def find_holders(trainer: L.Trainer, pl_module: L.LightningModule, sparse: set[int]) -> list[Optimizer]:
    """Find the optimizers that hold weights with these `id`s.

    Raises:
        ValueError: If masks could not hold under one of them.
    """
    holders = [optimizer for optimizer in trainer.optimizers if sparse & held_by(optimizer)]
    for optimizer in holders:
        _refuse(trainer, pl_module, optimizer)
    for name, weight in pl_module.named_parameters():
        both = [type(optimizer).__name__ for optimizer in holders if id(weight) in sparse & held_by(optimizer)]
        if len(both) > 1:
            raise ValueError(
                f"`configure_optimizers` returns {' and '.join(both)} with the sparse weight `{name}` in common, whose mask "
                "cannot follow the steps of both. Give it to one optimizer, or keep it dense with "
                f"layers={{'{name}': 'dense'}}."
            )
    return holders


def refuse_replaced(trainer: L.Trainer, stepping: Optimizer) -> None:
    """Refuse a step of an optimizer that was replaced in the Trainer's list: Lightning still steps the old one."""
    if all(stepping is not optimizer for optimizer in trainer.optimizers):
        raise ValueError(
            f"`trainer.optimizers` no longer holds the {type(stepping).__name__} that steps: an entry of the list was "
            "replaced, which Lightning does not follow. Assign a list, `trainer.optimizers = [...]`; under manual optimization "
            "step what `self.optimizers()` returns after that."
        )


def _refuse(trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
    if any(isinstance(found, torch.optim.LBFGS) for found in (optimizer, *nested_optimizers(optimizer))):
        raise ValueError(
            "`configure_optimizers` returns LBFGS, which steps along gradients of earlier steps, when other masks held. Use an "
            "optimizer that keeps one value per weight, as SGD or AdamW."
        )
    if any(group.get("maximize") for group in optimizer.param_groups):
        raise ValueError(
            "`configure_optimizers` returns an optimizer with `maximize=True`, but masks follow gradients downhill. Minimize "
            "the negated loss instead."
        )
    scaled = scales_loss(trainer)
    if scaled and not pl_module.automatic_optimization:
        raise ValueError(
            "Manual optimization with a loss scaler (`precision='16-mixed'`) shows gradients only scaled, so masks cannot "
            "follow them. Use `precision='bf16-mixed'` or automatic optimization."
        )
    if scaled and getattr(optimizer, "_step_supports_amp_scaling", False):
        raise ValueError(
            "A fused optimizer under a loss scaler (`precision='16-mixed'`) unscales gradients inside its step, after the "
            "masks have read them. Use `fused=False`, or `precision='bf16-mixed'`."
        )


def refuse_unknown_masks(checkpoint: Any, method: str, pattern: NMPattern) -> NoReturn:
    """Refuse to resume from a checkpoint that holds no masks."""
    raise ValueError(
        f"The checkpoint `ckpt_path` = {checkpoint} holds no state of {method}, so its masks are "
        f"unknown. If its weights are {pattern} sparse, resume with {method}(..., init='nonzero') to "
        "rebuild the masks from their zeros; otherwise load the weights and start a new run."
    )


def refuse_local_gradients(trainer: L.Trainer) -> None:
    """Refuse backward passes under `no_sync` of DDP, which `require_backward_grad_sync` shows."""
    if not getattr(trainer.strategy.model, "require_backward_grad_sync", True):
        raise ValueError(
            "`manual_backward` under `no_sync` of DDP makes gradients of this rank only, and masks that follow them would "
            "differ between ranks. Let every backward pass synchronise, or accumulate by automatic optimization with "
            "`accumulate_grad_batches`."
        )


def refuse_backward(holder: Holder, method: str) -> None:
    """Refuse a step on gradients that no backward pass has shown (manual optimization)."""
    if not holder.backward and any(sparse.weight.grad is not None for sparse in holder.weights):
        raise RuntimeError(
            "`training_step` steps the optimizer of sparse weights on gradients that no `self.manual_backward` has made, "
            f"so {method} could not see them before they are clipped. Call `self.manual_backward(loss)` "
            "where it calls `loss.backward()` or writes gradients."
        )


def scales_loss(trainer: L.Trainer) -> bool:
    """Whether a loss scaler may skip steps."""
    return getattr(trainer.precision_plugin, "scaler", None) is not None
