"""A report as one HTML page that needs no other file and no network."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from string import Template
from typing import Any

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
    parts = {
        "title": html.escape(report.title),
        "style": assets.joinpath("page.css").read_text(),
        "body": "\n".join(_body(report)),
        "id": DATA,
        "data": text,
        "plotly": _plotly(),
        "script": assets.joinpath("page.js").read_text(),
    }
    return Template(assets.joinpath("page.html").read_text()).substitute(parts)


def _plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise ReportError(
            "reports are drawn by plotly, which is not installed. Install it with: pip install 'bame-lightning[report]'"
        ) from None
    return str(get_plotlyjs())


def _body(report: Report) -> list[str]:
    lines = [f"<h1>{html.escape(report.title)}</h1>"]
    if report.headline:
        lines.append(f'<p class="headline">{" ".join(map(html.escape, report.headline))}</p>')
    if report.facts:
        facts = "".join(f"<div><dt>{html.escape(n)}</dt><dd>{html.escape(v)}</dd></div>" for n, v in report.facts)
        lines.append(f'<dl class="facts">{facts}</dl>')
    if report.notes:
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in report.notes)
        lines.append(f'<ul class="notes">{notes}</ul>')
    for section in report.sections:
        lines.append(f"<section><h2>{html.escape(section.title)}</h2>")
        lines.append('<div class="plots">')
        lines += [_figure(figure) for figure in section.figures]
        lines.append("</div>")
        lines += [_table(table) for table in section.tables]
        lines.append("</section>")
        if section.maps:
            lines.append(files("bame_lightning.show.report").joinpath("maps.html").read_text())
    if report.explanation:
        lines.append(f"<p>{html.escape(report.explanation)}</p>")
    if report.made:
        rows = "".join(f"<div><dt>{html.escape(name)}</dt><dd>{_made(value)}</dd></div>" for name, value in report.made)
        lines.append(f'<section><h2>How this was made</h2><dl class="made">{rows}</dl></section>')
    return lines


def _made(value: str) -> str:
    text = html.escape(value)
    if "\n" not in value:
        return f"<code>{text}</code>"
    return f"<details><summary>{value.count(chr(10)) + 1} values</summary><pre>{text}</pre></details>"


def _figure(figure: Figure) -> str:
    wide = " wide" if figure.wide else ""
    title, note = html.escape(figure.title), html.escape(figure.note)
    return (
        f'<figure class="plot{wide}"><h3>{title}</h3><div class="drawing" id="{figure.name}" role="img" '
        f'aria-label="{title}"></div><figcaption>{note}</figcaption></figure>'
    )


def _table(table: Table) -> str:
    def row(tag: str, cells: Sequence[str]) -> str:
        classes = [' class="number"' if number else "" for number in table.numbers]
        inside = "".join(f"<{tag}{how}>{html.escape(cell)}</{tag}>" for cell, how in zip(cells, classes, strict=True))
        return f"<tr>{inside}</tr>"

    head, body = row("th", table.names), "".join(row("td", cells) for cells in table.rows)
    # The stylesheet shades an edge beyond which the table goes on; the script says so below.
    hint = '<p class="more" hidden>The table goes on to the right →</p>'
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>{hint}'
