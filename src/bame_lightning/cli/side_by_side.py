"""The output of `bame-compare`."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.text import Text

from bame_lightning.show.compare.rows import Comparison
from bame_lightning.show.compare.tables import WORDS, cells, explanation, tasks
from bame_lightning.show.narrow import Table


def show(comparison: Comparison) -> None:
    """Print the tables and the notes of a comparison, as wide as the terminal allows."""
    console = Console(markup=False, highlight=False)
    for task, rows in tasks(comparison):
        names, table = cells(rows, comparison.baseline)
        # The files hold every column. A terminal shows the columns that fit, without cutting a cell.
        left_out = {"FLOPs", "FLOPs / dense"} if console.width < 100 else set()
        kept = [index for index, name in enumerate(names) if name not in left_out]
        shown = Table(box=box.SIMPLE_HEAD, title=Text(task, "bold"), title_justify="left", padding=(0, 1, 0, 0))
        for index in kept:
            width = None if names[index] == "settings" else max(len(row[index]) for row in table)
            title = names[index].replace(" vs ", "\nvs ").replace(" to ", "\nto ")
            shown.add_column(title, justify="left" if names[index] in WORDS else "right", min_width=width)
        for row in table:
            shown.add_row(*(row[index] for index in kept))
        console.print(shown)
    console.print(explanation(comparison), style="dim")
    for note in comparison.notes:
        console.print(f"- {note}", soft_wrap=True)
