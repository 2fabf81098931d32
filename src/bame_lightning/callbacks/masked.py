"""Masks that never change: `StaticMask`, and `OneShotMagnitude` for a trained network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from typing_extensions import override

from bame_lightning.blocks.pattern import NMPattern
from bame_lightning.callbacks.driver import SparseCallback
from bame_lightning.checkpoints.files import load_weights
from bame_lightning.methods.execution import Compute
from bame_lightning.methods.masked import Masked
from bame_lightning.methods.training import Init
from bame_lightning.weights.saved_state import VERSION_KEY


class StaticMask(SparseCallback):
    """Train under the masks made at the start; they never change.

    No method trains with fewer FLOPs. A method that needs more must be more accurate to be worth them.

    Args:
        pattern: "N:M" or an `NMPattern`.
        layers: Rules that override the default choice of layers, as in `BAMECallback`.
        init: Which weights the masks keep, as in `BAMECallback`.
        rescale: Whether to rescale what is kept at first, as in `BAMECallback`.
        both_ways: Keep at most two weights of any four consecutive outputs of an input, so that sparse tensor cores multiply
            with the transposed weight, too. The first mask is repaired. The pattern must be 1:M, or 2:M where 4 divides M.
        verify: Check all invariants after every step (slow, for debugging).
        compute: How products of sparse layers are computed, as in `BAMECallback`.

    Raises:
        ValueError: If an argument is malformed.

    Example:
        >>> str(StaticMask("2:4", init="random").pattern)
        '2:4'
    """

    def __init__(
        self,
        pattern: str | NMPattern,
        *,
        layers: Mapping[str, str | NMPattern] | None = None,
        init: Init = "magnitude",
        rescale: bool = True,
        both_ways: bool = False,
        verify: bool = False,
        compute: Compute = "dense",
    ) -> None:
        super().__init__(
            pattern,
            Masked(rescale=rescale, both_ways=both_ways),
            layers=layers,
            init=init,
            verify=verify,
            compute=compute,
        )


class OneShotMagnitude(SparseCallback):
    """Load a trained dense network, keep the largest weights of every block, and fine-tune them.

    The recipe of NVIDIA's ASP (Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021): prune once by magnitude,
    then train again under the fixed mask. `fit(ckpt_path=...)` replaces these weights by
    those of the interrupted run. The cost of the dense run is reported apart, if its checkpoint holds it (`Dense` saves it).

    Args:
        pattern: "N:M" or an `NMPattern`.
        checkpoint: Checkpoint of the dense network, Lightning's or a state dict of the same module; only tensors and plain
            types are read from it.
        layers: Rules that override the default choice of layers, as in `BAMECallback`.
        verify: Check all invariants after every step (slow, for debugging).
        compute: How products of sparse layers are computed, as in `BAMECallback`.

    Raises:
        ValueError: If an argument is malformed, or the checkpoint cannot be read or does not fit the model.
    """

    def __init__(
        self,
        pattern: str | NMPattern,
        checkpoint: str | Path | None,
        *,
        layers: Mapping[str, str | NMPattern] | None = None,
        verify: bool = False,
        compute: Compute = "dense",
    ) -> None:
        super().__init__(pattern, Masked(), layers=layers, verify=verify, compute=compute)
        if checkpoint is None:
            raise ValueError(
                "`checkpoint` must name a trained dense network to prune; got None. With bame-train: ckpt=PATH, from a run "
                "with method=dense."
            )
        self.checkpoint = Path(checkpoint)
        self.dense_run: dict[str, float] = {}

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit" or self.weights:
            return  # a second fit goes on where the first one ended
        checkpoint = load_weights(pl_module, self.checkpoint, "checkpoint")
        for state in dict(checkpoint.get("callbacks") or {}).values():
            dense = isinstance(state, Mapping) and VERSION_KEY not in state
            if dense and "algorithmic" in (booked := state.get("flops") or {}):
                self.dense_run = {
                    "flops/dense_run/train_total": 2 * float(booked["algorithmic"]),
                    "flops/dense_run/steps": float(state["steps"]),
                }

    @override
    def summary(self) -> dict[str, Any]:
        summary = super().summary()
        return summary | {"flops": summary["flops"] | self.dense_run}
