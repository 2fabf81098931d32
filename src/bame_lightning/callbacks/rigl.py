"""RigL restricted to blocks of N:M patterns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from bame_lightning.bame.schedule import Schedule
from bame_lightning.blocks.layout import from_blocks, to_blocks
from bame_lightning.blocks.pattern import NMPattern
from bame_lightning.blocks.statistics import flipped_positions
from bame_lightning.callbacks.base import Init
from bame_lightning.callbacks.masked import MaskedCallback
from bame_lightning.callbacks.run_length import resolve_window
from bame_lightning.ledger.flops import Shares
from bame_lightning.methods.regrowth import drop_and_grow
from bame_lightning.weights.layers import SparseWeight


class RigL(MaskedCallback):
    r"""Drop the smallest kept weights and grow the pruned ones of the largest gradient, inside blocks.

    After every `schedule.every` optimizer steps, in a share of each layer's blocks that falls along a cosine from rho to 0,
    $\frac{\rho}{2}(1 + \cos(\pi\,\text{progress}))$. Grown weights start at zero, without optimizer state. The dense gradient
    is that of the same step; if it is not finite, nothing changes.

    Args:
        pattern: "N:M" or an `NMPattern`.
        layers: Rules that override the default choice of layers, as in `BAMECallback`.
        schedule: When to swap; default: every 100 optimizer steps in the first 75 % of the run.
        share: Share of blocks that swap at the start, rho.
        init: Which weights the masks keep at first, as in `BAMECallback`.
        rescale: At a layer's first gradient, multiply what is kept by sqrt(M / N), unless a batch norm makes the scale
            irrelevant (`scale.alignment`). Right from scratch, wrong for a trained network.
        verify: Check all invariants after every step (slow, for debugging).

    Raises:
        ValueError: If an argument is malformed.
    """

    schedule: Schedule

    def __init__(
        self,
        pattern: str | NMPattern,
        *,
        layers: Mapping[str, str | NMPattern] | None = None,
        schedule: Schedule = Schedule(stop=0.75, every=100),  # noqa: B008 frozen
        share: float = 0.3,
        init: Init = "magnitude",
        rescale: bool = True,
        verify: bool = False,
    ) -> None:
        super().__init__(pattern, layers=layers, init=init, rescale=rescale, verify=verify)
        if not 0 < share <= 1:
            raise ValueError(f"`share` is a share of blocks in (0, 1]; got {share}.")
        self.schedule = schedule
        self.share = share
        self.flips: dict[str, Tensor] = {}
        self.last_flips: dict[str, Tensor] = {}
        self._gradients: dict[str, Tensor] = {}

    @override
    def plan(self, trainer: L.Trainer) -> None:
        self._window = resolve_window(trainer, self.schedule, "RigL will never swap a weight")

    @override
    def start_method(self, restored: Mapping[str, Any] | None) -> None:
        if not self.steps:
            self.flips = {}
        layers = restored["layers"] if restored else {}
        for sparse in self.weights:
            flips = layers.get(sparse.name, {}).get("flips")
            if flips is not None:
                # Counted in place; the checkpoint is the caller's.
                self.flips[sparse.name] = sparse.rows.part_of(flips.to(sparse.kept.device, copy=True))
            else:
                self.flips.setdefault(sparse.name, _nothing(sparse))  # a second fit goes on counting
        self.last_flips = {sparse.name: _nothing(sparse) for sparse in self.weights}

    @override
    def regroup(self) -> None:
        self.flips = {sparse.name: self.flips.get(sparse.name, _nothing(sparse)) for sparse in self.weights}
        self.last_flips = {sparse.name: _nothing(sparse) for sparse in self.weights}
        self._gradients = {name: gradient for name, gradient in self._gradients.items() if name in self.flips}
        super().regroup()

    @override
    def reads_gradients(self) -> bool:
        return self.window.adapts(self.now.steps)

    @override
    def read_gradients(self) -> None:
        for sparse in self.now.weights:
            self._gradients.pop(sparse.name, None)
            if self.reads_gradients() and sparse.gradient is not None:
                self._gradients[sparse.name] = to_blocks(sparse.gradient, sparse.pattern.m).clone()

    @override
    def evolve(self, optimizer: Optimizer) -> bool:
        read = {sparse.name: self._gradients.pop(sparse.name, None) for sparse in self.now.weights}
        found = [gradient for gradient in read.values() if gradient is not None]
        if not found:
            return False
        self.enforce(optimizer)  # what is grown starts at zero
        share = self.window.annealed(self.share, self.now.steps)
        finite = torch.stack([gradient.isfinite().all() for gradient in found]).all()
        finite = self._ranks.all(finite)
        for sparse in self.now.weights:
            gradient = read[sparse.name]
            if gradient is None or sparse.pattern.n == sparse.pattern.m:
                continue
            old = sparse.mask()
            # The share is one of the blocks of all rows.
            rows, blocks = sparse.rows, to_blocks(sparse.values, sparse.pattern.m)
            new = drop_and_grow(rows.gather(blocks), rows.gather(gradient), rows.gather(old), share)
            new = rows.own(new)
            new = torch.where(finite, new, old)
            self.last_flips[sparse.name] = flipped_positions(old, new)
            self.flips[sparse.name] += self.last_flips[sparse.name]
            sparse.kept.copy_(from_blocks(new, sparse.kept.shape))
        return True

    @override
    def shares(self) -> dict[str, Shares]:
        read = float(self.window.adapts(self.now.steps - 1))
        return {sparse.name: Shares.bame(sparse.pattern.density, read) for sparse in self.now.weights}

    @override
    def method_statistics(self) -> dict[str, Tensor]:
        rates = {sparse.label: self.last_flips[sparse.name] / sparse.kept.numel() for sparse in self.weights}
        positions = sum(sparse.kept.numel() for sparse in self.weights)
        total = torch.stack(list(self.last_flips.values())).sum() / positions
        return {"bame/flip_rate": total} | {f"bame/layer/{name}/flip_rate": rate for name, rate in rates.items()}

    @override
    def save(self, state: dict[str, Any]) -> None:
        for name, flips in self._total_flips().items():
            state["layers"][name]["flips"] = flips.cpu().clone()

    @override
    def forget(self) -> None:
        super().forget()
        self.flips = {}

    @override
    def _summary(self) -> dict[str, Any]:
        return super()._summary() | {"flips": sum(int(flips) for flips in self._total_flips().values())}

    def _total_flips(self) -> dict[str, Tensor]:
        return {sparse.name: sparse.rows.total(self.flips[sparse.name]) for sparse in self.weights if self.flips}


def _nothing(sparse: SparseWeight) -> Tensor:
    return torch.zeros((), dtype=torch.int64, device=sparse.kept.device)
