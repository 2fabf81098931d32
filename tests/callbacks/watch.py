"""The promises of N:M sparse training, checked with plain torch around every optimizer step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer


def most_in_a_block(weight: Tensor, m: int = 4) -> int:
    """Non-zeros in the fullest block of `m` weights that are consecutive along the input dimension."""
    return int(weight.detach().movedim(1, -1).reshape(-1, m).ne(0).sum(-1).max())


class Watch(L.Callback):
    """Look at weights, gradients, optimizer state and masks around every step of any optimizer; list it after the method.

    Args:
        method: The callback that is watched.
        names: Weights that must be 2:4 sparse, or 1:4, all of them.
        masked: Whether their gradients and optimizer state must be sparse, too.
    """

    def __init__(self, method: Any, names: Iterable[str], masked: bool) -> None:
        self.method, self.names, self.masked = method, sorted(names), masked
        self.steps = 0
        self.moves = 0
        self.norms: list[float] = []
        self.largest: list[float] = []
        self.kept: dict[str, Tensor] = {}
        self._handles: list[Any] = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Before the method's hook: these see gradients as the update has used them.
        self._handles = [o.register_step_post_hook(self._after_update) for o in trainer.optimizers]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.weights = {n.replace("_orig_mod.", ""): p for n, p in pl_module.named_parameters()}
        assert sorted(s.name.replace("_orig_mod.", "") for s in self.method.weights) == self.names
        self.module = pl_module
        self._look(trainer.optimizers)
        self.moves = 0
        for optimizer in trainer.optimizers:
            self._handles.append(optimizer.register_step_post_hook(lambda *_: self._look(trainer.optimizers)))

    def _after_update(self, optimizer: Optimizer, *_: Any) -> None:
        held = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in held if p.grad is not None] or [torch.zeros(1)]
        self.norms.append(float(torch.stack([g.double().square().sum() for g in gradients]).sum().sqrt()))
        self.largest.append(float(torch.stack([g.abs().max() for g in gradients]).max()))
        if not any(p is self.weights[self.names[0]] for p in held):
            return
        self.steps += 1
        for name in self.names if self.masked else ():
            gradient = self.weights[name].grad
            if gradient is not None:
                assert most_in_a_block(gradient) <= 2
                assert not gradient[~self.kept[name]].any()

    def _look(self, optimizers: list[Optimizer]) -> None:
        for sparse in self.method.weights:
            name = sparse.name.replace("_orig_mod.", "")
            kept = sparse.kept.clone()
            self.moves += name in self.kept and not torch.equal(kept, self.kept[name])
            self.kept[name] = kept
            allowed = kept.movedim(1, -1).reshape(-1, 4).sum(-1)
            assert sparse.pattern.m == 4
            assert allowed.min() == allowed.max() == sparse.pattern.n
            assert self.weights[name] is sparse.weight
        for name in self.names:
            weight, kept = self.weights[name], self.kept[name]
            assert most_in_a_block(weight) <= 2
            assert not weight[~kept].any()
            for optimizer in optimizers if self.masked else ():
                for value in optimizer.state.get(weight, {}).values():
                    if isinstance(value, Tensor) and value.shape == weight.shape:
                        assert most_in_a_block(value) <= 2
                        assert not value[~kept].any()

    def on_before_backward(self, trainer: L.Trainer, *_: Any) -> None:
        self._look(trainer.optimizers)  # what the forward pass has used

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._look(trainer.optimizers)

    def on_train_end(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()
