"""Tables that lose nothing in a narrow terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich import table
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.padding import Padding
from rich.text import Text

_FOLDED = 24
"""The least width of a column whose long cells fold; a narrower table would be unreadable."""


class Table(table.Table):
    """A table of rich whose rows become lines of "title: cell" if the terminal is too narrow for its columns.

    Rich would cut cells and drop columns. The first cell of a row then heads its lines.

    Example:
        >>> small = Table("layer", "blocks", "verdict")
        >>> small.add_row("encoder.fc.weight", "36,864", "obeys")
        >>> Console(width=32).print(small)
        encoder.fc.weight
          blocks: 36,864; verdict: obeys
    """

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Any]:
        """Render as a table if it fits, else row by row."""
        if self._needed() <= options.max_width:
            for column in self.columns:
                column.overflow = "fold"  # rich's default cuts a word that is longer than its column
            yield from super().__rich_console__(console, options)
            return
        if self.title:
            yield Text.assemble(self.title if isinstance(self.title, Text) else str(self.title))
        titles = [" ".join(_plain(column.header).split()) for column in self.columns]
        for cells in zip(*(column.cells for column in self.columns), strict=True):
            head, *rest = cells
            yield Text.assemble(head if isinstance(head, Text) else _plain(head))
            told = [
                Text.assemble(f"{title}: " if title else "", cell)
                for title, cell in zip(titles[1:], rest, strict=True)
                if _plain(cell).strip()
            ]
            if told:
                yield Padding(Text("; ").join(told), (0, 0, 0, 2))

    def _needed(self) -> int:
        _, right, _, left = Padding.unpack(self.padding)
        columns = len(self.columns)
        padding = (left + right) * (columns if self.pad_edge else columns - 1)
        borders = columns - 1 + 2 * self.show_edge if self.box else 0
        return padding + borders + sum(map(_width, self.columns))


def _width(column: table.Column) -> int:
    cells = [_plain(cell) for cell in (column.header, *column.cells)]
    lines = [line for cell in cells for line in cell.splitlines()]
    if column.no_wrap or column.justify == "right":
        return max(map(cell_len, lines), default=0)
    words = [word for line in lines for word in line.split()]
    return min(_FOLDED, max(map(cell_len, words), default=0))


def _plain(cell: Any) -> str:
    return cell.plain if isinstance(cell, Text) else str(cell)
