"""Maps as pictures with title, axes and legend, for loggers that take images.

They are painted cell by cell in a few milliseconds, because a network has many layers. A plotting library takes some twenty
times as long to lay out the texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from jaxtyping import Bool, Int, UInt8
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torch import Tensor

from bame_lightning.show.maps import CHANGES, COUNTS, FROZEN, NOTHING
from bame_lightning.show.mask_file import Trace

_WIDTH, _HEIGHT = 768, 448
"""The most pixels for the cells of a map, unless there are more cells."""
_CELL = 96, 24
"""The largest width and height of a cell in pixels."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 24, 36, 88
"""Margins of the cells in pixels."""
_INK, _LINE = "#222222", "#999999"
_BLOCKS_WITH_LINES = 40


def mask_picture(codes: UInt8[Tensor, "filters positions"], m: int, title: str) -> UInt8[Tensor, "height width 3"]:
    """Draw a mask beside the first one.

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
    _label_rows(draw, rows, high)
    stride = m * max(1, -(-blocks // 8))
    _label_columns(draw, range(0, columns, stride), rows, wide, high)
    _legend(image, draw, CHANGES)
    return _pixels(image)


def count_picture(counts: Int[Tensor, "filters blocks"], m: int, title: str) -> UInt8[Tensor, "height width 3"]:
    """Draw how often blocks oscillated, each block where `mask_picture` draws its positions.

    Args:
        counts: As `maps.block_map` makes them.
        m: Weights in a block.
        title: For people.

    Returns:
        Red, green and blue; zero is as pale as a pruned position.
    """
    top = int(counts.max()) or 1
    colours = _shades()[(counts.cpu().numpy() * 255 / top).round().astype(int)]
    colours[counts.cpu().numpy() == 0] = ImageColor.getrgb(NOTHING)
    image, draw = _paint_blocks(colours, m, title)
    y = image.height - 26
    draw.text((_LEFT, y + 6), "oscillations so far: 0", _INK, _font(12), anchor="lm")
    left = _LEFT + int(draw.textlength("oscillations so far: 0", _font(12))) + 8
    draw.rectangle([left, y, left + 22, y + 13], NOTHING, "#BBBBBB")
    image.paste(Image.fromarray(_shades()[None]).resize((234, 14)), (left + 24, y))
    draw.text((left + 266, y + 6), f"{top:,}", _INK, _font(12), anchor="lm")
    return _pixels(image)


def frozen_picture(frozen: Bool[Tensor, "filters blocks"], m: int, title: str) -> UInt8[Tensor, "height width 3"]:
    """Draw which blocks are frozen, each block where `mask_picture` draws its positions.

    Args:
        frozen: As `maps.block_map` makes them.
        m: Weights in a block.
        title: For people.

    Returns:
        Red, green and blue.
    """
    palette = np.array([ImageColor.getrgb(colour) for colour in (NOTHING, FROZEN)], np.uint8)
    image, draw = _paint_blocks(palette[frozen.cpu().numpy().astype(int)], m, title)
    _legend(image, draw, (("may change", NOTHING), (f"frozen: {int(frozen.sum()):,} of these", FROZEN)))
    return _pixels(image)


def trace_picture(traces: Sequence[Trace]) -> UInt8[Tensor, "height width 3"]:
    """Draw which positions blocks kept after each adaptation, a strip of M rows for each block.

    Args:
        traces: At least one, the most restless first.

    Returns:
        Red, green and blue.
    """
    start = min(trace.since for trace in traces)
    end = max(trace.since + len(trace.kept) for trace in traces)
    wide = max(1, _WIDTH // (end - start))
    columns = min(end - start, _WIDTH)
    gap = 22
    height = sum(gap + _row(trace) * trace.kept.shape[1] for trace in traces)
    image = Image.new("RGB", (columns * wide + _LEFT + _RIGHT, height + _TOP + 48), "white")
    draw = ImageDraw.Draw(image)
    draw.text((_LEFT, _TOP // 2), "Positions that the most restless blocks kept", _INK, _font(14), anchor="lm")
    y, dark = _TOP, np.array(ImageColor.getrgb(CHANGES[-1][1]), np.uint8)
    for trace in traces:
        m, high = trace.kept.shape[1], _row(trace)
        times = np.linspace(start, end - 1, columns).round().astype(int) - trace.since
        kept = trace.kept.numpy()[times.clip(0, len(trace.kept) - 1)].T  # (m, columns)
        known = (times >= 0) & (times < len(trace.kept))
        colours = np.full((m, columns, 3), 255, np.uint8)
        colours[:, known] = ImageColor.getrgb(NOTHING)
        colours[kept & known] = dark
        draw.text((_LEFT, y + gap - 4), trace.title, _INK, _font(12), anchor="ls")
        strip = Image.fromarray(colours).resize((columns * wide, m * high), Image.Resampling.NEAREST)
        image.paste(strip, (_LEFT, y + gap))
        draw.text((_LEFT - 8, y + gap + m * high / 2), f"{m} positions", _INK, _font(10), anchor="rm")
        y += gap + m * high
    for share, anchor in ((0.0, "la"), (1.0, "ra")):
        text = f"adaptation {round(start + share * (end - 1 - start)):,}"
        draw.text((_LEFT + share * columns * wide, y + 6), text, _INK, _font(12), anchor=anchor)
    return _pixels(image)


def _row(trace: Trace) -> int:
    """Height of a position in pixels."""
    return max(1, min(6, 64 // trace.kept.shape[1]))


def _paint_blocks(
    colours: np.ndarray[tuple[int, ...], np.dtype[np.uint8]], m: int, title: str
) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """Lay out a picture of blocks, without its legend."""
    rows, columns, _ = colours.shape
    image, draw, (wide, high) = _paint(
        colours.repeat(m, axis=1), title, "input position: the blocks of the map of the mask"
    )
    _label_rows(draw, rows, high)
    _label_columns(draw, range(0, columns * m, m * max(1, -(-columns // 8))), rows, wide, high)
    return image, draw


def _paint(
    cells: np.ndarray[tuple[int, ...], np.dtype[np.uint8]], title: str, label: str
) -> tuple[Image.Image, ImageDraw.ImageDraw, tuple[int, int]]:
    """Lay out a picture around coloured cells; return it with the width and height of a cell in pixels."""
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


def _legend(image: Image.Image, draw: ImageDraw.ImageDraw, entries: Sequence[tuple[str, str]]) -> None:
    place, y = float(_LEFT), image.height - 26
    for label, colour in entries:
        draw.rectangle([place, y, place + 22, y + 12], colour, "#BBBBBB")
        draw.text((place + 28, y + 6), label, _INK, _font(12), anchor="lm")
        place += 28 + draw.textlength(label, _font(12)) + 20


def _label_rows(draw: ImageDraw.ImageDraw, rows: int, high: int) -> None:
    stride = next(
        step for base in (1, 10, 100, 1000, 10_000) for step in (base, 2 * base, 5 * base) if rows <= 6 * step
    )
    for row in range(0, rows, stride):
        y = _TOP + (row + 0.5) * high
        draw.line([_LEFT - 5, y, _LEFT - 2, y], _INK)
        draw.text((_LEFT - 8, y), f"{row}", _INK, _font(12), anchor="rm")


def _label_columns(draw: ImageDraw.ImageDraw, columns: Sequence[int], rows: int, wide: int, high: int) -> None:
    y = _TOP + rows * high
    for column in columns:
        x = _LEFT + (column + 0.5) * wide
        draw.line([x, y + 2, x, y + 5], _INK)
        draw.text((x, y + 14), f"{column}", _INK, _font(12), anchor="mm")


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    found = ImageFont.load_default(size)
    assert isinstance(found, ImageFont.FreeTypeFont)
    return found


@cache
def _shades() -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    ends = np.array([ImageColor.getrgb(colour) for colour in COUNTS], float)
    places = np.linspace(0, len(ends) - 1, 256)
    channels = [np.interp(places, np.arange(len(ends)), channel) for channel in ends.T]
    return np.stack(channels, axis=1).round().astype(np.uint8)


def _pixels(image: Image.Image) -> UInt8[Tensor, "height width 3"]:
    return torch.from_numpy(np.array(image))
