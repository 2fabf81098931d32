"""Send pictures of masks to loggers that take them, while training goes on."""

from __future__ import annotations

import lightning as L
import torch
from jaxtyping import UInt8
from torch import Tensor
from typing_extensions import override

from bame_lightning.callbacks.driver import SparseCallback
from bame_lightning.callbacks.extra_logs import log_pictures, with_pictures
from bame_lightning.callbacks.watcher import MaskWatcher, evolving_layers, maps_of
from bame_lightning.show.map_pictures import count_picture, frozen_picture, mask_picture, trace_picture
from bame_lightning.show.maps import changes, mask_map, mask_title
from bame_lightning.show.mask_file import LayerMaps, most_restless
from bame_lightning.weights.layers import SparseWeight

KEY = "bame/maps"
"""Pictures are called bame/maps/<layer>/mask, /oscillations and /frozen."""
TRACES = "bame/restless_blocks"
"""Picture of the positions that the most oscillating blocks kept over time."""
HISTOGRAM = "bame/oscillations"
"""Histogram of the oscillations of all blocks."""


class MaskImages(MaskWatcher):
    """Log maps of every sparse layer, and a histogram of oscillations, to W&B and TensorBoard.

    It does so at the start of training, and after adaptations that are spaced evenly over the method's window. The map of a
    mask shows filters and input positions, compared with the first mask. Maps of the same blocks show how often each
    oscillated and, if any is frozen, which ones. One picture follows the blocks that oscillate most. Large layers are cut, as
    the titles say. Of sharded weights the rows of the first process are shown. Without such a logger it costs nothing.

    Args:
        at_most: Number of looks at the masks after the first one.

    Raises:
        ValueError: If `at_most` is less than 1.
    """

    def __init__(self, *, at_most: int = 5) -> None:
        super().__init__(at_most)

    @override
    def begin(self, trainer: L.Trainer, method: SparseCallback) -> None:
        self.look(trainer, method)

    @override
    def look(self, trainer: L.Trainer, method: SparseCallback) -> None:
        loggers = with_pictures(trainer.loggers)
        if not loggers:
            return
        evolving = evolving_layers(method)
        pictures = dict[str, Tensor]()
        for sparse in method.weights:
            drawn = draw(sparse, maps_of(sparse, evolving.get(sparse.name)))
            pictures |= {f"{KEY}/{sparse.label}/{name}": picture for name, picture in drawn.items()}
        if traces := most_restless(self.restless.traces):
            pictures[TRACES] = trace_picture(traces)
        counts = [layer.oscillations.cpu() for layer in evolving.values()]
        histograms = {HISTOGRAM: torch.cat(counts)} if counts else {}
        # The step under which Lightning logs scalars now.
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        for logger in loggers:
            log_pictures(logger, pictures, histograms, step)


def draw(sparse: SparseWeight, maps: LayerMaps) -> dict[str, UInt8[Tensor, "height width 3"]]:
    """Draw the maps of a weight.

    Args:
        sparse: The weight.
        maps: Its maps.

    Returns:
        Pictures by name: mask, and oscillations and frozen if there are such maps.
    """
    m, filters = sparse.pattern.m, len(sparse.kept)
    positions = sparse.kept.numel() // filters
    codes = changes(maps.mask, mask_map(sparse.initial, m).cpu())
    title = mask_title(sparse.label, sparse.pattern, (filters, positions), codes.shape)
    pictures = {"mask": mask_picture(codes, m, title)}
    if maps.oscillations is not None:
        pictures["oscillations"] = count_picture(maps.oscillations, m, f"Oscillations: {title}")
    if maps.frozen is not None and maps.frozen.any():
        pictures["frozen"] = frozen_picture(maps.frozen, m, f"Frozen blocks: {title}")
    return pictures
