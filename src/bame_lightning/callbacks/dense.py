"""Dense training whose costs are booked, as the comparison for all other methods."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
from torch.optim import Optimizer
from typing_extensions import override

from bame_lightning.blocks.pattern import NMPattern
from bame_lightning.callbacks.base import MethodCallback
from bame_lightning.callbacks.bookkeeping import Bookkeeper
from bame_lightning.weights.layers import LayerPlan, plan_layers
from bame_lightning.weights.nested_optimizers import held_by
from bame_lightning.weights.reasons import COMPUTED, UNREACHED
from bame_lightning.weights.sharding import reshard


class Dense(MethodCallback):
    """Change nothing, but book what training costs, beside SR-STE of the same pattern and layers.

    Args:
        pattern: "N:M" or an `NMPattern`: that of SR-STE.
        layers: Rules that override the default choice of layers, as in `BAMECallback`.

    Raises:
        ValueError: If an argument is malformed.
    """

    def __init__(self, pattern: str | NMPattern, *, layers: Mapping[str, str | NMPattern] | None = None) -> None:
        self._steps = 0
        super().__init__(pattern, layers)
        self._waiting: list[LayerPlan] = []
        self._found: dict[str, str] = {}

    @property
    @override
    def steps(self) -> int:
        self.come_home()
        return self._steps

    @steps.setter
    def steps(self, steps: int) -> None:
        self._steps = steps

    @override
    def take_home(self, told: dict[str, Any]) -> None:
        self._steps, self.books = told["steps"], Bookkeeper({}, restored=told["flops"])

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        restored, self.restored = self.restored or {}, None
        try:
            plans = self._plan(trainer, pl_module, {})
        except ValueError:
            plans = []  # a network that cannot be sparse may still be trained; SR-STE of it is dense, too
        self.steps = restored.get("steps", self.steps if trainer.global_step else 0)
        self.open_books(_densities(plans), restored)
        self._waiting, self._found = plans, {}
        self._ranks = trainer.world_size

    @override
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        self._settle(trainer, pl_module, optimizer)
        self.books.book({}, self._ranks)
        self.steps += 1

    def _settle(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """At an optimizer's first step, take layers out of the comparison that SR-STE would leave dense."""
        held = held_by(optimizer)
        judged = [plan for plan in self._waiting if id(plan.weight) in held]
        if judged:
            self._waiting = [plan for plan in self._waiting if id(plan.weight) not in held]
            unreached = {plan.name: UNREACHED for plan in judged if plan.weight.grad is None}
            self._found |= dict.fromkeys(self.books.computed, COMPUTED) | unreached
            if self._found:
                self.books.follow(_densities(self._plan(trainer, pl_module, self._found)), unreached)

    def _plan(self, trainer: L.Trainer, pl_module: L.LightningModule, found: Mapping[str, str]) -> list[LayerPlan]:
        reshard(pl_module)
        return plan_layers(pl_module, self.pattern, self.rules, held_by(*trainer.optimizers), found=found)

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if trainer._logger_connector.should_update_logs:
            pl_module.log_dict(self.books.metrics(), on_step=True, on_epoch=False)

    @override
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._home.send(self.state_dict(), first=trainer.is_global_zero)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "flops": self.books.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.restored = state_dict

    def summary(self) -> dict[str, Any]:
        """Optimizer steps and training FLOPs (counted, not executed), in plain types."""
        return {"steps": self.steps, "flops": self.books.metrics()}


def _densities(plans: list[LayerPlan]) -> dict[str, float]:
    return {plan.name: plan.pattern.density for plan in plans if plan.pattern}
