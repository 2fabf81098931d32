"""Write measured results where people read them: the README, recipes/README.md and the header of each recipe.

    python -m benchmarks.accuracy.publish

Everything comes from `study.csv` and from the files that `bame-compare` wrote; nothing is typed in by hand.
"""

from __future__ import annotations

import re
import statistics
from pathlib import Path

from benchmarks.accuracy.study import CSV, Row, read_rows, spread, table

ROOT = Path(__file__).parents[2]


SWEEP = "bame-train -m recipe=fashion_mnist_mlp method=bame,sr_ste,static,rigl,dense seed=0,1,2 threads=1 hydra.sweep.dir=sweep"


def main() -> None:
    rows = read_rows()
    CSV.with_suffix(".md").write_text(table(rows))
    hardware = "; ".join(sorted({f"{row['hardware']}, torch {row['torch']}" for row in rows}))

    compared = (CSV.parent / "fashion_mnist_mlp" / "compare.md").read_text()
    lines = [line for line in compared.splitlines() if line.startswith("|")]
    text = [
        "Fashion-MNIST, 60,000 images, 6 epochs of 784-512-512-10 with both hidden layers 1:16; three seeds, mean ± standard",
        "deviation; differences paired by seed, with their 95 % confidence interval; FLOPs counted, not executed.",
        f"On {hardware}.",
        "",
        "![accuracy against training FLOPs](benchmarks/accuracy/fashion_mnist_mlp/compare.png)",
        "",
        *lines,
        "",
        f"```\n{SWEEP}\nbame-compare sweep --baseline sr_ste\n```",
        "",
        "More tasks, and where the evolution does not beat a static mask in every seed:",
        "[benchmarks/accuracy/study.md](benchmarks/accuracy/study.md).",
    ]
    _fill(ROOT / "README.md", "study", "\n".join(text))

    lines = ["| recipe | pattern | method | test accuracy, % | seeds | minutes |", "|---|---|---|---|---|---|"]
    for path in sorted((ROOT / "recipes").glob("*.yaml")):
        group = [row for row in rows if row["recipe"] == path.stem and row["method"] == "bame"]
        if group:
            lines.append(f"| {' | '.join([path.stem, *_cells(group)])} |")
            accuracy, seeds, minutes = _cells(group)[2:]
            measured = f"test accuracy {accuracy} %, {seeds} seeds, {minutes} minutes each on {group[0]['hardware']}"
            text = re.sub(r"^# Measured: .*$", f"# Measured: {measured}", path.read_text(), flags=re.MULTILINE)
            path.write_text(text)
        else:
            lines.append(f"| {path.stem} | | | not measured | | |")
    source = "`python -m benchmarks.accuracy.study` ([script](../benchmarks/accuracy/study.py))"
    note = f"Mean ± standard deviation over seeds, measured by {source}; minutes, while other runs shared the machine."
    _fill(ROOT / "recipes/README.md", "recipes", "\n".join([*lines, "", note, f"Hardware: {hardware}."]))


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
