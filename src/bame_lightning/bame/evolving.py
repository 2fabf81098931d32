"""The interface of a rule of evolution, which says what happens to the blocks of many weights in a step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.optim import Optimizer

from bame_lightning.bame.table import BlockTable, EvolvingLayer
from bame_lightning.weights.layers import SparseWeight


class EvolvingBlocks(ABC):
    """Blocks of some weights of one pattern and type, under a rule.

    Args:
        weights: The weights; they must still be dense if evidence starts at their values.
        freeze_after: Oscillations that a block may make; one more freezes its mask. None never freezes.

    Attributes:
        table: The blocks, and what all rules keep of them.
        weights: The weights.
        extremes: Least and largest gradient that this step has read; NaN if any is.
        read_shares: Share of each weight's pruned positions whose gradient the last step read.
    """

    def __init__(self, weights: Sequence[SparseWeight], freeze_after: int | None) -> None:
        self.table = BlockTable(weights, freeze_after)
        self.weights, self.pattern = self.table.weights, self.table.pattern
        self.extremes: list[Tensor] = []
        self.read_shares = [0.0] * len(weights)

    def keep_both_ways(self) -> None:
        """From now on refuse swaps that put a third kept weight into four consecutive rows of a column.

        Raises:
            ValueError: If the rule cannot.
        """
        raise ValueError(
            "`both_ways=True` needs a rule that can refuse a swap, as `Evidence` does; got one whose blocks are "
            f"`{type(self).__name__}`. Use evidence=Evidence(), or both_ways=False."
        )

    # In the order of a step.

    @abstractmethod
    def read(self, gradients: Sequence[Tensor | None], *, everywhere: bool, adapts: bool) -> None:
        """Copy the part of the dense gradients that this step reads, before they are masked.

        Args:
            gradients: The gradient of each weight, as it lies in memory; None if there is none.
            everywhere: Whether to read all unfrozen blocks; otherwise only positions that the rule has chosen.
            adapts: Whether masks adapt after this step.
        """

    @abstractmethod
    def accumulate(self, optimizer: Optimizer, reading: Any, finite: Bool[Tensor, ""], window: int) -> None:
        """Move the evidence by the gradients that were read.

        Args:
            optimizer: The optimizer that has just stepped.
            reading: Which gradients the step read, and for how many steps they stand.
            finite: Boolean on the device; False discards the reading.
            window: Steps of the window.
        """

    def contend(self) -> None:  # noqa: B027 many rules choose nothing
        """After a reading of all blocks, choose the positions that steps read until the next one."""

    @abstractmethod
    def adapt(self, share: float = 1.0) -> list[Tensor] | None:
        """Swap weights, masks and evidence in place, in a share of each weight's blocks.

        Returns:
            For each weight, the places in its memory that were pruned, so that optimizer state there can be zeroed. For a pair
            that was not swapped it is a place that was pruned before. None if only the masks tell.
        """

    def end_step(self) -> None:  # noqa: B027 some keep nothing
        """Forget what this step has read."""

    # For others to see.

    def contended(self) -> list[Int[Tensor, " contenders"]]:
        """The contenders of each weight: positions numbered within it, row by row."""
        return [torch.empty(0, dtype=torch.int64, device=self.table.device)] * len(self.weights)

    @property
    def designated(self) -> Bool[Tensor, " blocks"]:
        """Blocks that hold a contender."""
        chosen = torch.zeros(self.table.firsts[-1], dtype=torch.bool, device=self.table.device)
        for layer, positions in enumerate(self.contended()):
            self.table.of(layer, chosen).index_fill_(0, positions // self.pattern.m, True)
        return chosen & ~self.table.frozen

    def layer(self, layer: int) -> EvolvingLayer:
        """The evolving state of a weight."""
        return self.table.layer(layer)

    def layers(self) -> list[EvolvingLayer]:
        """The evolving state of each weight."""
        return [self.layer(layer) for layer in range(len(self.weights))]

    def copies(self, layer: int) -> dict[str, Tensor]:
        """The tensors, by name, that must be the same in all processes that hold all rows."""
        mean = self.table.mean_of(layer)
        return {
            "evidence": self.table.of(layer, self.table.evidence),
            "flip history": self.table.of(layer, self.table.history.oscillations),
            "contenders": self.contended()[layer],
            **({} if mean is None else {"mean gradient": mean}),
        }

    def state(self, layer: int) -> dict[str, Any]:
        """The evolving state of a weight without its mask, for all rows."""
        return self.table.state(layer)

    def load_state(self, layer: int, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned; the mask must have been restored before."""
        self.table.load_state(layer, state)
