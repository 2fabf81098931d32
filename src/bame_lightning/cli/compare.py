"""`bame-compare`: is a method worth it? Runs of a sweep side by side."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bame_lightning.compare import CompareError, Comparison, compare_runs, find_runs, to_csv, to_markdown
from bame_lightning.compare.figure import draw
from bame_lightning.compare.tables import WORDS, cells, explanation, tasks

_DESCRIPTION = """\
Compare the finished runs of a sweep: test accuracy (of language models: bits
per byte) over seeds, training loss, training FLOPs, and the difference to a
baseline. Reads every summary.json below SWEEP_DIR, and writes compare.csv,
compare.md and compare.png there."""

_EPILOG = """\
how runs are grouped:
  Runs of the same data, model, recipe, pattern and method that differ in
  nothing but the seed make a row. Where a sweep varies something else, a
  learning rate for instance, each of its values has a row of its own.

  Differences are paired: a run minus the baseline's run of the same seed, on
  the same data, model, recipe and pattern (a dense baseline goes with every
  pattern). The 95 % confidence interval is Student's t over these pairs; one
  pair has none. Seeds without a partner are named, and so are runs that failed
  or did not finish.

exit status:
  0  at least one finished run was found
  1  there is none, or no run is one of the baseline
  2  the command line cannot be parsed"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `bame-compare`.

    Args:
        argv: Arguments, by default those of the command line.

    Returns:
        Exit status: 0 if there was something to compare, else 1.
    """
    parser = argparse.ArgumentParser(
        prog="bame-compare",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("sweep_dir", metavar="SWEEP_DIR", type=Path, help="a folder with runs at any depth")
    parser.add_argument(
        "--baseline", metavar="METHOD", help="the method that the others are compared with, e.g. sr_ste"
    )
    args = parser.parse_args(argv)
    try:
        runs, missing = find_runs(args.sweep_dir)
        found = compare_runs(runs, args.baseline)
        comparison = Comparison(found.rows, found.baseline, (*found.notes, *missing))
        (args.sweep_dir / "compare.csv").write_text(to_csv(comparison))
        (args.sweep_dir / "compare.md").write_text(to_markdown(comparison))
        draw(comparison, args.sweep_dir / "compare.png")
    except (CompareError, OSError) as error:
        print(f"bame-compare: error: {error}", file=sys.stderr)
        return 1
    _print(comparison, Console(markup=False, highlight=False))
    print(f"Written to {args.sweep_dir}: compare.csv, compare.md, compare.png")
    return 0


def _print(comparison: Comparison, console: Console) -> None:
    for task, rows in tasks(comparison):
        names, table = cells(rows, comparison.baseline)
        # The files hold every column; a terminal those that fit, and no cell cut, least of all the name of a method.
        left_out = {"FLOPs", "vs dense"} if console.width < 100 else set()
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


if __name__ == "__main__":
    sys.exit(main())
