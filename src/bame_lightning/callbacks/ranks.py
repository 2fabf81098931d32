"""What the processes of a run have to agree on: which strategies can be right, and a comparison that names who differs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor

from bame_lightning.blocks.checksum import checksum
from bame_lightning.callbacks.packages import averaging_callbacks, known
from bame_lightning.weights.invariants import InvariantError
from bame_lightning.weights.layers import SparseWeight

COMPARE_EVERY = 50
"""Optimizer steps between two comparisons of ranks, the first after step 1; each costs a host synchronisation."""

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


def restores_late(trainer: L.Trainer) -> bool:
    """Whether a checkpoint would be loaded after `on_fit_start` only, as by strategies that shard the model first."""
    return trainer.strategy.restore_checkpoint_after_setup


class Copy(NamedTuple):
    """Something that every rank holds, and that must be the same on all of them.

    Args:
        what: What it is, for the message.
        layer: Of which layer.
        value: The tensor.
    """

    what: str
    layer: str
    value: Tensor


class Ranks:
    """The processes of a run.

    Args:
        count: How many there are.
        weights: The sparse weights.
    """

    def __init__(self, count: int = 1, weights: Iterable[SparseWeight] = ()) -> None:
        self.count = count
        self.sharded = any(not sparse.rows.whole for sparse in weights)
        """Whether each process holds rows of its own of some weight."""

    def all(self, flag: Tensor) -> Tensor:
        """Whether a boolean scalar is true on all ranks; asks them only where they hold different rows."""
        if not self.sharded:
            return flag
        everywhere = flag.int()
        dist.all_reduce(everywhere, dist.ReduceOp.MIN)
        return everywhere.bool()

    def any(self, flags: Tensor) -> Tensor:
        """Whether each of some booleans is true on any rank; the same number of them on every rank."""
        if self.count == 1 or not dist.is_initialized():
            return flags
        anywhere = flags.int()
        dist.all_reduce(anywhere, dist.ReduceOp.MAX)
        return anywhere.bool()

    def mean(self, metrics: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
        """Mean of each metric over ranks; as they are where all ranks hold the same rows.

        Args:
            metrics: Numbers or scalars; the same names on every rank.
            device: Where ranks exchange tensors.

        Returns:
            The means, in float64.
        """
        if not self.sharded or not metrics:
            return dict(metrics)
        values = [torch.as_tensor(value, dtype=torch.float64, device=device) for value in metrics.values()]
        mean = torch.stack(values)
        dist.all_reduce(mean)
        return dict(zip(metrics, (mean / dist.get_world_size()).unbind(), strict=True))

    def compare(self, copies: Iterable[Copy], step: int, *, every: int = COMPARE_EVERY) -> None:
        """Compare what ranks hold copies of, by checksums: one all-reduce of 8 bytes per rank and tensor.

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
        # A sum of tables with one row filled in: not every backend gathers on every device.
        table = own.new_zeros(dist.get_world_size(), len(own))
        table[dist.get_rank()] = own
        dist.all_reduce(table)
        differing = (table != table[0]).any(0)
        if not differing.any():
            return
        places = differing.nonzero().squeeze(-1).tolist()
        raise InvariantError(_report(held, table, places, step))


def _report(held: list[Copy], table: Tensor, places: list[int], step: int) -> str:
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
