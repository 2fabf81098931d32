"""The blocks of some weights, numbered weight after weight, with what all rules of evolution keep of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Integer, Shaped
from torch import Tensor

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
    """The evolving state of one weight: views into the tensors of all weights.

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
        kept_places: Places in its block of what each block keeps; None if they must be read off the mask.
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
    kept_places: Integer[Tensor, "blocks n"] | None = None
    mean_gradient: Float[Tensor, "blocks m"] | None = None
    noise: Float[Tensor, ""] | None = None
    unit: Float[Tensor, ""] | None = None
    refused: Int[Tensor, ""] | None = None

    def closeness(self) -> Float[Tensor, "blocks m"]:
        """How close its positions are to a swap, `contenders.closeness`."""
        pattern, places = self.sparse.pattern, self.kept_places
        places = kept_places(self.sparse.mask(), pattern.n) if places is None else places
        kept = to_blocks(self.sparse.values, pattern.m).gather(1, places.long())
        return closeness(self.evidence, kept.abs().amin(-1, keepdim=True).to(self.evidence.dtype), places)


class BlockTable:
    """All blocks of some weights of one pattern and type, numbered weight after weight, with what is known of them.

    Positions are numbered in the order of blocks: block * m + place in the block.

    Args:
        weights: The weights.
        freeze_after: Oscillations that a block may make; one more freezes its mask. None never freezes.

    Attributes:
        positions: Where positions lie in the memory of their weights.
        masks: The masks.
        firsts: Number of the first block of each weight; last, the number of all blocks.
        pruned_positions: The number of pruned positions, which never changes.
        history: Oscillations, positions pruned before, how long blocks have been quiet.
        accumulated: Evidence and mean gradients.
        predicted: Loss reduction that the last adaptation predicted for each weight, to first order, in units of the loss;
            shape (weights,).
    """

    def __init__(self, weights: Sequence[SparseWeight], freeze_after: int | None) -> None:
        self.weights = list(weights)
        self.pattern = weights[0].pattern
        self.freeze_after = freeze_after
        self.dtype = torch.promote_types(weights[0].weight.dtype, torch.float32)
        self.device = weights[0].kept.device
        self.positions = Positions(weights)
        self.masks = MaskSet(weights)
        self.firsts = [start // self.pattern.m for start in self.positions.starts]
        self.pruned_positions = self.firsts[-1] * (self.pattern.m - self.pattern.n)
        self.counts = torch.tensor(self.firsts, device=self.device).diff()
        self.history = FlipHistory(self.firsts[-1], self.pattern.m, self.device)
        table = torch.zeros(self.firsts[-1], self.pattern.m, dtype=self.dtype, device=self.device)
        self.accumulated = Accumulated(table, mean=False)
        self.predicted = torch.zeros(len(weights), dtype=self.dtype, device=self.device)

    @property
    def evidence(self) -> Float[Tensor, "blocks m"]:
        """What pruned weights would have become, zero where kept; at least float32."""
        return self.accumulated.evidence

    @property
    def frozen(self) -> Bool[Tensor, " blocks"]:
        """Blocks whose mask is final."""
        return frozen_blocks(self.history.oscillations, self.freeze_after)

    def frozen_of(self, layer: int) -> Bool[Tensor, " blocks"]:
        """Frozen blocks of one weight."""
        return frozen_blocks(self.of(layer, self.history.oscillations), self.freeze_after)

    def unfrozen(self, positions: Int[Tensor, " some"]) -> Bool[Tensor, " some"]:
        """Whether positions lie in blocks that are not frozen."""
        return ~self.frozen.index_select(0, self.positions.blocks(positions))

    def of(self, layer: int, values: Tensor) -> Tensor:
        """Cut the part of one weight out of a tensor with a value for each block."""
        return values[self.span(layer)]

    def span(self, layer: int) -> slice:
        """The blocks of one weight."""
        return slice(self.firsts[layer], self.firsts[layer + 1])

    def spread(self, values: Shaped[Tensor, " weights"]) -> Shaped[Tensor, " blocks"]:
        """For each block the value of its weight."""
        return values.repeat_interleave(self.counts, output_size=self.firsts[-1])

    def blocks(self, tensor: Tensor, layer: int) -> Tensor:
        """View or copy a tensor that lies in memory as a weight does, in blocks."""
        return to_blocks(self.weights[layer].oriented(tensor), self.pattern.m)

    def in_order(self, tensor: Tensor, layer: int) -> Shaped[Tensor, " positions"]:
        """View or copy a tensor that lies in memory as a weight does, in the order of positions."""
        straight = self.positions.straight[layer]
        return flat_memory(tensor) if straight else self.blocks(tensor, layer).reshape(-1)

    def mean_of(self, layer: int) -> Float[Tensor, "blocks m"] | None:
        """Running means of the gradients of a weight; None if none are kept."""
        means = self.accumulated.mean
        return None if means is None else self.of(layer, means)

    def start_at_weights(self) -> None:
        """Start the evidence of pruned weights at their values, which must still be there."""
        for layer, sparse in enumerate(self.weights):
            self.of(layer, self.evidence).copy_(
                zeroed(to_blocks(sparse.values, self.pattern.m).to(self.dtype), ~sparse.mask())
            )

    def layer(self, layer: int) -> EvolvingLayer:
        """The part of a weight's evolving state that all rules have."""
        return EvolvingLayer(
            self.weights[layer],
            evidence=self.of(layer, self.evidence),
            oscillations=self.of(layer, self.history.oscillations),
            quiet=self.history.quiet(self.span(layer)),
            frozen=self.frozen_of(layer),
            freezes=self.freeze_after is not None,
            flips=self.masks.flips[layer],
            last_flips=self.masks.last_flips[layer],
            predicted=self.predicted[layer],
            mean_gradient=self.mean_of(layer),
        )

    def state(self, layer: int) -> dict[str, Any]:
        """All that evolves in a weight beside its mask, of all rows: evidence of pruned positions only, packed bits."""
        rows, pruned = self.weights[layer].rows, ~self.weights[layer].mask()
        state = {
            # Every row has the same number of pruned positions.
            "evidence": rows.gather(self.of(layer, self.evidence)[pruned]),
            "oscillations": rows.gather(self.of(layer, self.history.oscillations)),
            "quiet": rows.gather(self.history.quiet(self.span(layer))),
            "pruned_before": pack_mask(rows.gather(self.history.pruned_before(self.span(layer)))),
            "predicted": rows.total(self.predicted[layer]),
            **self.masks.state(layer),
        }
        if (mean := self.mean_of(layer)) is not None:
            state["mean_gradient"] = rows.gather(mean[pruned])
        return saved(state)

    def load_state(self, layer: int, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned; the mask must have been restored before."""
        rows, pruned = self.weights[layer].rows, ~self.weights[layer].mask()
        for key, table in (("evidence", self.of(layer, self.evidence)), ("mean_gradient", self.mean_of(layer))):
            if table is not None:
                table.zero_().masked_scatter_(pruned, rows.own(state[key]).to(table))
        everywhere = torch.Size((len(pruned) * rows.parts, self.pattern.m))
        before = unpack_mask(state["pruned_before"].cpu(), everywhere)
        own = [rows.own(values).to(self.device) for values in (state["oscillations"], state["quiet"], before)]
        self.history.restore(self.span(layer), *own)
        self.predicted[layer] = rows.part_of(state["predicted"].to(self.predicted))
        self.masks.load_state(layer, state)


def saved(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy into main memory: a checkpoint may be written while training goes on."""
    return {key: value.detach().cpu().clone() for key, value in state.items()}
