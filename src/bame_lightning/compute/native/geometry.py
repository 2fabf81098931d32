"""Where features go when activations are packed, and which of them an output position reads.

The kernels multiply vectors: each lane of a vector holds the same feature of another sample. A group of samples is packed
as one vector for each row of the image, channel and column, in the order (y, channel, x). So neighbouring positions lie
side by side, and channels are rarely a power of two apart, which caches would not like. A linear layer is a convolution
of images of one pixel. If there is only one output position, several vectors of samples stand side by side (`tiles`), so
that each kept weight multiplies as many vectors in one go.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from bame_lightning.compute.kept import Division
from bame_lightning.compute.native.structures import Packing
from bame_lightning.compute.operation import Conv2d, Linear, Operation

TILES = 8
"""Vectors of samples side by side: the number of sums that the kernels keep in registers."""
CACHED = 256 * 1024
"""Bytes of packed features that a section of a linear layer reads: a quarter of a usual second-level cache."""


class Image(NamedTuple):
    """The shape of a sample, and how it lies in memory.

    Args:
        channels: Channels; features of a linear layer.
        height: Rows of pixels.
        width: Pixels of a row.
        last: Whether channels lie side by side.
    """

    channels: int
    height: int = 1
    width: int = 1
    last: bool = True

    @property
    def features(self) -> int:
        """How many numbers a sample has."""
        return self.channels * self.height * self.width


class Place(NamedTuple):
    """A packed image: its size with a border of zeros, and where each feature goes.

    Args:
        height: Rows with the border.
        width: Pixels with the border.
        top: Rows of the border above.
        left: Pixels of the border at the left.
        map: Feature in the order of memory -> vector.
        image: What is packed.
    """

    height: int
    width: int
    top: int
    left: int
    map: Tensor
    image: Image

    def packing(self, tiles: int) -> Packing:
        """Describe this to the kernels, without source and samples, which change with each call."""
        return Packing(
            features=self.image.features,
            map=self.map,
            tiles_of_group=tiles,
            height=self.height,
            channels=self.image.channels,
            width=self.width,
            top=self.top,
            left=self.left,
            inner_height=self.image.height,
            inner_width=self.image.width,
        )


class Reading(NamedTuple):
    """What a product reads, and where its results go.

    Args:
        place: The packed image that is read.
        tiles: Vectors of samples that lie side by side.
        first: Kind of positions -> the first of its positions; last, their number.
        unit: Position -> vector.
        offset: Position -> element of an output sample.
        row_stride: Elements between rows (channels) of an output sample.
        table: Column, or row * taps + tap -> vector; None if both numbers are the same.
        group_units: Vectors between groups of channels, in `table`.
        output: The shape of an output sample.
    """

    place: Place
    tiles: int
    first: Tensor
    unit: Tensor
    offset: Tensor
    row_stride: int
    table: Tensor | None
    group_units: int
    output: Image


class Geometry(NamedTuple):
    """Everything that follows from the shapes of a call.

    Args:
        forward: Of the output.
        backward: Of the gradient of the input.
        gradient: The packed gradient of the output, where the weight gradient reads it.
        gradient_unit: Output position -> vector.
    """

    forward: Reading
    backward: Reading
    gradient: Place
    gradient_unit: Tensor


def division(operation: Operation, weight: torch.Size, element: int, lanes: int) -> Division:
    """How the transposed lists of a weight are divided."""
    if isinstance(operation, Linear):
        return Division(sections=sections(weight[0], element, lanes))
    (sh, sw), (ph, pw), (dh, dw) = operation.stride, operation.padding, operation.dilation
    kinds = [(kh * dh - ph) % sh * sw + (kw * dw - pw) % sw for kh in range(weight[2]) for kw in range(weight[3])]
    return Division(sh * sw, tuple(kinds))


def sections(features: int, element: int, lanes: int) -> int:
    """Into how many parts a linear layer's features are cut."""
    return max(1, math.ceil(features * lanes * TILES * element / CACHED))


def geometry(
    operation: Operation, weight: torch.Size, source: Image, output: Image, samples: int, lanes: int
) -> Geometry:
    """Lay out a call.

    Args:
        operation: What is computed.
        weight: Shape of the weight.
        source: The shape of an input sample.
        output: The shape of an output sample.
        samples: Number of samples.
        lanes: Samples of a vector.
    """
    conv = operation if isinstance(operation, Conv2d) else Conv2d()
    tiles = min(TILES, max(1, math.ceil(samples / lanes)))
    kernel = tuple(weight[2:]) or (1, 1)
    forward = _forward(conv, kernel, source, output, tiles if output.height * output.width == 1 else 1, lanes)
    backward = _backward(conv, kernel, source, output, tiles if source.height * source.width == 1 else 1, lanes)
    if isinstance(operation, Linear):
        forward, backward = forward._replace(table=None), backward._replace(table=None)
    # Without a border: every position lies within.
    gradient = _place(output, output.height, output.width, 0, 0, forward.tiles)
    unit = _positions(output.height, output.width, output.channels * output.width, 1)
    return Geometry(forward, backward, gradient, _tiled(unit, forward.tiles))


