"""Record how masks look now and then, for pictures after the run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from typing_extensions import override

from bame_lightning.callbacks.bame import BAMECallback
from bame_lightning.callbacks.base import SparseCallback, total_steps
from bame_lightning.schedule import Schedule, Window
from bame_lightning.snapshots import FILE, LayerMaps, Snapshots, layer_maps, layer_of, write_snapshots


class MaskSnapshots(L.Callback):
    """Save bounded maps of every sparse layer at a bounded number of adaptations, for `bame-report`.

    The masks at the start, and then those after adaptations that are spaced evenly over the method's window; a method without
    a schedule is looked at in steps spaced evenly over the run. All go to one small file, `snapshots.npz`, which is written
    anew each time; and into checkpoints, so that a resumed run has those from before. Of sharded weights, the rows of
    the first process are recorded. Does nothing where no method of this package trains a sparse network.

    Args:
        folder: Where the file goes: the run's folder.
        at_most: Snapshots after the first one.

    Raises:
        ValueError: If `at_most` is less than 1.

    Example:
        >>> MaskSnapshots("run").path.as_posix()
        'run/snapshots.npz'
    """

    def __init__(self, folder: str | Path, *, at_most: int = 20) -> None:
        if at_most < 1:
            raise ValueError(f"`at_most` must be a number of snapshots, at least 1; got {at_most}.")
        self.path = Path(folder) / FILE
        self.at_most = at_most
        self.snapshots = Snapshots()
        self._contents = b""
        self._method: SparseCallback | None = None
        self._window: Window | None = None
        self._moments: list[int] = []

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        self._method = next((found for found in callbacks if isinstance(found, SparseCallback)), None)
        if not trainer.is_global_zero:
            self._method = None
        elif self._method is None:
            self.path.unlink(missing_ok=True)  # of an earlier run in the same folder
        if self._method is None:
            return
        schedule: Schedule | None = getattr(self._method, "schedule", None)
        steps = total_steps(trainer, schedule or Schedule())
        self._window = schedule.window(steps) if schedule else None
        looked_at = self._window or Window(0, int(steps) if math.isfinite(steps) else 0, 1)
        self._moments = [step for step in moments(looked_at, self.at_most) if step > self._method.steps]
        evolving = self._method.evolving if isinstance(self._method, BAMECallback) else []
        freezes = bool(evolving) and evolving[0].freeze_after is not None
        layers = [layer_of(sparse, freezes=freezes) for sparse in self._method.weights]
        if self.snapshots.layers != layers or not self._method.steps:
            self.snapshots = Snapshots(layers)
        self.snapshots.drop_after(self._method.steps)
        if not self.snapshots.steps:
            self._record()
        self._write()

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._method is None or not self._moments or self._method.steps < self._moments[0]:
            return
        self._moments = [step for step in self._moments if step > self._method.steps]
        self._record()
        self._write()

    @override
    def state_dict(self) -> dict[str, Any]:
        # A copy: a checkpoint may be written while training goes on.
        return {"snapshots": torch.from_numpy(np.frombuffer(self._contents, np.uint8).copy())}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._contents = state_dict["snapshots"].cpu().numpy().tobytes()
        self.snapshots = Snapshots.from_bytes(self._contents) if self._contents else Snapshots()

    def _record(self) -> None:
        assert self._method is not None
        evolving = self._method.evolving if isinstance(self._method, BAMECallback) else []
        histories = {weight.sparse.name: weight for weight in evolving}
        maps = list[LayerMaps]()
        for sparse in self._method.weights:
            weight = histories.get(sparse.name)
            if weight is None:
                maps.append(layer_maps(sparse))
            else:
                frozen = None if weight.freeze_after is None else weight.frozen
                maps.append(layer_maps(sparse, weight.history.oscillations, frozen))
        steps = self._method.steps
        self.snapshots.add(steps, None if self._window is None else done(self._window, steps), maps)

    def _write(self) -> None:
        self._contents = self.snapshots.to_bytes()
        write_snapshots(self._contents, self.path)


def moments(window: Window, at_most: int) -> list[int]:
    """Choose adaptations that are spaced evenly over a window, the last one among them.

    Args:
        window: When masks adapt.
        at_most: How many to choose.

    Returns:
        For each the optimizer steps done when it is over.

    Example:
        >>> moments(Window(start=10, stop=100, every=10), at_most=3)
        [40, 70, 100]
    """
    count = min(at_most, window.adaptations)
    chosen = [round(index * window.adaptations / count) for index in range(1, count + 1)]
    return [window.start + number * window.every for number in chosen]


def done(window: Window, steps: int) -> int:
    """Count the adaptations that are over after so many optimizer steps.

    Example:
        >>> [done(Window(start=10, stop=35, every=10), steps) for steps in (0, 10, 19, 20, 30, 90)]
        [0, 0, 0, 1, 2, 2]
    """
    return min(window.adaptations, max(0, (steps - window.start) // window.every))
