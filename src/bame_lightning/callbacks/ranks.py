"""What the processes of a run must agree on, and a comparison that names the one that differs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor

from bame_lightning.blocks.checksum import checksum
from bame_lightning.methods.method import Replica
from bame_lightning.weights.invariants import InvariantError
from bame_lightning.weights.layers import SparseWeight

COMPARE_EVERY = 50
"""Optimizer steps between two comparisons of ranks, the first after step 1; each waits for the device."""


class Ranks:
    """The processes of a run.

    Args:
        count: Their number.
        weights: The sparse weights.
    """

    def __init__(self, count: int = 1, weights: Iterable[SparseWeight] = ()) -> None:
        self.count = count
        parted = [sparse for sparse in weights if not sparse.rows.whole]
        self.sharded = bool(parted)
        """Whether each process holds its own rows of some weight."""
        self._device = parted[0].kept.device if parted else None

    def all(self, flag: Tensor) -> Tensor:
        """Whether a boolean scalar is true on all ranks; asks other ranks only if they hold other rows."""
        if not self.sharded:
            return flag
        everywhere = flag.int()
        dist.all_reduce(everywhere, dist.ReduceOp.MIN)
        return everywhere.bool()

    def any(self, flags: Tensor) -> Tensor:
        """For each of some booleans, whether it is true on any rank; every rank passes the same number."""
        if self.count == 1 or not dist.is_initialized():
            return flags
        anywhere = flags.int()
        dist.all_reduce(anywhere, dist.ReduceOp.MAX)
        return anywhere.bool()

    def mean(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Take the mean of each metric over ranks; if all ranks hold the same rows, return the metrics as they are.

        Args:
            metrics: Numbers or scalars; the same names on every rank.

        Returns:
            The means, in float64.
        """
        if not self.sharded or not metrics:
            return dict(metrics)
        values = [torch.as_tensor(value, dtype=torch.float64, device=self._device) for value in metrics.values()]
        mean = torch.stack(values)
        dist.all_reduce(mean)
        return dict(zip(metrics, (mean / dist.get_world_size()).unbind(), strict=True))

    def compare(self, copies: Iterable[Replica], step: int, *, every: int = COMPARE_EVERY) -> None:
        """Compare the copies that ranks hold, by checksums: one all-reduce of 8 bytes per rank and tensor.

        Args:
            copies: The copies; the same number in the same order on every rank.
            step: Optimizer steps done.
            every: Optimizer steps between two comparisons.

        Raises:
            InvariantError: On all ranks, if one differs from the others.
        """
        if self.count == 1 or not dist.is_initialized() or (step % every and step > 1):
            return
        held = list(copies)
        if not held:
            return
        own = torch.stack([checksum(copy.value) for copy in held])
        # A sum of tables in which each rank fills in its row: not every backend gathers on every device.
        table = own.new_zeros(dist.get_world_size(), len(own))
        table[dist.get_rank()] = own
        dist.all_reduce(table)
        differing = (table != table[0]).any(0)
        if not differing.any():
            return
        places = differing.nonzero().squeeze(-1).tolist()
        raise InvariantError(_report(held, table, places, step))


def on_the_first(trainer: L.Trainer, function: Callable[[], Any]) -> Any:
    """Call a function in the first process, and return its result in all processes."""
    return trainer.strategy.broadcast(function() if trainer.is_global_zero else None)


def _report(held: list[Replica], table: Tensor, places: list[int], step: int) -> str:
    first = held[places[0]]
    sums = table[:, places[0]].tolist()
    # Most ranks are right. Counters keep the order of insertion, so of two ranks the first one is believed.
    ((common, agreeing),) = Counter(sums).most_common(1)
    odd = [rank for rank, value in enumerate(sums) if value != common]
    others = "the other rank" if agreeing == 1 and len(sums) == 2 else f"{agreeing} others, which agree"
    layers = len({held[place].layer for place in places})
    more = f" ({layers} layers differ, this is the first)" if layers > 1 else ""
    return (
        f"Ranks: after step {step}, the {first.what} of `{first.layer}` on rank{'s' * (len(odd) > 1)} "
        f"{', '.join(map(str, odd))} differs from that of {others}{more}: training on would average gradients of different "
        "networks. Look for code that runs on some ranks only, or for broken memory there; resume from a checkpoint."
    )
