"""A `metrics.csv` that shows a run as a whole, however often it was resumed."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from typing_extensions import override

from bame_lightning.checkpoints.untrusted import load_untrusted
from bame_lightning.show.report.logs import METRICS, read_rows


class ResumedCSVLogger(CSVLogger):
    """Lightning's CSV logger, which begins a file anew, but for the rows before the step that a run is resumed from.

    Args:
        resumed_from: Checkpoint that the run is resumed from; None for a new run.
        **kwargs: Arguments of `CSVLogger`.
    """

    def __init__(self, *, resumed_from: str | None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._steps = 0 if resumed_from is None else int(load_untrusted(Path(resumed_from))["global_step"])

    @property
    @override
    @rank_zero_experiment
    def experiment(self) -> Any:
        """What writes the file, made when it is first asked for."""
        if self._experiment is not None or not self._steps:
            return super().experiment
        path = Path(self.log_dir, METRICS)
        draft = path.with_suffix(".csv.part")
        if path.exists():  # else a kill between the next lines may have left the draft alone
            _write_before(self._steps, path, draft)
        experiment = super().experiment  # removes the file
        if draft.exists():
            draft.replace(path)
            with path.open(newline="") as file:
                experiment.metrics_keys = next(csv.reader(file))
        return experiment


def _write_before(step: int, path: Path, draft: Path) -> None:
    rows = [row for at, row in read_rows(path) if at < step]  # what was logged later is trained once more
    draft.unlink(missing_ok=True)
    if not rows:
        return
    with draft.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
