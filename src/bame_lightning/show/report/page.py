"""A report as one HTML page that needs no other file and no network."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from importlib.resources import files
from typing import Any

from jinja2 import Environment

from bame_lightning.show.find_runs import strict_json
from bame_lightning.show.report.figures import Figure
from bame_lightning.show.report.logs import ReportError

DATA = "report-data"
"""`id` of the page's element that holds all its numbers as JSON."""


@dataclass(frozen=True)
class Table:
    """A table.

    Args:
        names: Titles of columns.
        rows: Cells.
        numbers: Whether a column holds numbers.
    """

    names: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numbers: tuple[bool, ...]


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Args:
        title: For people.
        figures: Its plots.
        tables: Its tables.
        maps: Whether the maps of masks follow.
    """

    title: str
    figures: tuple[Figure, ...]
    tables: tuple[Table, ...] = ()
    maps: bool = False


@dataclass(frozen=True)
class Report:
    """What a page shows.

    Args:
        title: For people.
        headline: The result, in sentences.
        facts: Names and values that follow.
        notes: What a reader must know.
        sections: From top to bottom.
        maps: Maps of masks over time, in plain types.
        explanation: How to read the tables.
        made: How it can be made again, as names and values; a value of several lines is folded.
    """

    title: str
    headline: tuple[str, ...]
    facts: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    sections: tuple[Section, ...]
    maps: dict[str, Any] | None = None
    explanation: str = ""
    made: tuple[tuple[str, str], ...] = ()


def page(report: Report) -> str:
    """Write a report as HTML.

    Args:
        report: What to show.

    Returns:
        The page, with the library that draws it inside.

    Raises:
        ReportError: If plotly is not installed.
    """
    figures = [asdict(figure) for section in report.sections for figure in section.figures]
    data = strict_json({"title": report.title, "figures": figures, "maps": report.maps})
    # Within a script element only "</script" and "<!--" mean anything to the browser.
    text = json.dumps(data, allow_nan=False, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
    assets = files("bame_lightning.show.report")
    template = Environment(autoescape=True, trim_blocks=True).from_string(assets.joinpath("page.html").read_text())
    names = {"style": "page.css", "script": "page.js", "masks": "maps.html"}
    ours = {name: assets.joinpath(file).read_text() for name, file in names.items()}
    return template.render(report=report, id=DATA, data=text, plotly=_plotly(), **ours)


def _plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise ReportError(
            "reports are drawn by plotly, which is not installed. Install it with: pip install 'bame-lightning[report]'"
        ) from None
    return str(get_plotlyjs())
