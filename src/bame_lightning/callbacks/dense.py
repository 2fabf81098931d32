"""Dense training with the books kept: what the other methods are compared with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
from torch.optim import Optimizer
from typing_extensions import override

from bame_lightning.callbacks.bookkeeping import Bookkeeper, KeepsBooks
from bame_lightning.layers import plan_layers
from bame_lightning.pattern import NMPattern


class Dense(KeepsBooks):
    """Change nothing, and book what training costs, beside SR-STE of the same pattern and layers.

    Args:
        pattern: "N:M" or an `NMPattern`, that of the comparison.
        layers: Rules that override the default choice of layers, as in `BAMECallback`.

    Raises:
        ValueError: If an argument is malformed.
    """

    def __init__(self, pattern: str | NMPattern, *, layers: Mapping[str, str | NMPattern] | None = None) -> None:
        super().__init__(pattern, layers)
        self._restored: dict[str, Any] | None = None

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._restored = None  # left by a test of another checkpoint; this fit's own is loaded later

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        restored, self._restored = self._restored or {}, None
        try:
            plans = plan_layers(pl_module, self.pattern, self.rules)
        except ValueError:
            plans = []  # a network that cannot be sparse may still be trained; SR-STE of it is dense, too
        densities = {plan.name: plan.pattern.density for plan in plans if plan.pattern}
        self.steps = restored.get("steps", self.steps if trainer.global_step else 0)
        if restored or not self.steps:
            self.books = Bookkeeper(densities, restored=restored.get("flops"))
        self._ranks = trainer.world_size

    @override
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        self.books.book({}, self._ranks)
        self.steps += 1

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if trainer._logger_connector.should_update_logs:
            pl_module.log_dict(self.books.metrics(), on_step=True, on_epoch=False)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "flops": self.books.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict

    def summary(self) -> dict[str, Any]:
        """Optimizer steps and training FLOPs (counted, not executed), in plain types."""
        return {"steps": self.steps, "flops": self.books.metrics()}
