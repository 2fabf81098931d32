"""What all rules of evolution keep of the blocks of some weights, and the interface that a rule implements."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Int16, Shaped
from torch import Tensor
from torch.optim import Optimizer

from bame_lightning.bame.accumulated import Accumulated
from bame_lightning.bame.contenders import closeness
from bame_lightning.bame.oscillation import FlipHistory, frozen_blocks
from bame_lightning.blocks.layout import to_blocks
from bame_lightning.blocks.masks import kept_places, pack_mask, unpack_mask, zeroed
from bame_lightning.weights.layers import SparseWeight
from bame_lightning.weights.mask_set import MaskSet
from bame_lightning.weights.positions import Positions, flat_memory


@dataclass(frozen=True)
class EvolvingLayer:
    """What evolves in one weight: views into the tensors of all.

    Args:
        sparse: The weight.
        evidence: What pruned weights would have become, zero where kept; shape (blocks, m).
        oscillations: Adaptations in which a block oscillated; shape (blocks,).
        quiet: Adaptations since a block last oscillated, or all so far; shape (blocks,).
        frozen: Blocks whose mask is final; shape (blocks,).
        freezes: Whether blocks may freeze.
        flips: Mask positions changed so far; scalar.
        last_flips: Those that the last adaptation changed; scalar.
        predicted: Loss reduction that the last adaptation predicted; scalar.
        mean_gradient: Running mean of the gradients read, like `evidence`; None where none is kept.
        noise: Running mean of squared gradients of pruned weights; scalar, None where none is kept.
        unit: How far a typical gradient moves evidence; scalar, None where none is kept.
        refused: Swaps refused so far for lack of room in their columns; scalar, None without `both_ways`.
    """

    sparse: SparseWeight
    evidence: Float[Tensor, "blocks m"]
    oscillations: Int[Tensor, " blocks"]
    quiet: Int[Tensor, " blocks"]
    frozen: Bool[Tensor, " blocks"]
    freezes: bool
    flips: Int[Tensor, ""]
    last_flips: Int[Tensor, ""]
    predicted: Float[Tensor, ""]
    mean_gradient: Float[Tensor, "blocks m"] | None = None
    noise: Float[Tensor, ""] | None = None
    unit: Float[Tensor, ""] | None = None
    refused: Int[Tensor, ""] | None = None


class EvolvingBlocks(ABC):
    """All blocks of some weights of one pattern and type, numbered through weight by weight, with what evolves in them.

    Positions are numbered through in the order of blocks: block * m + place in the block.

    Args:
        weights: The weights, still dense if evidence starts at their values.
        freeze_after: Oscillations that a block may make; one more freezes its mask. None never freezes.

    Attributes:
        positions: Where positions lie in the memory of their weights.
        masks: The masks, which `adapt` changes.
        history: Oscillations, positions pruned before, how long blocks have been quiet.
        accumulated: What readings add up to.
        predicted: Loss reduction that the last adaptation predicted for each weight, to first order, in units of the loss;
            shape (weights,).
        read_shares: Share of each weight's pruned positions whose gradient the last step read.
    """

    def __init__(self, weights: Sequence[SparseWeight], freeze_after: int | None) -> None:
        self.weights = list(weights)
        self.pattern = weights[0].pattern
        self.freeze_after = freeze_after
        self.dtype = torch.promote_types(weights[0].weight.dtype, torch.float32)
        self.positions = Positions(weights)
        self.masks = MaskSet(weights)
        self.firsts = [start // self.pattern.m for start in self.positions.starts]
        """Number of the first block of each weight, and of all blocks at the end."""
        device = weights[0].kept.device
        self.history = FlipHistory(self.firsts[-1], self.pattern.m, device)
        table = torch.zeros(self.firsts[-1], self.pattern.m, dtype=self.dtype, device=device)
        self.accumulated = Accumulated(table, mean=False)
        self.predicted = torch.zeros(len(weights), dtype=self.dtype, device=device)
        self.read_shares = [0.0] * len(weights)

    def keep_both_ways(self) -> None:
        """Refuse swaps that put a third kept weight into four consecutive rows of a column, from now on.

        Raises:
            ValueError: If the rule cannot.
        """
        raise ValueError(
            "`both_ways=True` needs a rule that can refuse a swap, as `Evidence` does; got one whose blocks are "
            f"`{type(self).__name__}`. Use evidence=Evidence(), or both_ways=False."
        )

    # What a rule implements, in the order of a step.

    @abstractmethod
    def read(self, gradients: Sequence[Tensor | None], *, everywhere: bool, adapts: bool) -> None:
        """Copy of the dense gradients what this step reads, before they are masked.

        Args:
            gradients: One of each weight, as it lies in memory; None where there is none.
            everywhere: Of all unfrozen blocks; otherwise of the positions that the rule has chosen.
            adapts: Whether masks adapt after this step.
        """

    @abstractmethod
    def extremes(self) -> list[Tensor]:
        """Least and largest value of what this step has read; NaN if there is one among them."""

    @abstractmethod
    def accumulate(self, optimizer: Optimizer, reading: Any, finite: Bool[Tensor, ""], window: int) -> None:
        """Move the evidence by what was read.

        Args:
            optimizer: The optimizer that has just stepped.
            reading: What the reading is, a `Reading`.
            finite: False discards it, on the device.
            window: Steps of the window.
        """

    def contend(self) -> None:  # noqa: B027 many rules choose nothing
        """Choose what the steps up to the next reading of all read, after one."""

    @abstractmethod
    def adapt(self, share: float = 1.0) -> list[Tensor] | None:
        """Swap weights, masks and evidence in place, in a share of each weight's blocks.

        Returns:
            Of each weight, the places in its memory that were pruned, for those who keep one value per weight; where a pair
            was not swapped, one that was pruned before. None if they must look at the masks.
        """

    def end_step(self) -> None:  # noqa: B027 some keep nothing
        """Forget what this step has read."""

    # What all rules share.

    @property
    def evidence(self) -> Float[Tensor, "blocks m"]:
        """What pruned weights would have become, zero where kept; at least float32."""
        return self.accumulated.evidence

    def closeness(self, layer: int) -> Float[Tensor, "blocks m"]:
        """How close the positions of a weight are to a swap, `contenders.closeness`."""
        places = self.kept_in(layer)
        kept = to_blocks(self.weights[layer].values, self.pattern.m).gather(1, places.long())
        return closeness(self.of(layer, self.evidence), kept.abs().amin(-1, keepdim=True).to(self.dtype), places)

    def kept_in(self, layer: int) -> Int16[Tensor, "blocks n"]:
        """Places in its block of what each block of a weight keeps, ascending."""
        return kept_places(self.weights[layer].mask(), self.pattern.n)

    @property
    def frozen(self) -> Bool[Tensor, " blocks"]:
        """Blocks whose mask is final."""
        return frozen_blocks(self.history.oscillations, self.freeze_after)

    def frozen_of(self, layer: int) -> Bool[Tensor, " blocks"]:
        """Frozen blocks of one weight, without a look at the others."""
        return frozen_blocks(self.of(layer, self.history.oscillations), self.freeze_after)

    @property
    def designated(self) -> Bool[Tensor, " blocks"]:
        """Blocks of which steps between two readings of all read something."""
        return torch.zeros_like(self.frozen)

    def contended(self) -> list[Int[Tensor, " contenders"]]:
        """Positions of each weight that steps between two readings of all read, numbered within it, row by row."""
        return [torch.empty(0, dtype=torch.int64, device=self.evidence.device)] * len(self.weights)

    @property
    def contender_count(self) -> int:
        """Positions that steps between two readings of all read."""
        return 0

    @property
    def pruned_positions(self) -> int:
        """Number of positions that are pruned, the same at all times."""
        return self.firsts[-1] * (self.pattern.m - self.pattern.n)

    def of(self, layer: int, values: Tensor) -> Tensor:
        """Cut the part of one weight out of something that is kept per block."""
        return values[self.firsts[layer] : self.firsts[layer + 1]]

    def blocks(self, tensor: Tensor, layer: int) -> Tensor:
        """Something that lies in memory as a weight does, in blocks."""
        return to_blocks(self.weights[layer].oriented(tensor), self.pattern.m)

    def in_order(self, tensor: Tensor, layer: int) -> Shaped[Tensor, " positions"]:
        """Something that lies in memory as a weight does, as its positions are numbered."""
        straight = self.positions.straight[layer]
        return flat_memory(tensor) if straight else self.blocks(tensor, layer).reshape(-1)

    def dense_start(self) -> None:
        """Start the evidence of pruned weights at their values, which are still there."""
        for layer, sparse in enumerate(self.weights):
            self.of(layer, self.evidence).copy_(
                zeroed(to_blocks(sparse.values, self.pattern.m).to(self.dtype), ~sparse.mask())
            )

    def rescaled(self, layer: int, factor: float) -> None:
        """Follow a weight that was multiplied by a factor before the first update."""
        self.of(layer, self.evidence).mul_(factor)

    def layers(self) -> list[EvolvingLayer]:
        """What evolves in each weight."""
        return [self._layer(layer) for layer in range(len(self.weights))]

    def _layer(self, layer: int) -> EvolvingLayer:
        history = self.history
        return EvolvingLayer(
            self.weights[layer],
            evidence=self.of(layer, self.evidence),
            oscillations=self.of(layer, history.oscillations),
            quiet=self.of(layer, history.quiet),
            frozen=self.frozen_of(layer),
            freezes=self.freeze_after is not None,
            flips=self.masks.flips[layer],
            last_flips=self.masks.last_flips[layer],
            predicted=self.predicted[layer],
        )

    def copies(self, layer: int) -> dict[str, Tensor]:
        """What every process must hold the same of where it holds all rows, by what it is."""
        return {
            "evidence": self.of(layer, self.evidence),
            "flip history": self.of(layer, self.history.oscillations),
        }

    def statistics(self, layer: int) -> dict[str, Tensor]:
        """What every process must hold the same of, whatever rows it holds."""
        return {}

    def state(self, layer: int) -> dict[str, Any]:
        """All that evolves in a weight beside its mask, of all rows: evidence of pruned positions only, packed bits."""
        rows, pruned = self.weights[layer].rows, ~self.weights[layer].mask()
        state = {
            # Every row has as many pruned positions as any other.
            "evidence": rows.gather(self.of(layer, self.evidence)[pruned]),
            "oscillations": rows.gather(self.of(layer, self.history.oscillations)),
            "quiet": rows.gather(self.of(layer, self.history.quiet)),
            "pruned_before": pack_mask(rows.gather(self.of(layer, self.history.pruned_before))),
            "predicted": rows.total(self.predicted[layer]),
            **self.masks.state(layer),
        }
        return {key: _copy(value) for key, value in state.items()}

    def load_state(self, layer: int, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned; the mask must have been restored before."""
        rows, pruned, history = self.weights[layer].rows, ~self.weights[layer].mask(), self.history
        self.of(layer, self.evidence).copy_(self.laid_out(layer, pruned, state["evidence"]))
        everywhere = torch.Size((len(pruned) * rows.parts, self.pattern.m))
        saved = {**state, "pruned_before": unpack_mask(state["pruned_before"].cpu(), everywhere)}
        for name in ("oscillations", "quiet", "pruned_before"):
            values: Tensor = getattr(history, name)
            self.of(layer, values).copy_(rows.own(saved[name]))
        self.predicted[layer] = rows.part_of(state["predicted"].to(self.predicted))
        self.masks.load_state(layer, state)

    def laid_out(self, layer: int, pruned: Bool[Tensor, "blocks m"], values: Tensor) -> Float[Tensor, "blocks m"]:
        """Lay out what was saved of the pruned positions of a weight."""
        own = self.weights[layer].rows.own(values).to(self.evidence)
        return torch.zeros_like(pruned, dtype=self.dtype).masked_scatter(pruned, own)


def _copy(value: Tensor) -> Tensor:
    # A checkpoint may be written while training goes on.
    return value.detach().cpu().clone()
