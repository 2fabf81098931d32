"""Maps as pictures with title, axes and legend, for loggers that take images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, UInt8
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from bame_lightning.maps import CHANGES, patch

_BLOCKS_WITH_LINES = 40


def mask_picture(codes: UInt8[Tensor, "filters positions"], m: int, title: str) -> UInt8[Tensor, "height width 3"]:
    """Draw what became of a mask.

    Args:
        codes: As `maps.changes` makes them.
        m: Weights in a block; thin lines separate blocks, unless there are very many.
        title: For people, such as `maps.mask_title`.

    Returns:
        Red, green and blue.
    """
    figure, axes = _figure(codes.shape, title)
    colours = ListedColormap([colour for _, colour in CHANGES])
    axes.imshow(
        codes.cpu().numpy(), colours, aspect="auto", interpolation="nearest", vmin=-0.5, vmax=len(CHANGES) - 0.5
    )
    blocks = codes.shape[1] // m
    if blocks <= _BLOCKS_WITH_LINES:
        for block in range(1, blocks):
            axes.axvline(block * m - 0.5, color="#999999", linewidth=0.6)
    stride = m * max(1, -(-blocks // 8))
    axes.set_xticks(range(0, codes.shape[1], stride))
    axes.set_xlabel("input position")
    legend = [Patch(facecolor=colour, edgecolor="#BBBBBB", label=label) for label, colour in CHANGES]
    figure.legend(handles=legend, loc="outside lower center", ncols=len(CHANGES), frameon=False, fontsize=8)
    return _pixels(figure)


def block_picture(
    values: Float[Tensor, "rows columns"], size: Sequence[int], title: str, unit: str
) -> UInt8[Tensor, "height width 3"]:
    """Draw a value per block.

    Args:
        values: As `maps.block_map` makes them.
        size: Filters of the layer, and blocks of each.
        title: For people, such as `maps.block_title`.
        unit: What the values are.

    Returns:
        Red, green and blue.
    """
    figure, axes = _figure(values.shape, title)
    high, wide = patch(size, *values.shape)
    # A cell spans the filters and blocks that it stands for.
    extent = (-0.5, values.shape[1] * wide - 0.5, values.shape[0] * high - 0.5, -0.5)
    top = float(values.max()) or 1.0
    image = axes.imshow(
        values.cpu().numpy(), "viridis", aspect="auto", interpolation="nearest", vmin=0, vmax=top, extent=extent
    )
    axes.set_xlabel("block of the filter")
    figure.colorbar(image, ax=axes, label=unit, pad=0.02)
    return _pixels(figure)


def _figure(shape: Sequence[int], title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8.0, min(5.0, max(2.4, 1.4 + 0.08 * shape[0]))), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_ylabel("filter")
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.tick_params(labelsize=8)
    return figure, axes


def _pixels(figure: Figure) -> UInt8[Tensor, "height width 3"]:
    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    canvas.draw()  # type: ignore[no-untyped-call]
    return torch.from_numpy(np.asarray(canvas.buffer_rgba())[..., :3].copy())  # type: ignore[no-untyped-call]
