"""The structures of `interface.h` for ctypes, field by field, and pointers to tensors in them."""

from __future__ import annotations

import ctypes
from typing import Any, ClassVar

from torch import Tensor

_P, _I = ctypes.c_void_p, ctypes.c_int64


def _fields(pointers: str, names: str) -> list[tuple[str, Any]]:
    """Fields in the order of `names`; those in `pointers` are addresses, the others integers."""
    return [(name, _P if name in pointers.split() else _I) for name in names.split()]


class Structure(ctypes.Structure):
    """A structure that takes tensors for pointers. Whoever fills it must keep the tensors alive."""

    _fields_: ClassVar[Any]

    def __init__(self, **values: Any) -> None:
        super().__init__(**{name: address(value) for name, value in values.items()})

    def copy(self) -> Any:
        """A copy, for one call."""
        return type(self).from_buffer_copy(self)


def address(value: Any) -> Any:
    """The address of a tensor's data; any other value as it is."""
    return value.data_ptr() if isinstance(value, Tensor) else value


class Packing(Structure):
    """Samples in memory, and where their features go."""

    _fields_ = _fields(
        "source map",
        "source samples features map tiles_of_group height channels width top left inner_height inner_width",
    )


class Entries(Structure):
    """Rows of a sparse matrix."""

    _fields_ = _fields("begin end unit value slot", "begin end row_entries unit scale value slot entries")


class Product(Structure):
    """A sparse matrix times packed activations."""

    _fields_ = [
        *_fields("", "type threads"),
        ("input", Packing),
        ("matrix", Entries),
        *_fields(
            "positions input_unit output_offset bias output",
            "sections classes positions input_unit output_offset rows bias output output_features row_stride "
            "samples_of_position",
        ),
    ]


class Positions(Structure):
    """Where a gradient is asked for, beside the mask."""

    _fields_ = _fields("number column_unit", "number count row_length column_unit rows_of_group group_units")


class WeightGradient(Structure):
    """Outer products of packed activations and gradients, at single positions."""

    _fields_ = [
        *_fields("", "type threads"),
        ("input", Packing),
        ("gradient", Packing),
        ("matrix", Entries),
        *_fields(
            "input_unit gradient_unit",
            "sections positions input_unit gradient_unit gradient_row rows",
        ),
        ("more", Positions),
        *_fields(
            "output columns column_offset", "output columns column_offset row_stride output_size rows_lie_together"
        ),
    ]


class Gather(Structure):
    """Kept weights, taken from where the parameter has them."""

    _fields_ = _fields(
        "weight values columns column_offset",
        "type threads weight values columns column_offset rows row_entries row_stride row_length",
    )


class Blocks(Structure):
    """A mask, and the lists that are derived from it."""

    _fields_ = _fields(
        "mask mask_offset columns tap_key row_key begin end where slot",
        "threads rows taps inner n m mask mask_row mask_offset columns tap_key row_key rows_of_group keys begin end "
        "where slot places",
    )
