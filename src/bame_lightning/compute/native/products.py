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
from bame_lightning.compute.native.geometry import Geometry, Image, Reading, division, geometry, sections
from bame_lightning.compute.operation import Linear, Operation

_GEOMETRIES = 8
"""Shapes of calls that are remembered."""
_TYPES = {torch.float32: 4, torch.float64: 8}


class KernelProducts:
    """A layer's products by the kernels, for weights that are zero where a mask prunes.

    Args:
        operation: What the layer computes.
        mask: True where kept, shape (out, in, *kernel).
        pattern: N:M, exactly N in each block.
        dtype: Of weights and activations.

    Raises:
        Unavailable: If the kernels cannot be had on this machine.
        ValueError: If a block keeps another number than N.
    """

    name = "kernels"

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
            Their values in the order of the index; None if a kept one is not finite, or a pruned one not zero: only dense
            products are right then.
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
        """The output; None if an input is not finite, for then it would differ from the dense one: 0 * inf = nan."""
        x, source = _dense(x, isinstance(self.operation, Linear))
        output = self._output(x, values)
        made = output.new_empty(0) if not output.numel() else output
        call, _keep = self._product(self._geometry(x, source, output).forward, self._units_of("columns", x, output))
        call.bias = structures.address(None if bias is None else bias.contiguous())
        call.matrix.begin = call.matrix.end = call.matrix.slot = None
        return self._run(call, x, values, made)
