"""Keep the averages of weights that Lightning's callbacks hold sparse, under masks that change."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from bame_lightning.blocks.masks import zero_pruned_
from bame_lightning.callbacks.packages import averaging_callbacks
from bame_lightning.weights.layers import SparseWeight


class Averages:
    """Keep every average of the weights N:M sparse under the masks in force.

    If masks change while weights are averaged, the average holds more than N non-zeros in a block. So after each change of
    masks it is zeroed where weights are pruned now. Where a weight was revived, its average starts anew at the weight. As long
    as masks stay, the average then stays sparse, whichever callback is called first.

    Args:
        trained_with: The Trainer's callbacks; those that average are followed.
        weights: The sparse weights, under their first masks. Averages are made sparse at once.
    """

    def __init__(self, trained_with: Iterable[L.Callback], weights: Sequence[SparseWeight]) -> None:
        self._averaging: list[Any] = [
            callback for callback in trained_with if isinstance(callback, averaging_callbacks())
        ]
        self._weights = weights
        self._kept = [sparse.kept.clone() for sparse in weights] if self._averaging else []
        self._zero_pruned()

    @torch.no_grad()
    def follow(self) -> None:
        """Follow the masks; call after each batch, when they may have changed."""
        if not self._averaging:
            return
        for average in self._models():
            for sparse, before in zip(self._weights, self._kept, strict=True):
                value = sparse.oriented(average.get_parameter(sparse.name).detach())
                revived = (sparse.kept & ~before).to(value.device)
                value.copy_(torch.where(revived, sparse.values.to(value), value))
        self._zero_pruned()
        for sparse, before in zip(self._weights, self._kept, strict=True):
            before.copy_(sparse.kept)

    @torch.no_grad()
    def put_back(self, sparse: SparseWeight, dense: Tensor) -> None:
        """Undo the changes to the averages of a weight that will not be sparse after all.

        Args:
            sparse: The weight.
            dense: Its values before it was pruned.
        """
        for average in self._models():
            value = sparse.oriented(average.get_parameter(sparse.name).detach())
            value.copy_(torch.where(sparse.kept.to(value.device), value, dense.to(value)))

    def _zero_pruned(self) -> None:
        for average in self._models():
            for sparse in self._weights:
                value: Tensor = sparse.oriented(average.get_parameter(sparse.name).detach())
                zero_pruned_(value, sparse.kept.to(value.device))

    def _models(self) -> Iterator[nn.Module]:
        for callback in self._averaging:
            # Nothing public leads to an average while the callbacks hold it, until training ends.
            average = callback._average_model
            if average is not None:
                yield average.module if isinstance(average, torch.optim.swa_utils.AveragedModel) else average
