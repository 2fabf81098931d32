"""Products by the C++ kernels."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bame_lightning.blocks.pattern import NMPattern
from bame_lightning.compute.kept import KeptIndex, Strides, strides_of
from bame_lightning.compute.native import structures
from bame_lightning.compute.native.build import kernels
from bame_lightning.compute.native.geometry import TILES, Geometry, Image, Reading, division, geometry, sections
from bame_lightning.compute.operation import Linear, Operation

_GEOMETRIES = 8
"""Number of shapes of calls that are remembered."""
_TYPES = {torch.float32: 4, torch.float64: 8}


class KernelProducts:
    """Compute a layer's products by the kernels; the weight is zero where a mask prunes.

    Args:
        operation: What the layer computes.
        mask: True where kept, shape (out, in, *kernel).
        pattern: N:M, exactly N in each block.
        dtype: Of weights and activations.

    Raises:
        UnavailableError: If the kernels are not available on this machine.
        ValueError: If a block does not keep exactly N weights.
    """

    name, device = "kernels", "cpu"

    def __init__(
        self, operation: Operation, mask: Bool[Tensor, "out inp *kernel"], pattern: NMPattern, dtype: torch.dtype
    ) -> None:
        self.library = kernels()
        self.operation, self.shape, self.type = operation, mask.shape, _TYPES[dtype]
        self.lanes = int(self.library.nm_lanes(ctypes.c_int64(self.type)))
        self.index = KeptIndex(
            mask,
            pattern,
            groups=getattr(operation, "groups", 1),
            division=division(operation, mask.shape, self.type, self.lanes),
            library=self.library,
        )
        self._geometries: dict[Any, Geometry] = {}
        self._units: dict[Any, tuple[int, Tensor]] = {}
        self._strides: dict[Any, Strides] = {}

    def update(self, mask: Bool[Tensor, "out inp *kernel"], rows: Int[Tensor, " chosen"] | None = None) -> int:
        """Follow a mask that has changed: `KeptIndex.update`."""
        return self.index.update(mask, rows)

    def values(self, weight: Float[Tensor, "out inp *kernel"]) -> Float[Tensor, "rows entries"] | None:
        """Gather the kept weights.

        Returns:
            Their values in the order of the index. None if a kept one is not finite, or a pruned one not zero: then only
            dense products are right.
        """
        index, strides = self.index, self._strides_of(weight)
        values = weight.new_empty(index.columns.shape)
        call = structures.Gather(
            type=self.type,
            threads=torch.get_num_threads(),
            weight=weight,
            values=values,
            columns=index.columns,
            column_offset=strides.column,
            rows=index.rows,
            row_entries=index.columns.shape[1],
            row_stride=strides.row,
            row_length=index.row_length,
        )
        return None if self.library.nm_gather(ctypes.byref(call)) else values

    def forward(self, x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor | None:
        """The output; None if an input is not finite, because the dense product has 0 * inf = nan there."""
        x = self._packable(x)
        output = self._empty(x, self._output_shape(x))
        key, laid = self._geometry(x, output)
        reading = laid.forward
        entries = structures.Entries(
            row_entries=self.index.columns.shape[1],
            unit=self._column_units(key, reading),
            scale=reading.tiles,
            value=values,
        )
        parts = sections(self.shape[1], self.type, self.lanes) if isinstance(self.operation, Linear) else 1
        return self._multiply(reading, entries, parts, 1, x, bias, output)

    def input_gradient(self, gradient: Tensor, values: Tensor, x: Tensor) -> Tensor | None:
        """The gradient of the input x, which lies in memory as x does; None if `gradient` is not finite."""
        gradient, made = self._packable(gradient), self._empty(x, x.shape)
        key, laid = self._geometry(made, gradient)
        reading, lists, parts = laid.backward, self.index.lists, self.index.division
        entries = structures.Entries(
            begin=lists.begin,
            end=lists.end,
            unit=self._where_units(key, reading),
            scale=reading.tiles,
            value=values,
            slot=lists.slot,
            entries=len(lists.slot),
        )
        return self._multiply(reading, entries, parts.sections, parts.kinds, gradient, None, made)

    def weight_gradient(
        self, gradient: Tensor, x: Tensor, weight: Tensor, also: Int[Tensor, "*more"] | None = None
    ) -> Tensor | None:
        """The gradient of the weight where it is kept and at the positions `also`, zero elsewhere.

        Args:
            gradient: Of the output.
            x: The input.
            weight: The result lies in memory as this does.
            also: More positions, numbered by row, kernel position and input; row by row, in any order within a row.

        Returns:
            The gradient; None if `gradient` or `x` is not finite.

        Raises:
            ValueError: If a position lies outside the weight, or positions are not sorted by row.
        """
        gradient, x = self._packable(gradient), self._packable(x)
        key, laid = self._geometry(x, gradient)
        reading, strides, index = laid.forward, self._strides_of(weight), self.index
        made, units = torch.empty_like(weight), self._column_units(key, reading)
        more = None if also is None or not also.numel() else also.to(torch.int64).flatten()
        call = structures.WeightGradient(
            type=self.type,
            threads=torch.get_num_threads(),
            input=_of(reading.place.packing(reading.tiles), x),
            gradient=_of(laid.gradient.packing(reading.tiles), gradient),
            matrix=structures.Entries(row_entries=index.columns.shape[1], unit=units, scale=reading.tiles),
            sections=sections(self.shape[1], self.type, self.lanes) if isinstance(self.operation, Linear) else 1,
            positions=len(reading.unit),
            input_unit=reading.unit,
            gradient_unit=laid.gradient_unit,
            gradient_row=laid.gradient.width * reading.tiles,
            rows=index.rows,
            more=structures.Positions(
                number=more,
                count=0 if more is None else len(more),
                row_length=index.row_length,
                column_unit=reading.table,
                rows_of_group=index.rows // index.groups,
                group_units=reading.group_units if index.groups > 1 else 0,
            ),
            output=made,
            columns=index.columns,
            column_offset=strides.column,
            row_stride=strides.row,
            output_size=made.numel(),
            rows_lie_together=strides.together,
        )
        failed = self.library.nm_weight_gradient(ctypes.byref(call))
        if failed < 0:
            raise ValueError(
                f"`also` must hold positions from 0 to {weight.numel() - 1}, all of a row before those of the next."
            )
        return None if failed else made

    def _multiply(
        self,
        reading: Reading,
        entries: structures.Entries,
        parts: int,
        kinds: int,
        source: Tensor,
        bias: Tensor | None,
        made: Tensor,
    ) -> Tensor | None:
        whole_bias = None if bias is None else bias.contiguous()
        call = structures.Product(
            type=self.type,
            threads=torch.get_num_threads(),
            input=_of(reading.place.packing(reading.tiles), source),
            matrix=entries,
            sections=parts,
            classes=kinds,
            positions=reading.first,
            input_unit=reading.unit,
            output_offset=reading.offset,
            rows=reading.output.channels,
            bias=whole_bias,
            output=made,
            output_features=reading.output.features,
            row_stride=reading.row_stride,
            samples_of_position=self.lanes if reading.tiles > 1 else 0,
        )
        return None if self.library.nm_product(ctypes.byref(call)) else made

    def _packable(self, x: Tensor) -> Tensor:
        """`x` itself if its samples lie one after the other, channels first or last; else a copy."""
        if x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)):
            return x
        return x.contiguous()

    def _empty(self, like: Tensor, shape: torch.Size) -> Tensor:
        last = like.dim() == 4 and not like.is_contiguous() and like.is_contiguous(memory_format=torch.channels_last)
        return torch.empty(
            shape, dtype=like.dtype, memory_format=torch.channels_last if last else torch.contiguous_format
        )

    def _output_shape(self, x: Tensor) -> torch.Size:
        if isinstance(self.operation, Linear):
            return torch.Size((*x.shape[:-1], self.shape[0]))
        height, width = self.operation.output_size(x.shape[2:], self.shape[2:])
        return torch.Size((len(x), self.shape[0], height, width))

    def _geometry(self, x: Tensor, output: Tensor) -> tuple[Any, Geometry]:
        """The geometry of a call with these shapes, and the key under which it is remembered."""
        source, made = _image(x, self.operation), _image(output, self.operation)
        samples = x.numel() // source.features
        tiles = min(-(-samples // self.lanes), TILES)
        key = (source, made, tiles)
        if key not in self._geometries:
            if len(self._geometries) >= _GEOMETRIES:
                self._geometries.clear()
                self._units.clear()
            self._geometries[key] = geometry(self.operation, self.shape, source, made, samples, self.lanes)
        return key, self._geometries[key]

    def _column_units(self, key: Any, reading: Reading) -> Tensor:
        """Where kept weights read packed inputs, row by row."""
        index, table = self.index, reading.table
        if table is None:
            return index.columns
        found = self._units.get(("columns", key))
        if found is None or found[0] != index.version:
            units = torch.empty_like(index.columns)
            self.library.nm_translate(
                ctypes.c_void_p(index.columns.data_ptr()),
                ctypes.c_void_p(table.data_ptr()),
                ctypes.c_void_p(units.data_ptr()),
                *map(
                    ctypes.c_int64,
                    (*units.shape, index.rows // index.groups, reading.group_units, torch.get_num_threads()),
                ),
            )
            found = self._units[("columns", key)] = (index.version, units)
        return found[1]

    def _where_units(self, key: Any, reading: Reading) -> Tensor:
        """Where entries of the transposed lists read packed gradients."""
        lists = self.index.lists
        if reading.table is None:
            return lists.where
        found = self._units.get(("where", key))
        if found is None or found[0] != self.index.version:
            units = reading.table.index_select(0, lists.where)
            found = self._units[("where", key)] = (self.index.version, units)
        return found[1]

    def _strides_of(self, weight: Tensor) -> Strides:
        key = (weight.shape, weight.stride())
        if key not in self._strides:
            self._strides[key] = strides_of(weight)
        return self._strides[key]


def _image(x: Tensor, operation: Operation) -> Image:
    if isinstance(operation, Linear):
        return Image(x.shape[-1])
    last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return Image(x.shape[1], x.shape[2], x.shape[3], last)


def _of(packing: structures.Packing, source: Tensor) -> structures.Packing:
    """Describe to the kernels how some samples are packed."""
    packing.source, packing.samples = source.data_ptr(), source.numel() // packing.features
    return packing
