"""Which weights of a layer are kept, as lists of positions that follow a mask as it changes."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int, Int32, Shaped
from torch import Tensor

from bame_lightning.blocks.pattern import NMPattern
from bame_lightning.compute.native.structures import Blocks

_FREE = 0.25
"""Free places of the transposed lists: a share of the entries, and a number of places more for each list."""
_FREE_OF_LIST = 4


class Strides(NamedTuple):
    """Where a weight's elements lie in memory, as rows and columns.

    Args:
        row: Elements from one row to the next.
        column: Column -> element of its row; None if they are the same.
        together: Whether the elements of a row are consecutive.
    """

    row: int
    column: Int[Tensor, " columns"] | None
    together: bool


class Lists(NamedTuple):
    """The kept weights by input: what the gradient of an input needs.

    Args:
        begin: First place of each list, then the end of the last one. There is a list for each kind of output position, each
            section of rows and each input channel, in this order.
        end: Where the entries of each list end; free places follow.
        where: Row * taps + tap of an entry.
        slot: Place of the entry's weight in `columns`.
    """

    begin: Int32[Tensor, " lists_and_end"]
    end: Int32[Tensor, " lists"]
    where: Int32[Tensor, " places"]
    slot: Int32[Tensor, " places"]


@dataclass(frozen=True)
class Division:
    """How the transposed lists are divided.

    Args:
        kinds: Kinds of output positions, each with taps of its own (strided convolutions have several).
        kind_of_tap: The kind that a tap belongs to.
        sections: Sections of rows.
    """

    kinds: int = 1
    kind_of_tap: tuple[int, ...] = (0,)
    sections: int = 1


class KeptIndex:
    """Positions of kept weights, row by row; columns count kernel positions, then inputs, as `blocks.layout` does.

    Args:
        mask: True where kept, shape (out, in, *kernel), in any memory layout, with exactly N in each block of M.
        pattern: N:M.
        groups: Groups of the convolution: rows of a group see its inputs only.
        division: Of the transposed lists.
        library: The kernels, which update the lists quickly when the mask changes. Without them torch makes all lists anew.

    Raises:
        ValueError: If a block does not keep exactly N weights.
    """

    def __init__(
        self,
        mask: Bool[Tensor, "out inp *kernel"],
        pattern: NMPattern,
        *,
        groups: int = 1,
        division: Division | None = None,
        library: ctypes.CDLL | None = None,
    ) -> None:
        rows, inner = mask.shape[:2]
        taps = mask[0, 0].numel()
        if inner % pattern.m:
            raise ValueError(
                f"`mask` has blocks of {pattern.m} along its {inner} inputs, which {pattern.m} does not divide."
            )
        self.pattern, self.groups = pattern, groups
        self.rows, self.taps, self.inner = rows, taps, inner
        self.division = division or Division(kind_of_tap=(0,) * taps)
        self.library = library
        self.columns: Int32[Tensor, "rows entries"] = torch.empty(
            rows, taps * inner // pattern.m * pattern.n, dtype=torch.int32
        )
        self.version = 0
        """Counts changes of the mask, for users of the positions who keep what they derive from them."""
        self._lists: Lists | None = None
        kind = torch.tensor(self.division.kind_of_tap)
        self._tap_key = kind * self.division.sections * inner * groups
        self._row_key = torch.arange(rows) * self.division.sections // rows * inner * groups
        self._read(mask)

    @property
    def row_length(self) -> int:
        """Columns of a row, kept or not."""
        return self.taps * self.inner

    @property
    def lists(self) -> Lists:
        """The transposed lists, made when first asked for."""
        if self._lists is None:
            assert self.library is not None, "made by the kernels, for the kernels"
            keys = self.division.kinds * self.division.sections * self.inner * self.groups
            places = self.columns.numel() + int(_FREE * self.columns.numel()) + _FREE_OF_LIST * keys
            where, slot = torch.zeros(2, places, dtype=torch.int32)
            begin, end = torch.empty(keys + 1, dtype=torch.int32), torch.empty(keys, dtype=torch.int32)
            self._lists = Lists(begin, end, where, slot)
            self.library.nm_lists(ctypes.byref(self._blocks(None)))
        return self._lists

    def update(self, mask: Bool[Tensor, "out inp *kernel"], rows: Int[Tensor, " chosen"] | None = None) -> int:
        """Follow a mask that has changed.

        Args:
            mask: The mask, N in each block.
            rows: The rows in which it may have changed; all of them by default.

        Returns:
            The number of blocks that changed; without the kernels, of rows.

        Raises:
            ValueError: If a block does not keep exactly N weights.
        """
        if self.library is None:
            before = self.columns.clone()
            self._read(mask)
            changed = int((before != self.columns).any(1).sum())
        else:
            strides = strides_of(mask)
            chosen = None if rows is None else rows.to(torch.int64).contiguous()
            blocks = self._blocks(mask, strides)
            count = self.rows if chosen is None else len(chosen)
            at = None if chosen is None else ctypes.c_void_p(chosen.data_ptr())
            changed = self.library.nm_update(ctypes.byref(blocks), at, ctypes.c_int64(count))
            if changed == -1:
                self._lists = None
            if changed < -1:
                self._complain(-2 - changed)
        self.version += changed != 0
        return abs(changed)

    def _read(self, mask: Tensor) -> None:
        """Read all rows anew."""
        if self.library is not None:
            strides = strides_of(mask)
            wrong = self.library.nm_columns(ctypes.byref(self._blocks(mask, strides)))
            if wrong >= 0:
                self._complain(wrong)
            return
        blocks = mask.movedim(1, -1).reshape(-1, self.pattern.m)
        wrong_blocks = blocks.sum(1) != self.pattern.n
        if wrong_blocks.any():
            self._complain(int(wrong_blocks.nonzero()[0, 0]) * self.pattern.m // self.row_length)
        columns = blocks.reshape(self.rows, -1).nonzero()[:, 1]
        self.columns.copy_(columns.view(self.columns.shape))

    def _complain(self, row: int) -> None:
        raise ValueError(
            f"`mask` must keep exactly {self.pattern.n} of every {self.pattern.m} weights; in output row {row} it does not. "
            "Such a layer can only be computed densely."
        )

    def _blocks(self, mask: Tensor | None, strides: Strides | None = None) -> Blocks:
        if mask is not None and (mask.shape[:2].numel() * self.taps != self.rows * self.row_length):
            raise ValueError(f"`mask` must have {self.rows} rows of {self.row_length}; got shape {tuple(mask.shape)}.")
        lists = self._lists or Lists(*[torch.empty(0, dtype=torch.int32)] * 4)
        return Blocks(
            threads=torch.get_num_threads(),
            rows=self.rows,
            taps=self.taps,
            inner=self.inner,
            n=self.pattern.n,
            m=self.pattern.m,
            mask=mask,
            mask_row=strides.row if strides else 0,
            mask_offset=strides.column if strides else None,
            columns=self.columns,
            tap_key=self._tap_key,
            row_key=self._row_key,
            rows_of_group=self.rows // self.groups,
            keys=len(lists.end),
            begin=lists.begin,
            end=lists.end,
            where=lists.where,
            slot=lists.slot,
            places=len(lists.slot),
        )


def strides_of(values: Shaped[Tensor, "out inp *kernel"]) -> Strides:
    """Where elements lie, in rows of kernel positions and inputs.

    Example:
        >>> strides_of(torch.zeros(3, 4))
        Strides(row=4, column=None, together=True)
        >>> strides_of(torch.zeros(4, 3).t())
        Strides(row=1, column=tensor([0, 3, 6, 9]), together=False)
    """
    inputs_last = values.movedim(1, -1)
    offsets = torch.zeros(1, dtype=torch.int64)
    for size, stride in zip(inputs_last.shape[1:], inputs_last.stride()[1:], strict=True):
        offsets = (offsets[:, None] + torch.arange(size) * stride).flatten()
    length = len(offsets)
    together = values.stride(0) == length and int(offsets.max()) == length - 1
    same = together and bool((offsets == torch.arange(length)).all())
    return Strides(values.stride(0), None if same else offsets, together)
