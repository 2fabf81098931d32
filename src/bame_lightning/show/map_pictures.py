"""Maps as pictures with title, axes and legend, for loggers that take images.

Painted cell by cell in a few milliseconds, since a network has many layers: to lay out the texts, a plotting library takes some
twenty times as long.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import matplotlib
import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torch import Tensor

from bame_lightning.show.maps import CHANGES, patch

_WIDTH, _HEIGHT = 768, 448
"""Pixels for the cells of a map at most, unless there are more cells."""
_CELL = 96, 24
"""Width and height of a cell in pixels at most."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 24, 36, 88
"""Margins of the cells in pixels."""
_INK, _LINE = "#222222", "#999999"
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
    palette = np.array([ImageColor.getrgb(colour) for _, colour in CHANGES], np.uint8)
    image, draw, (wide, high) = _paint(palette[codes.cpu().numpy()], title, "input position")
    rows, columns = codes.shape
    blocks = columns // m
    if blocks <= _BLOCKS_WITH_LINES:
        for block in range(1, blocks):
            draw.line([_LEFT + block * m * wide, _TOP, _LEFT + block * m * wide, _TOP + rows * high - 1], _LINE)
    _label_rows(draw, rows, 1, high)
    stride = m * max(1, -(-blocks // 8))
    _label_columns(draw, range(0, columns, stride), rows, wide, high)
    place = float(_LEFT)
    for label, colour in CHANGES:
        y = image.height - 26
        draw.rectangle([place, y, place + 22, y + 12], colour, "#BBBBBB")
        draw.text((place + 28, y + 6), label, _INK, _font(12), anchor="lm")
        place += 28 + draw.textlength(label, _font(12)) + 20
    return _pixels(image)


def block_picture(
    values: Float[Tensor, "rows columns"], size: Sequence[int], title: str, unit: str, top: float | None = None
) -> UInt8[Tensor, "height width 3"]:
    """Draw a value per block.

    Args:
        values: As `maps.block_map` makes them.
        size: Filters of the layer, and blocks of each.
        title: For people, such as `maps.block_title`.
        unit: What the values are.
        top: Where the scale, which starts at 0, ends; None: at the largest value.

    Returns:
        Red, green and blue.
    """
    top = top or float(values.max()) or 1.0
    shades = (values.cpu().numpy() * (255 / top)).round().astype(np.uint8)
    image, draw, (wide, high) = _paint(_viridis()[shades], title, "block of the filter")
    rows, columns = values.shape
    filters, blocks = patch(size, *values.shape)  # that a cell stands for
    _label_rows(draw, rows, filters, high)
    stride = max(1, -(-columns // 8))
    _label_columns(draw, range(0, columns, stride), rows, wide, high, each=blocks)
    y = image.height - 26
    draw.text((_LEFT, y + 6), f"{unit}: 0", _INK, _font(12), anchor="lm")
    left = _LEFT + int(draw.textlength(f"{unit}: 0", _font(12))) + 8
    image.paste(Image.fromarray(_viridis()[None]).resize((256, 14)), (left, y))
    draw.text((left + 264, y + 6), f"{top:.3g}", _INK, _font(12), anchor="lm")
    return _pixels(image)


def _paint(
    cells: np.ndarray[tuple[int, ...], np.dtype[np.uint8]], title: str, label: str
) -> tuple[Image.Image, ImageDraw.ImageDraw, tuple[int, int]]:
    """Lay out a picture around cells of some colour; returns it with the width and height of a cell in pixels."""
    rows, columns, _ = cells.shape
    rooms = zip(_CELL, (_WIDTH, _HEIGHT), (columns, rows), strict=True)
    wide, high = (max(1, min(most, room // count)) for most, room, count in rooms)
    legend = 640  # the texts below the map must fit as well as the title
    width = max(columns * wide, legend, int(_font(14).getlength(title))) + _LEFT + _RIGHT
    image = Image.new("RGB", (width, rows * high + _TOP + _BOTTOM), "white")
    image.paste(Image.fromarray(cells).resize((columns * wide, rows * high), Image.Resampling.NEAREST), (_LEFT, _TOP))
    draw = ImageDraw.Draw(image)
    draw.rectangle([_LEFT - 1, _TOP - 1, _LEFT + columns * wide, _TOP + rows * high], outline=_INK)
    draw.text((_LEFT, _TOP // 2), title, _INK, _font(14), anchor="lm")
    draw.text((_LEFT + columns * wide / 2, _TOP + rows * high + 34), label, _INK, _font(13), anchor="mm")
    side = Image.new("RGB", (48, 18), "white")
    ImageDraw.Draw(side).text((24, 9), "filter", _INK, _font(13), anchor="mm")
    image.paste(side.rotate(90, expand=True), (4, max(0, _TOP + rows * high // 2 - 24)))
    return image, draw, (wide, high)


def _label_rows(draw: ImageDraw.ImageDraw, rows: int, each: int, high: int) -> None:
    stride = next(
        step for base in (1, 10, 100, 1000, 10_000) for step in (base, 2 * base, 5 * base) if rows <= 6 * step
    )
    for row in range(0, rows, stride):
        y = _TOP + (row + 0.5) * high
        draw.line([_LEFT - 5, y, _LEFT - 2, y], _INK)
        draw.text((_LEFT - 8, y), f"{row * each}", _INK, _font(12), anchor="rm")


def _label_columns(
    draw: ImageDraw.ImageDraw, columns: Sequence[int], rows: int, wide: int, high: int, *, each: int = 1
) -> None:
    y = _TOP + rows * high
    for column in columns:
        x = _LEFT + (column + 0.5) * wide
        draw.line([x, y + 2, x, y + 5], _INK)
        draw.text((x, y + 14), f"{column * each}", _INK, _font(12), anchor="mm")


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    found = ImageFont.load_default(size)
    assert isinstance(found, ImageFont.FreeTypeFont)
    return found


@cache
def _viridis() -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return (matplotlib.colormaps["viridis"](np.arange(256))[:, :3] * 255).round().astype(np.uint8)


def _pixels(image: Image.Image) -> UInt8[Tensor, "height width 3"]:
    return torch.from_numpy(np.array(image))
