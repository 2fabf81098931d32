"""Write measured results where people read them: the README, recipes/README.md and the header of each recipe.

    python -m benchmarks.accuracy.publish

Everything comes from `study.csv`; nothing is typed in by hand.
"""

from __future__ import annotations

import re
import statistics
from pathlib import Path

from benchmarks.accuracy.study import CSV, Row, read_rows, spread, table

ROOT = Path(__file__).parents[2]


def main() -> None:
    rows = read_rows()
    body = table(rows).split("\n\n", 2)
    (CSV.with_suffix(".md")).write_text(table(rows))
    command = "`python -m benchmarks.accuracy.study` ([script](benchmarks/accuracy/study.py))"
    _fill(
        ROOT / "README.md", "study", f"Measured by {command}. {' '.join(body[1].splitlines()[1:])}\n\n{body[2].strip()}"
    )
    lines = ["| recipe | pattern | method | test accuracy | seeds | minutes |", "|---|---|---|---|---|---|"]
    for path in sorted((ROOT / "recipes").glob("*.yaml")):
        group = [row for row in rows if row["recipe"] == path.stem and row["method"] == "bame"]
        if group:
            lines.append(f"| {' | '.join([path.stem, *_cells(group)])} |")
            accuracy, seeds, minutes = _cells(group)[2:]
            measured = (
                f"test accuracy {accuracy} % over {seeds} seeds, {minutes} minutes each on {group[0]['hardware']}"
            )
            text = re.sub(r"^# Measured: .*$", f"# Measured: {measured}", path.read_text(), flags=re.MULTILINE)
            path.write_text(text)
    hardware = sorted({f"{row['hardware']}, torch {row['torch']}" for row in rows})
    source = f"Mean ± standard deviation over seeds, measured by {command.replace('](', '](../')}."
    _fill(ROOT / "recipes/README.md", "recipes", "\n".join([*lines, "", f"{source} Hardware: {'; '.join(hardware)}."]))


def _cells(group: list[Row]) -> list[str]:
    accuracy = spread([100 * float(row["test_accuracy"]) for row in group], 2)
    minutes = statistics.mean(float(row["wall_seconds"]) for row in group) / 60
    return [group[0]["pattern"], "bame", accuracy, str(len(group)), f"{minutes:.1f}"]


def _fill(path: Path, name: str, text: str) -> None:
    """Replace what stands between `<!-- name -->` and `<!-- /name -->`."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, _, rest = path.read_text().partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"{path.name} has no section {begin} ... {end}.")
    path.write_text(f"{before}{begin}\n{text.rstrip()}\n{end}{after}")


if __name__ == "__main__":
    main()
