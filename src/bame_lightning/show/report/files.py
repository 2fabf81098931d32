"""The report of a folder, written into it."""

from __future__ import annotations

from pathlib import Path

from bame_lightning.checkpoints.replacing import replacing
from bame_lightning.show.find_runs import SUMMARY
from bame_lightning.show.report.logs import METRICS, ReportError
from bame_lightning.show.report.page import page
from bame_lightning.show.report.run import run_report
from bame_lightning.show.report.sweep import sweep_report

_FILE = "report.html"


def write_report(folder: Path, baseline: str | None = None) -> Path:
    """Write the report on a folder into it; a reader sees either the old or the new page.

    Args:
        folder: Of a run, or of a sweep.
        baseline: Of a sweep, the method that differences refer to.

    Returns:
        The page.

    Raises:
        ReportError: If there is nothing to show.
    """
    if (folder / METRICS).is_file() or (folder / SUMMARY).is_file():
        if baseline is not None:
            raise ReportError(f"`--baseline` compares the runs of a sweep; {folder} is a single run. Leave it out.")
        report = run_report(folder)
    else:
        report = sweep_report(folder, baseline)
    path = folder / _FILE
    with replacing(path) as part:
        part.write_text(page(report), encoding="utf-8")
    return path
