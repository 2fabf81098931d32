"""A `metrics.csv` of the whole run, even if it was resumed."""

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
    """Lightning's CSV logger, which begins a new file; a resumed run keeps the rows of the steps before.

    Args:
        resumed_from: Checkpoint from which the run is resumed; None for a new run.
        **kwargs: Arguments of `CSVLogger`.
    """

    def __init__(self, *, resumed_from: str | None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._steps = 0 if resumed_from is None else int(load_untrusted(Path(resumed_from))["global_step"])

    @property
    @override
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The object that writes the file, made at its first use."""
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
    rows = [row for at, row in read_rows(path) if at < step]  # later steps are trained, and logged, once more
    draft.unlink(missing_ok=True)
    if not rows:
        return
    with draft.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
