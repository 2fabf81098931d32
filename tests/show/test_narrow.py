"""Tables in terminals of any width: every word is there, and no line is longer."""

import itertools
import re

import pytest
from rich.console import Console
from rich.text import Text

from bame_lightning.show.narrow import Table

ROWS = (
    ("network.encoder.layers.11.attention.output.dense", "36,864", Text("VIOLATES", "bold red"), "last linear layer"),
    ("conv1", "12", Text("obeys", "green"), ""),
)


def printed(width: int, **options: object) -> str:
    table = Table("layer", **options)  # type: ignore[arg-type]
    table.add_column("blocks", justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("why\ndense")
    for row in ROWS:
        table.add_row(*row)
    console = Console(width=width, markup=False, highlight=False)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def by_columns(text: str) -> str:
    """A table read column by column, without spaces and borders; lines as they follow each other."""
    rows = [re.split("[│┃]", line) for line in text.splitlines()]
    return "".join(re.sub(r"\s", "", "".join(cells)) for cells in itertools.zip_longest(*rows, fillvalue=""))


@pytest.mark.parametrize("width", range(24, 101))
def test_nothing_is_cut_at_any_width(width: int) -> None:
    out = printed(width, title="Checked")
    assert "…" not in out
    assert max(map(len, out.splitlines())) <= width
    for words in ("36,864", "12", "VIOLATES", "obeys", "conv1", "layer", "Checked"):
        assert words in out
    text = by_columns(out)
    assert "network.encoder.layers.11.attention.output.dense" in text
    assert "lastlinearlayer" in text


def test_a_wide_terminal_has_columns_and_a_narrow_one_lines() -> None:
    head = next(line for line in printed(100).splitlines() if "layer" in line)
    assert head.split("┃")[1].strip() == "layer"
    assert [line.rstrip() for line in printed(40).splitlines()] == [
        "network.encoder.layers.11.attention.outp",
        "ut.dense",
        "  blocks: 36,864; verdict: VIOLATES; why",
        "  dense: last linear layer",
        "conv1",
        "  blocks: 12; verdict: obeys",
    ]
