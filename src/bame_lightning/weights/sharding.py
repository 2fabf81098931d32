"""Weights of which each process holds only some rows, as `DTensor`s of FSDP2.

A block lies within one row of the output dimension, so a process that holds whole rows holds whole blocks, and changes inside
a block need no other process. A mean or a ranking over a whole layer asks the other processes, through `Rows`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Int
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds, sharing its memory; all of an ordinary tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def reshard(model: nn.Module) -> None:
    """Put the parameters that optimizers hold back into modules of FSDP2; each process's parameters hold its own rows.

    A module that ran forward without a backward pass, as a teacher does, keeps the gathered parameters instead. They are
    other objects, and the next forward pass would not see changes of the rows.

    Args:
        model: Any model.
    """
    # A model can only be sharded so if the class has been imported.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return
    for module in model.modules():
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()


@dataclass(frozen=True)
class Rows:
    """The rows of a weight that this process holds: all of them, or an even part.

    All processes must call a method that asks the others. For a weight that is not sharded these methods ask nobody, and
    return their argument.

    Args:
        part: Which part this process holds, counting from 0.
        parts: Number of parts.
        group: The processes that hold the other parts.
    """

    part: int = 0
    parts: int = 1
    group: Any = None

    @classmethod
    def of(cls, weight: Tensor, name: str, *, dim: int = 0) -> Rows:
        """Find out which rows of a weight this process holds.

        Args:
            weight: An ordinary tensor, or a `DTensor`.
            name: What to call the weight in messages.
            dim: Its output dimension.

        Returns:
            The rows.

        Raises:
            ValueError: If processes do not hold whole rows, or not equally many.
        """
        if not isinstance(weight, DTensor):
            return cls()
        mesh, placements = weight.device_mesh, weight.placements
        cut = [axis for axis, placement in enumerate(placements) if not placement.is_replicate()]
        # Equal to no subclass: FSDP2 inside tensor parallelism strides over rows.
        if [placements[axis] for axis in cut] != [Shard(dim)]:
            raise ValueError(
                f"`{name}` is a DTensor placed as {placements}, which cuts its blocks of weights along the input dimension, "
                f"or mixes its rows. Sparse weights can be sharded along their output dimension only, here {dim}, as "
                "`fully_shard(module, mesh=device_mesh['data_parallel'])` does for dimension 0; use "
                "`tensor_parallel_size=1`, a `shard_placement_fn`, or keep the layer dense with "
                f"layers={{'{name}': 'dense'}}."
            )
        (axis,) = cut
        if weight.shape[dim] % mesh.size(axis):
            raise ValueError(
                f"`{name}` has {weight.shape[dim]} rows, which {mesh.size(axis)} processes cannot share evenly, as sparse "
                f"weights must be. Use a number of processes that divides it, or keep the layer dense with "
                f"layers={{'{name}': 'dense'}}."
            )
        return cls(mesh.get_local_rank(axis), mesh.size(axis), mesh.get_group(axis))

    @property
    def whole(self) -> bool:
        """Whether this process holds all rows."""
        return self.parts == 1

    def total(self, values: Tensor) -> Tensor:
        """Sum values over processes; shaped like `values`."""
        if self.whole:
            return values
        total = values.clone()
        dist.all_reduce(total, group=self.group)
        return total

    def part_of(self, total: Tensor) -> Tensor:
        """Divide a sum among processes again: the first one gets everything, the others get 0."""
        return total if self.part == 0 else torch.zeros_like(total)

    def gather(self, values: Tensor) -> Tensor:
        """Gather the values of all rows from those of the own rows.

        Args:
            values: Equally many for each row, along the first dimension in the order of rows; shape (own, ...).

        Returns:
            The values of all processes; shape (all, ...).
        """
        if self.whole:
            return values
        # Not every backend sends booleans.
        sent = values.contiguous().view(torch.uint8) if values.dtype == torch.bool else values.contiguous()
        parts = [torch.empty_like(sent) for _ in range(self.parts)]
        dist.all_gather(parts, sent, group=self.group)
        return torch.cat(parts).view(values.dtype)

    def own(self, values: Tensor) -> Tensor:
        """Undo `gather`: view the values of the own rows."""
        size = len(values) // self.parts
        return values if self.whole else values.narrow(0, self.part * size, size)

    def own_index(self, index: Int[Tensor, " chosen"], size: int) -> Int[Tensor, " own"]:
        """Turn places in the result of `gather` into places among the own values, of which there are `size`."""
        if self.whole:
            return index
        index = index - self.part * size
        return index[(index >= 0) & (index < size)]


ALL_ROWS = Rows()
"""Those of a weight that is not sharded."""