def _forward(conv: Conv2d, kernel: tuple[int, ...], source: Image, output: Image, tiles: int, lanes: int) -> Reading:
    (sh, sw), (ph, pw), (dh, dw) = conv.stride, conv.padding, conv.dilation
    height = max(ph + source.height, (output.height - 1) * sh + (kernel[0] - 1) * dh + 1)
    width = max(pw + source.width, (output.width - 1) * sw + (kernel[1] - 1) * dw + 1)
    place = _place(source, height, width, ph, pw, tiles)
    line = source.channels * width
    unit = _positions(output.height, output.width, sh * line, sw)
    inner = source.channels // conv.groups
    taps = torch.tensor([kh * dh * line + kw * dw for kh in range(kernel[0]) for kw in range(kernel[1])])
    table = (taps[:, None] + torch.arange(inner) * width).flatten()
    row_stride, offset = _written(output, torch.arange(output.height * output.width))
    return Reading(
        place,
        tiles,
        _int32([0, len(unit) * tiles]),
        _tiled(unit, tiles),
        _tiled_offset(offset, tiles, lanes, output),
        row_stride,
        _int32(table),
        inner * width,
        output,
    )


def _backward(conv: Conv2d, kernel: tuple[int, ...], source: Image, output: Image, tiles: int, lanes: int) -> Reading:
    """Gradient of the input: position y reads the gradient at (y + padding - tap * dilation) / stride, where that is whole."""
    rows = _Axis(conv.stride[0], conv.padding[0], conv.dilation[0], kernel[0], source.height, output.height)
    columns = _Axis(conv.stride[1], conv.padding[1], conv.dilation[1], kernel[1], source.width, output.width)
    place = _place(output, rows.size, columns.size, rows.before, columns.before, tiles)
    line = output.channels * columns.size
    units, offsets, first = [], [], [0]
    for kind_y in range(rows.stride):
        for kind_x in range(columns.stride):
            ys, xs = rows.positions(kind_y), columns.positions(kind_x)
            units.append(_positions(len(ys), len(xs), line, 1) + rows.before * line + columns.before)
            offsets.append((ys[:, None] * source.width + xs).flatten())
            first.append(first[-1] + len(units[-1]) * tiles)
    taps = torch.tensor(
        [rows.shift(kh) * line + columns.shift(kw) for kh in range(kernel[0]) for kw in range(kernel[1])]
    )
    table = (torch.arange(output.channels)[:, None] * columns.size + taps).flatten()
    row_stride, offset = _written(source, torch.cat(offsets))
    return Reading(
        place,
        tiles,
        _int32(first),
        _tiled(torch.cat(units), tiles),
        _tiled_offset(offset, tiles, lanes, source),
        row_stride,
        _int32(table),
        0,
        source,
    )


class _Axis(NamedTuple):
    """One axis of a convolution, for the gradient of its input."""

    stride: int
    padding: int
    dilation: int
    taps: int
    inputs: int
    outputs: int

    def shift(self, tap: int) -> int:
        """The output that an input of the tap's kind reads, minus the input's number within its kind."""
        kind = (tap * self.dilation - self.padding) % self.stride
        return (kind + self.padding - tap * self.dilation) // self.stride

    def positions(self, kind: int) -> Tensor:
        """Number of inputs of a kind."""
        return torch.arange(kind, self.inputs, self.stride)

    @property
    def before(self) -> int:
        """Zeros before the first output."""
        return max(0, -min(self.shift(tap) for tap in range(self.taps)))

    @property
    def size(self) -> int:
        """Outputs with the zeros around them."""
        last = (self.inputs - 1) // self.stride + max(self.shift(tap) for tap in range(self.taps))
        return self.before + max(self.outputs, last + 1)


def _place(image: Image, height: int, width: int, top: int, left: int, tiles: int) -> Place:
    y, c, x = (torch.arange(size) for size in (image.height, image.channels, image.width))
    unit = (((y + top)[None, :, None] * image.channels + c[:, None, None]) * width + x + left) * tiles
    return Place(height, width, top, left, _int32(unit.permute(1, 2, 0) if image.last else unit), image)


def _positions(height: int, width: int, line: int, step: int) -> Tensor:
    return (torch.arange(height)[:, None] * line + torch.arange(width) * step).flatten()


def _written(image: Image, pixels: Tensor) -> tuple[int, Tensor]:
    """The distance between channels in memory, and the places of pixels."""
    if image.last or image.height * image.width == 1:
        return 1, pixels * image.channels
    return image.height * image.width, pixels


def _tiled(unit: Tensor, tiles: int) -> Tensor:
    """Repeat positions for each vector of samples."""
    return _int32((unit[:, None] * tiles + torch.arange(tiles)).flatten())


def _tiled_offset(offset: Tensor, tiles: int, lanes: int, image: Image) -> Tensor:
    return (offset[:, None] + torch.arange(tiles) * lanes * image.features).flatten().contiguous()


def _int32(values: Tensor | list[int]) -> Tensor:
    return torch.as_tensor(values).to(torch.int32).flatten().contiguous()
