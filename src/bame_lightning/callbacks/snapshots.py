"""Record masks at intervals, for pictures after the run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from typing_extensions import override

from bame_lightning.bame.schedule import Window
from bame_lightning.callbacks.bame import BAMECallback
from bame_lightning.callbacks.driver import SparseCallback
from bame_lightning.callbacks.watcher import MaskWatcher, evolving_layers, maps_of
from bame_lightning.checkpoints.replacing import replacing
from bame_lightning.show.mask_file import FILE, Snapshots, Trace, layer_of


class MaskSnapshots(MaskWatcher):
    """Save bounded maps of every sparse layer at a bounded number of adaptations, for `bame-report`.

    It saves the masks at the start, and those after adaptations that are spaced evenly over the method's window; for a method
    without a schedule, after steps that are spaced evenly over the run. The blocks that oscillate most are followed through
    every adaptation, from the first look at which they lead. Everything goes to one small file, `snapshots.npz`, which is
    written anew each time. Checkpoints hold it, too, so that a resumed run has the earlier snapshots. Of sharded weights the
    rows of the first process are recorded. Without a method of this package it does nothing.

    Args:
        folder: The run's folder, where the file goes.
        at_most: Number of snapshots after the first one.

    Raises:
        ValueError: If `at_most` is less than 1.

    Example:
        >>> MaskSnapshots("run").path.as_posix()
        'run/snapshots.npz'
    """

    def __init__(self, folder: str | Path, *, at_most: int = 20) -> None:
        super().__init__(at_most)
        self.path = Path(folder) / FILE
        self.snapshots = Snapshots()
        self._contents = b""

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self.method is None and trainer.is_global_zero:
            self.path.unlink(missing_ok=True)  # of an earlier run in the same folder

    @override
    def begin(self, trainer: L.Trainer, method: SparseCallback) -> None:
        freezes = any(layer.freezes for layer in evolving_layers(method).values())
        layers = [layer_of(sparse, freezes=freezes) for sparse in method.weights]
        if self.snapshots.layers != layers or not method.steps:
            self.snapshots = Snapshots(layers)
        self.snapshots.drop_after(method.steps)
        if not self.snapshots.steps:
            self._record(method)
        self._write()

    @override
    def look(self, trainer: L.Trainer, method: SparseCallback) -> None:
        self._record(method)
        self._write()

    @override
    def traces(self) -> Sequence[Trace]:
        return self.snapshots.traces

    @override
    def state_dict(self) -> dict[str, Any]:
        if isinstance(self.method, BAMECallback):
            # A run that is resumed from here would lack what was copied since the last look.
            self.restless.look(self.method)
            self._pack()
        # A copy: a checkpoint may be written while training goes on.
        return {"snapshots": torch.from_numpy(np.frombuffer(self._contents, np.uint8).copy())}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._contents = state_dict["snapshots"].cpu().numpy().tobytes()
        self.snapshots = Snapshots.from_bytes(self._contents) if self._contents else Snapshots()

    def _record(self, method: SparseCallback) -> None:
        evolving = evolving_layers(method)
        maps = [maps_of(sparse, evolving.get(sparse.name)) for sparse in method.weights]
        self.snapshots.add(method.steps, None if self.window is None else done(self.window, method.steps), maps)

    def _pack(self) -> None:
        self.snapshots.traces = self.restless.traces
        self._contents = self.snapshots.to_bytes()

    def _write(self) -> None:
        self._pack()
        with replacing(self.path) as part:
            part.write_bytes(self._contents)


def done(window: Window, steps: int) -> int:
    """Count the adaptations that are over after so many optimizer steps.

    Example:
        >>> [done(Window(start=10, stop=35, every=10), steps) for steps in (0, 10, 19, 20, 30, 90)]
        [0, 0, 0, 1, 2, 2]
    """
    return min(window.adaptations, max(0, (steps - window.start) // window.every))
