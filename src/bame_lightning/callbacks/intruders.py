"""Non-zeros where weights are pruned: somebody else has changed weights in the middle of training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from bame_lightning.blocks.masks import pieces
from bame_lightning.callbacks.ranks import Ranks
from bame_lightning.weights.layers import SparseWeight


class Intruders:
    """Note, without waiting for the device, which weights were not zero where they are pruned; tell now and then.

    A look takes two operations a weight. On a CPU, where they would take longer than to zero the weights, the sum of the bits
    tells first whether anything has changed since the weights were sparse (`docs/performance.md`).

    Args:
        ranks: The processes of the run, each of which may hold some rows only.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        # Of weights that are looked at together: how many positions were kept or not zero, at most.
        self._seen: dict[tuple[str, ...], tuple[list[int], Tensor]] = {}
        self._sums: dict[str, Tensor] = {}

    def trust(self, weights: Sequence[SparseWeight]) -> None:
        """Remember weights that were made sparse just now."""
        self._sums |= {sparse.name: _sum_of_bits(sparse.values) for sparse in weights if sparse.values.is_cpu}

    def look(self, weights: Sequence[SparseWeight]) -> None:
        """Note the weights that are not sparse now."""
        if not weights:
            return
        labels = tuple(sparse.label for sparse in weights)
        kept = [sparse.kept.numel() // sparse.pattern.m * sparse.pattern.n for sparse in weights]
        found = torch.stack([self._occupied(sparse, count) for sparse, count in zip(weights, kept, strict=True)])
        if labels in self._seen:
            found = torch.maximum(found, self._seen[labels][1])
        self._seen[labels] = kept, found

    def _occupied(self, sparse: SparseWeight, kept: int) -> Int[Tensor, ""]:
        """Positions that are kept or not zero: as many as are kept, or more."""
        values, known = sparse.values, self._sums.get(sparse.name)
        if values.is_cpu and known is not None and torch.equal(known, _sum_of_bits(values)):
            return torch.tensor(kept)
        # After fit the model is back on the CPU.
        parts = [
            torch.logical_or(part, by).count_nonzero() for part, by in pieces(values, sparse.kept.to(values.device))
        ]
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum()

    def tell(self, what: str) -> None:
        """Warn of what was seen since the last time; waits for the device.

        Args:
            what: What saw these weights, and what becomes of them.
        """
        seen, self._seen = self._seen, {}
        names: list[str] = []
        for labels, (kept, found) in seen.items():
            flags = found > torch.tensor(kept, device=found.device)
            flags = self._ranks.any(flags) if self._ranks.sharded else flags
            names += [name for name, intruded in zip(labels, flags.tolist(), strict=True) if intruded]
        names = list(dict.fromkeys(names))
        if names:
            others = f" and {len(names) - 1} other layers" if len(names) > 1 else ""
            rank_zero_warn(
                f"`{names[0]}`{others} held non-zero weights where they are pruned: {what}. Something else changes weights in "
                "the middle of training: an average that is swapped in, or weights that are reloaded. Average with "
                "`EMAWeightAveraging` or `StochasticWeightAveraging` of Lightning, which masks follow; load weights before fit."
            )


def _sum_of_bits(values: Tensor) -> Int[Tensor, ""]:
    """Sum the bits of a tensor in words of 4 bytes, modulo 2^32, in the order in which they lie in memory."""
    order = sorted(range(values.dim()), key=values.stride, reverse=True)
    flat = values.permute(order).reshape(-1).contiguous()
    whole = flat.numel() * flat.element_size() % 4 == 0 and flat.storage_offset() * flat.element_size() % 4 == 0
    return flat.view(torch.int32 if whole else torch.uint8).sum(dtype=torch.int32)
