"""What readings add up to: the evidence and the mean gradient of pruned positions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bame_lightning.blocks.masks import pieces


class Near(NamedTuple):
    """Evidence and mean gradients of the contenders, in short vectors.

    Args:
        positions: The contenders.
        evidence: Their evidence; shape (contenders,).
        mean: Running means of their gradients; None if none are kept.
    """

    positions: Int[Tensor, " contenders"]
    evidence: Float[Tensor, " contenders"]
    mean: Float[Tensor, " contenders"] | None


class Move(NamedTuple):
    """How a reading moves evidence and means. Each is one number, or one for each block or contender.

    Args:
        rate: How far evidence moves against a gradient.
        keep: Share of the older evidence that remains.
        weight: Weight of a new gradient in the running mean.
    """

    rate: Tensor
    keep: Tensor
    weight: Tensor

    def only(self, moves: Bool[Tensor, " some"] | None) -> Move:
        """Restrict the move to some; None moves all."""
        if moves is None:
            return self
        return Move(self.rate * moves, torch.where(moves, self.keep, 1), self.weight * moves)


class Accumulated:
    """Evidence and mean gradients of all positions of some blocks, zero where weights are kept.

    While only contenders are read, their values lie in short vectors, so that a step need not gather them from the tables and
    put them back. They return to the tables as soon as the tables are asked for.

    Args:
        table: Where evidence is kept; shape (blocks, m).
        mean: Whether running means of gradients are kept, too.
    """

    def __init__(self, table: Float[Tensor, "blocks m"], *, mean: bool) -> None:
        self._evidence = table.view(-1)
        self._mean = torch.zeros_like(self._evidence) if mean else None
        self._m = table.shape[1]
        self._near: Near | None = None

    @property
    def evidence(self) -> Float[Tensor, "blocks m"]:
        """The table of evidence, to be read or changed in place."""
        self._put_back()
        return self._evidence.view(-1, self._m)

    @property
    def mean(self) -> Float[Tensor, "blocks m"] | None:
        """The table of means, to be read or changed in place; None if none are kept."""
        self._put_back()
        return None if self._mean is None else self._mean.view(-1, self._m)

    def near(self, positions: Int[Tensor, " contenders"]) -> Near:
        """Take the contenders' values out of the tables, to be changed in place, for as long as these positions contend."""
        if self._near is None or self._near.positions is not positions:
            self._put_back()
            mean = None if self._mean is None else self._mean.index_select(0, positions)
            self._near = Near(positions, self._evidence.index_select(0, positions), mean)
            # A position that swaps meanwhile has no evidence in the tables.
            for table in (self._evidence, self._mean):
                if table is not None:
                    table.index_fill_(0, positions.long(), 0)
        return self._near

    def move_all(self, gradient: Float[Tensor, "blocks m"], move: Move) -> None:
        """Follow the gradients of all positions, in pieces; overwrites the gradients."""
        rate, keep, weight = (value.view(-1, 1).expand(len(gradient), 1) for value in move)
        table = self.mean
        averaged = gradient if table is None else table
        for evidence, mean, seen, by, kept, how in pieces(self.evidence, averaged, gradient, rate, keep, weight):
            change = seen if table is None else mean.lerp_(seen, how)
            evidence.mul_(kept).addcmul_(change, by, value=-1)

    def move_near(
        self, positions: Int[Tensor, " contenders"], gradient: Float[Tensor, " contenders"], move: Move
    ) -> None:
        """Follow the gradients of the contenders."""
        near = self.near(positions)
        change = gradient if near.mean is None else near.mean.lerp_(gradient, move.weight)
        near.evidence.mul_(move.keep).addcmul_(move.rate, change, value=-1)

    def _put_back(self) -> None:
        near, self._near = self._near, None
        if near is not None:
            positions = near.positions.long()
            self._evidence.index_copy_(0, positions, near.evidence)
            if self._mean is not None and near.mean is not None:
                self._mean.index_copy_(0, positions, near.mean)
