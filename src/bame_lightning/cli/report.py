"""`bame-report`: look at a run or a sweep, in a browser and without an account anywhere."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from bame_lightning.cli.command import WRITES, answers, command_parser, loading

_DESCRIPTION = """\
Write report.html into a folder: one page for any browser; it needs no network.
For a run it shows the result, loss and accuracy, when masks change, which
blocks oscillate, maps of masks with a slider over adaptations, training FLOPs
beside those of dense training and SR-STE, and how to make the run again. For a
sweep it shows accuracy against training FLOPs, mean and spread over seeds."""

_EPILOG = """\
what it reads:
  For a run: metrics.csv (logger=csv, the default of bame-train), summary.json
  and snapshots.npz. For a sweep: every summary.json below the folder. The run
  may still go on.

exit status:
  0  the page was written
  1  there is nothing to show, a file cannot be read, or plotly is missing
  2  the command line cannot be parsed"""


@answers("bame-report", WRITES)
def main(argv: Sequence[str] | None = None) -> int:
    """Run `bame-report`.

    Args:
        argv: Arguments, by default those of the command line.

    Returns:
        Exit status: 0 if the page was written, else 1.
    """
    parser = command_parser("bame-report", _DESCRIPTION, _EPILOG)
    parser.add_argument("folder", metavar="RUN_OR_SWEEP_DIR", type=Path, help="a run's folder, or one of several runs")
    parser.add_argument(
        "--baseline", metavar="METHOD", help="for a sweep: the method to which tables give differences, e.g. sr_ste"
    )
    args = parser.parse_args(argv)
    folder: Path = args.folder
    if not folder.is_dir():
        raise ValueError(f"`RUN_OR_SWEEP_DIR` must be the folder of a run or of a sweep; there is no folder {folder}.")
    loading("bame-report", "PyTorch and SciPy")
    from bame_lightning.show.report.files import write_report

    path = write_report(folder, args.baseline)
    print(f"Written: {path} ({path.stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
