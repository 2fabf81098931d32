"""Find non-zeros where weights are pruned: something else has changed weights in the middle of training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from bame_lightning.callbacks.ranks import Ranks
from bame_lightning.methods.training import SparseTraining
from bame_lightning.weights.layers import SparseWeight


class Intruders:
    """Note, without waiting for the device, which weights are not zero where they are pruned; warn at intervals.

    Args:
        ranks: The processes of the run, each of which may hold some rows only.
        training: The run; its weights are made sparse again after a warning.
    """

    def __init__(self, ranks: Ranks, training: SparseTraining) -> None:
        self._ranks = ranks
        self._training = training
        self._seen: dict[tuple[str, ...], Tensor] = {}

    def look(self, weights: Sequence[SparseWeight]) -> None:
        """Note the weights that are not sparse now; starts a few operations for each."""
        if not weights:
            return
        found = []
        for sparse in weights:
            values = sparse.values
            # After fit the model is back on the CPU.
            found.append(torch.gt(values != 0, sparse.kept.to(values.device)).any())
        labels, flags = tuple(sparse.label for sparse in weights), torch.stack(found)
        before = self._seen.get(labels)
        self._seen[labels] = flags if before is None else flags | before

    def tell(self, what: str) -> None:
        """Warn of what was seen since the last time, and zero it while training goes on; waits for the device.

        Args:
            what: What happened with these weights, for the message.
        """
        seen, self._seen = self._seen, {}
        if not seen:
            return
        by_label: dict[str, Tensor] = {}
        for labels, looks in seen.items():
            for label, flag in zip(labels, looks.unbind(), strict=True):
                by_label[label] = flag | by_label.get(label, flag)
        flags = torch.stack(list(by_label.values()))
        found = (self._ranks.any(flags) if self._ranks.sharded else flags).tolist()
        names = [label for label, intruded in zip(by_label, found, strict=True) if intruded]
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            rank_zero_warn(
                f"`{names[0]}`{more} held non-zero weights where they are pruned: {what}. Something else changes weights in "
                "the middle of training: an average that is swapped in, or weights that are reloaded. Average with "
                "`EMAWeightAveraging` or `StochasticWeightAveraging` of Lightning, which masks follow; load weights before fit."
            )
            if self._training.attached:
                self._training.method.enforce()
