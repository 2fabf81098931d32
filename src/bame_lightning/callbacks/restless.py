"""Follow the blocks that oscillate most: which positions they keep after each adaptation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bame_lightning.callbacks.bame import BAMECallback
from bame_lightning.show.mask_file import Trace
from bame_lightning.weights.layers import SparseWeight

FOLLOWED = 8
"""The most blocks that one look adds."""

_Places = tuple[Tensor, ...]


class RestlessBlocks:
    """Keep traces of the blocks that lead in oscillations.

    A look chooses the leaders of that moment; it waits for the device. From then on each adaptation copies their masks, on the
    device and without waiting for it. Of sharded weights the rows of the first process are followed.

    Attributes:
        traces: All blocks that have ever led.
    """

    def __init__(self) -> None:
        self.traces: list[Trace] = []
        self._copies: list[list[Tensor]] = []  # of all layers, after each adaptation since the last look
        self._followed: list[tuple[SparseWeight, list[Trace], _Places]] = []

    def begin(self, method: BAMECallback, traces: Sequence[Trace] = ()) -> None:
        """Go on following the blocks of an earlier part of the run; drop what came after the adaptations that are done."""
        self._copies = []
        self.traces = [trace for trace in traces if trace.since <= method.adaptations]
        for trace in self.traces:
            trace.kept = trace.kept[: method.adaptations - trace.since + 1]
        self._arrange(method)

    def record(self) -> None:
        """After an adaptation, copy the masks of the followed blocks; does not wait for the device."""
        if self._followed:
            self._copies.append([_kept(sparse, places) for sparse, _, places in self._followed])

    def look(self, method: BAMECallback) -> None:
        """Fetch what was copied, and follow the leaders of this moment, too."""
        for layer, (_, traces, _) in enumerate(self._followed):
            if self._copies:
                copied = torch.stack([copies[layer] for copies in self._copies], dim=1).cpu()
                for trace, kept in zip(traces, copied, strict=True):
                    trace.kept = torch.cat((trace.kept, kept))
        self._copies = []
        known = {trace.key: trace for trace in self.traces}
        for found in _leaders(method):
            if found.key in known:
                known[found.key].oscillations = found.oscillations
            else:
                self.traces.append(found)
        self._arrange(method)

    def _arrange(self, method: BAMECallback) -> None:
        self._followed = []
        for sparse in method.weights:
            traces = [trace for trace in self.traces if trace.label == sparse.label]
            if traces:
                each = _blocks_of_a_filter(sparse)
                blocks = [trace.filter * each + trace.block for trace in traces]
                self._followed.append((sparse, traces, _places(sparse, torch.tensor(blocks))))


def _leaders(method: BAMECallback) -> list[Trace]:
    """Find the blocks of the whole network that have oscillated most, as traces that begin now."""
    found = []
    for layer in method.evolving:
        sparse, each = layer.sparse, _blocks_of_a_filter(layer.sparse)
        most, blocks = layer.oscillations.topk(min(FOLLOWED, len(layer.oscillations)))
        kept = _kept(sparse, _places(sparse, blocks))[:, None].cpu()
        for count, block, mask in zip(most.tolist(), blocks.tolist(), kept, strict=True):
            if count:
                found.append(Trace(sparse.label, block // each, block % each, method.adaptations, count, mask))
    return sorted(found, key=lambda trace: -trace.oscillations)[:FOLLOWED]


def _blocks_of_a_filter(sparse: SparseWeight) -> int:
    return sparse.kept[0].numel() // sparse.pattern.m


def _places(sparse: SparseWeight, blocks: Tensor) -> _Places:
    """Find where blocks, numbered as in `to_blocks`, lie in the view that `_kept` makes."""
    shape = _view(sparse).shape[:-1]
    return torch.unravel_index(blocks.to(sparse.kept.device), shape)


def _kept(sparse: SparseWeight, places: _Places) -> Tensor:
    """Masks of some blocks; shape (blocks, m)."""
    return _view(sparse)[places]


def _view(sparse: SparseWeight) -> Tensor:
    # A view in any layout, unlike `to_blocks`, which may copy the mask of the whole layer.
    last = sparse.kept.movedim(1, -1)
    return last.view(*last.shape[:-1], -1, sparse.pattern.m)
