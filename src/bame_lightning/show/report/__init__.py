"""One self-contained HTML page on a run or a sweep."""

from bame_lightning.show.report.files import write_report
from bame_lightning.show.report.logs import Log, ReportError, read_log
from bame_lightning.show.report.page import DATA, page
from bame_lightning.show.report.run import run_report
from bame_lightning.show.report.sweep import sweep_report

__all__ = ["DATA", "Log", "ReportError", "page", "read_log", "run_report", "sweep_report", "write_report"]
