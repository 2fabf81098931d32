"""`bame-compare`: compare the runs of a sweep side by side."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from bame_lightning.cli.command import WRITES, answers, command_parser, loading

_DESCRIPTION = """\
Compare the finished runs of a sweep: test accuracy (of language models: bits
per byte) over seeds, training loss, training FLOPs, and the difference to a
baseline. Reads every summary.json below SWEEP_DIR, and writes compare.csv,
compare.md and compare.png there."""

_EPILOG = """\
how runs are grouped:
  Runs of the same data, model, recipe, pattern and method that differ only in
  the seed make a row. If a sweep varies something else, such as a learning
  rate, each of its values has a row of its own.

  Differences are paired: a run minus the baseline's run of the same seed, on
  the same data, model, recipe and pattern (a dense baseline goes with every
  pattern). The 95 % confidence interval is Student's t over these pairs; one
  pair has none. Seeds without a partner are named, and so are runs that failed
  or did not finish.

exit status:
  0  at least one finished run was found
  1  there is none, or no run has the baseline's method
  2  the command line cannot be parsed"""


@answers("bame-compare", WRITES)
def main(argv: Sequence[str] | None = None) -> int:
    """Run `bame-compare`.

    Args:
        argv: Arguments, by default those of the command line.

    Returns:
        Exit status: 0 if there was something to compare, else 1.
    """
    parser = command_parser("bame-compare", _DESCRIPTION, _EPILOG)
    parser.add_argument("sweep_dir", metavar="SWEEP_DIR", type=Path, help="a folder with runs at any depth")
    parser.add_argument(
        "--baseline", metavar="METHOD", help="the method that the others are compared with, e.g. sr_ste"
    )
    args = parser.parse_args(argv)
    if not args.sweep_dir.is_dir():
        raise ValueError(f"`SWEEP_DIR` must be a folder with runs; there is no folder {args.sweep_dir}.")
    loading("bame-compare", "SciPy and Matplotlib")
    from bame_lightning.cli.side_by_side import show
    from bame_lightning.show.compare.figure import draw
    from bame_lightning.show.compare.rows import compare_runs
    from bame_lightning.show.compare.runs import find_runs
    from bame_lightning.show.compare.tables import to_csv, to_markdown

    runs, missing = find_runs(args.sweep_dir)
    comparison = compare_runs(runs, args.baseline, missing)
    (args.sweep_dir / "compare.csv").write_text(to_csv(comparison))
    (args.sweep_dir / "compare.md").write_text(to_markdown(comparison))
    draw(comparison, args.sweep_dir / "compare.png")
    show(comparison)
    print(f"Written to {args.sweep_dir}: compare.csv, compare.md, compare.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
