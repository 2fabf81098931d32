"""`bame-report`: look at a run or a sweep, in a browser and without an account anywhere."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bame_lightning.compare import CompareError
from bame_lightning.report import ReportError, page, run_report, sweep_report
from bame_lightning.report.logs import METRICS
from bame_lightning.runs import SUMMARY

_FILE = "report.html"

_DESCRIPTION = """\
Write report.html into a folder: one page that needs no network, for any
browser. Of a run: loss and accuracy, how its masks oscillate and freeze, maps
of masks with a slider over adaptations, training FLOPs against dense training
and SR-STE. Of a sweep: accuracy against training FLOPs, mean and spread over
seeds."""

_EPILOG = """\
what it reads:
  Of a run metrics.csv (logger=csv, the default of bame-train), summary.json and
  snapshots.npz; of a sweep every summary.json below the folder. A run that is
  going on can be looked at, too.

exit status:
  0  the page was written
  1  there is nothing to show, a file cannot be read, or plotly is missing
  2  the command line cannot be parsed"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `bame-report`.

    Args:
        argv: Arguments, by default those of the command line.

    Returns:
        Exit status: 0 if the page was written, else 1.
    """
    parser = argparse.ArgumentParser(
        prog="bame-report",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="RUN_OR_SWEEP_DIR", type=Path, help="a run's folder, or one of several runs")
    parser.add_argument(
        "--baseline", metavar="METHOD", help="of a sweep: the method that tables give differences to, e.g. sr_ste"
    )
    args = parser.parse_args(argv)
    folder: Path = args.folder
    try:
        path = write(folder, args.baseline)
    except (ReportError, CompareError, ValueError, OSError) as error:
        print(f"bame-report: error: {error}", file=sys.stderr)
        return 1
    print(f"Written: {path} ({path.stat().st_size / 1e6:.1f} MB)")
    return 0


def write(folder: Path, baseline: str | None = None) -> Path:
    """Write the report on a folder into it; a reader sees either the old or the new page.

    Args:
        folder: Of a run, or of a sweep.
        baseline: Of a sweep, the method that differences refer to.

    Returns:
        The page.

    Raises:
        ReportError: If there is nothing to show.
    """
    if not folder.is_dir():
        raise ReportError(f"`RUN_OR_SWEEP_DIR` must be the folder of a run or of a sweep; {folder} is none.")
    if (folder / METRICS).is_file() or (folder / SUMMARY).is_file():
        if baseline is not None:
            raise ReportError(f"`--baseline` compares the runs of a sweep; {folder} is a single run. Leave it out.")
        report = run_report(folder)
    else:
        report = sweep_report(folder, baseline)
    path = folder / _FILE
    draft = path.with_suffix(".html.part")
    draft.write_text(page(report), encoding="utf-8")
    draft.replace(path)
    return path


if __name__ == "__main__":
    sys.exit(main())
