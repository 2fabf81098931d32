"""The logs of a run: columns of `metrics.csv`."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bame_lightning.show.numbers import in_order

METRICS = "metrics.csv"


class ReportError(ValueError):
    """A report cannot be made; the message says why, in one line."""


@dataclass(frozen=True)
class Series:
    """Values of a metric over time.

    Args:
        steps: Optimizer steps, counted as the logger does, from 0.
        values: The value at each step; None where it was not finite.
    """

    steps: list[int] = field(default_factory=list)
    values: list[float | None] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.steps)

    def thinned(self, at_most: int) -> Series:
        """Leave out points so that a page stays small.

        Args:
            at_most: Points to keep, at least 2.

        Returns:
            The first, the last, and evenly spaced ones between them.

        Example:
            >>> Series(list(range(10)), [0.0] * 10).thinned(4).steps
            [0, 3, 6, 9]
        """
        count = len(self.steps)
        if count <= at_most:
            return self
        kept = [index * (count - 1) // (at_most - 1) for index in range(at_most)]
        return Series([self.steps[index] for index in kept], [self.values[index] for index in kept])


@dataclass(frozen=True)
class Log:
    """Everything that a run logged.

    Args:
        series: Series by metric key.
        order: Names of layers, from the first of the network to the last, as far as known.
    """

    series: Mapping[str, Series]
    order: Sequence[str] = ()

    def __getitem__(self, key: str) -> Series:
        return self.series.get(key, Series())

    def layers(self, metric: str) -> dict[str, Series]:
        """Find a metric that is logged per layer.

        Args:
            metric: Last part of the key, such as "flip_rate".

        Returns:
            Series by name of the layer; layers whose place is not known come last, in the order of their names.
        """
        start, end = "bame/layer/", f"/{metric}"
        found = {
            key.removeprefix(start).removesuffix(end): series
            for key, series in self.series.items()
            if key.startswith(start) and key.endswith(end)
        }
        place = {label: index for index, label in enumerate(self.order)}
        return {label: found[label] for label in sorted(found, key=lambda x: (place.get(x, len(place)), in_order(x)))}


def read_log(folder: Path, order: Sequence[str] = ()) -> Log:
    """Read what the CSV logger of a run wrote.

    Args:
        folder: The run's folder.
        order: Names of layers in the order of the network, as far as known.

    Returns:
        The log.

    Raises:
        ReportError: If the folder holds no such file, or it is empty or of another kind.
    """
    path = folder / METRICS
    try:
        rows = read_rows(path)
    except FileNotFoundError:
        raise ReportError(
            f"{folder} holds no {METRICS}, which a report is made of. Train with logger=csv or logger=csv_wandb."
        ) from None
    series: dict[str, Series] = defaultdict(Series)
    for step, row in rows:
        try:
            _enter(step, row, series)
        except (ValueError, TypeError) as error:
            raise _foreign(path, error) from None
    if not series:
        raise ReportError(f"{path} holds no values, so there is nothing to show. Wait until the run has logged some.")
    return Log(dict(series), tuple(order))


def read_rows(path: Path) -> list[tuple[int, dict[str, str]]]:
    """Read the rows of a CSV logger's file as text.

    Args:
        path: The file. What follows its last line break is left out: a run that is killed may write half a row.

    Returns:
        The step and the cells of each row, by column.

    Raises:
        FileNotFoundError: If there is no such file.
        ReportError: If it is of another kind.
    """
    content = path.read_bytes()
    try:
        text = content[: content.rfind(b"\n") + 1].decode()
        return [(int(float(row["step"])), row) for row in csv.DictReader(io.StringIO(text, newline=""))]
    except (ValueError, KeyError, TypeError, OverflowError, csv.Error) as error:
        raise _foreign(path, error) from None


def _foreign(path: Path, error: Exception) -> ReportError:
    reason = f"{type(error).__name__}: {error}"[:120]  # it may quote the file
    return ReportError(f"{path} is not a file of Lightning's CSVLogger ({reason}). Move it away.")


def _enter(step: int, row: Mapping[str, str], series: dict[str, Series]) -> None:
    for key, text in row.items():
        if text and key != "step":
            value = float(text)
            series[key].steps.append(step)
            series[key].values.append(value if abs(value) < float("inf") else None)


def thinned_together(layers: Mapping[str, Series], at_most: int) -> tuple[list[int], list[list[float | None]]]:
    """Put series of all layers on one time axis.

    Args:
        layers: Series by layer.
        at_most: Points to keep.

    Returns:
        Steps, and for each layer its values at these steps, None where it has none.
    """
    steps = sorted({step for series in layers.values() for step in series.steps})
    kept = Series(steps, [None] * len(steps)).thinned(at_most).steps
    rows: Sequence[dict[int, float | None]] = [
        dict(zip(series.steps, series.values, strict=True)) for series in layers.values()
    ]
    return kept, [[row.get(step) for step in kept] for row in rows]
