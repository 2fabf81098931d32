"""Write measured results into documents, between the markers that say what belongs there."""

from __future__ import annotations

from pathlib import Path


def fill(path: Path, name: str, text: str) -> None:
    """Replace what stands between `<!-- name -->` and `<!-- /name -->`."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, _, rest = path.read_text().partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"{path.name} has no section {begin} ... {end}.")
    path.write_text(f"{before}{begin}\n{text.rstrip()}\n{end}{after}")
