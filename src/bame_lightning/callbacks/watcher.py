"""When to look at masks: the base of callbacks that show them."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import lightning as L
from typing_extensions import override

from bame_lightning.bame.schedule import Schedule, Window
from bame_lightning.bame.table import EvolvingLayer
from bame_lightning.callbacks.bame import BAMECallback
from bame_lightning.callbacks.driver import SparseCallback
from bame_lightning.callbacks.restless import RestlessBlocks
from bame_lightning.callbacks.run_length import total_steps
from bame_lightning.show.mask_file import LayerMaps, Trace, layer_maps
from bame_lightning.weights.layers import SparseWeight


class MaskWatcher(L.Callback):
    """Look at the masks of the method in the same Trainer, on the first rank, at a bounded number of adaptations.

    It looks at the start of training, and after adaptations that are spaced evenly over the method's window; at a method
    without a schedule, after steps that are spaced evenly over the run.

    Args:
        at_most: Number of looks after the first one.

    Raises:
        ValueError: If `at_most` is less than 1.
    """

    def __init__(self, at_most: int) -> None:
        if at_most < 1:
            raise ValueError(f"`at_most` must be a number of looks at the masks, at least 1; got {at_most}.")
        self.at_most = at_most
        self.method: SparseCallback | None = None
        """The method that is watched; None if there is none, or on another rank."""
        self.window: Window | None = None
        self.restless = RestlessBlocks()
        self._moments: list[int] = []
        self._adaptations = 0

    @abstractmethod
    def begin(self, trainer: L.Trainer, method: SparseCallback) -> None:
        """Prepare, and look at the masks that training starts with."""

    @abstractmethod
    def look(self, trainer: L.Trainer, method: SparseCallback) -> None:
        """Look at the masks as they are."""

    def traces(self) -> Sequence[Trace]:
        """Traces of restless blocks from an earlier part of the run."""
        return ()

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        self.method = next((found for found in callbacks if isinstance(found, SparseCallback)), None)
        if not trainer.is_global_zero:
            self.method = None
        if self.method is None:
            return
        schedule: Schedule | None = getattr(self.method, "schedule", None)
        steps = total_steps(trainer, schedule or Schedule())
        self.window = schedule.window(steps) if schedule else None
        looked_at = self.window or Window(0, int(steps) if math.isfinite(steps) else 0, 1)
        self._moments = [step for step in moments(looked_at, self.at_most) if step > self.method.steps]
        if isinstance(self.method, BAMECallback):
            self._adaptations = self.method.adaptations
            self.restless.begin(self.method, self.traces())
        self.begin(trainer, self.method)

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if isinstance(self.method, BAMECallback) and self.method.adaptations > self._adaptations:
            self._adaptations = self.method.adaptations
            self.restless.record()
            # Masks move most at first: after 1, 2, 4, 8, ... adaptations other blocks may lead.
            if self._adaptations.bit_count() == 1:
                self.restless.look(self.method)
        if self.method is None or not self._moments or self.method.steps < self._moments[0]:
            return
        if isinstance(self.method, BAMECallback):
            self.restless.look(self.method)
        self._moments = [step for step in self._moments if step > self.method.steps]
        self.look(trainer, self.method)


def evolving_layers(callback: SparseCallback) -> dict[str, EvolvingLayer]:
    """The evolving state beside the masks, by the name of the weight; empty for methods without any."""
    return {layer.sparse.name: layer for layer in callback.evolving} if isinstance(callback, BAMECallback) else {}


def maps_of(sparse: SparseWeight, evolving: EvolvingLayer | None) -> LayerMaps:
    """Make the maps of a weight: its mask, and oscillations and frozen blocks where there are any."""
    if evolving is None:
        return layer_maps(sparse)
    return layer_maps(sparse, evolving.oscillations, evolving.frozen if evolving.freezes else None)


def moments(window: Window, at_most: int) -> list[int]:
    """Choose adaptations that are spaced evenly over a window, the last one among them.

    Args:
        window: When masks adapt.
        at_most: How many to choose.

    Returns:
        For each of them the number of optimizer steps done when it is over.

    Example:
        >>> moments(Window(start=10, stop=100, every=10), at_most=3)
        [40, 70, 100]
    """
    count = min(at_most, window.adaptations)
    chosen = [round(index * window.adaptations / count) for index in range(1, count + 1)]
    return [window.start + number * window.every for number in chosen]
