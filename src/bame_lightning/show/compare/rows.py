"""Runs that differ only in the seed make a row; a row is compared with the baseline's row, seed by seed."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import sqrt

from scipy.stats import t as student_t  # type: ignore[import-untyped]

from bame_lightning.blocks.pattern import NMPattern
from bame_lightning.show.compare.runs import CompareError, Run

_NOT_A_SETTING = ("logger", "threads", "run_dir")


@dataclass(frozen=True)
class Metric:
    """The metric by which the runs of a task are judged.

    Args:
        key: Attribute of `Run`.
        title: Name for people.
        unit: Unit of shown values, as it follows the title in a sentence.
        difference_unit: Unit of shown differences.
        scale: Factor from values to shown values.
        digits: Decimal places of shown values.
    """

    key: str
    title: str
    unit: str
    difference_unit: str
    scale: int
    digits: int


ACCURACY = Metric("accuracy", "accuracy", " in percent", "percentage points", scale=100, digits=2)
BITS_PER_BYTE = Metric("bits_per_byte", "bits per byte", " (fewer are better)", "bits per byte", scale=1, digits=4)


@dataclass(frozen=True)
class Difference:
    r"""Mean difference to the baseline over paired seeds, and its 95 % confidence interval.

    For paired differences $d_1 \ldots d_n$ of mean $\bar d$ and sample standard deviation $s$, the interval is
    $\bar d \pm t_{0.975,\,n-1}\, s / \sqrt{n}$.

    Args:
        mean: Row minus baseline, in units of the metric. The row is better if it has more accuracy or fewer bits.
        half_width: Half of the interval; None for a single pair.
        seeds: The paired seeds.
    """

    mean: float
    half_width: float | None
    seeds: tuple[int, ...]

    @classmethod
    def between(cls, row: Mapping[int, float], baseline: Mapping[int, float]) -> Difference | None:
        """Pair two rows by seed.

        Args:
            row: Values by seed.
            baseline: Values by seed.

        Returns:
            The difference; None if they share no seed.

        Example:
            >>> Difference.between({0: 0.9, 1: 0.7}, {1: 0.5, 2: 0.4}).seeds
            (1,)
        """
        seeds = tuple(sorted(row.keys() & baseline.keys()))
        if not seeds:
            return None
        found = [row[seed] - baseline[seed] for seed in seeds]
        half = (
            student_t.ppf(0.975, len(found) - 1) * statistics.stdev(found) / sqrt(len(found))
            if len(found) > 1
            else None
        )
        return cls(statistics.fmean(found), half if half is None else float(half), seeds)


@dataclass(frozen=True)
class Row:
    """Runs that differ only in the seed.

    Args:
        runs: One for each seed, by ascending seed.
        settings: By dotted key, what sets this row apart, beside pattern and method.
        metric: The metric of its task.
        difference: Difference to the baseline; None for the baseline itself, and if there is nothing to pair.
    """

    runs: tuple[Run, ...]
    settings: Mapping[str, object]
    metric: Metric = ACCURACY
    difference: Difference | None = None

    @property
    def task(self) -> tuple[str, str, str | None]:
        """The task: data, model and recipe, which rows must share to be compared."""
        return self.runs[0].data, self.runs[0].model, self.runs[0].recipe

    @property
    def pattern(self) -> str | None:
        """Pattern as "N:M"; None for dense rows."""
        return self.runs[0].pattern

    @property
    def method(self) -> str:
        """Option of the group `method`."""
        return self.runs[0].method

    @property
    def label(self) -> str:
        """Method, pattern and settings for people."""
        return " ".join([self.method, self.pattern or "", self.settings_text]).strip().replace("  ", " ")

    @property
    def settings_text(self) -> str:
        """Settings as overrides."""
        return " ".join(f"{key.removeprefix('choices.')}={value}" for key, value in self.settings.items())

    @property
    def accuracy(self) -> tuple[float, float | None]:
        """Mean and sample standard deviation of the test accuracy over seeds; None for a single one."""
        return _spread([run.accuracy for run in self.runs])

    @property
    def values(self) -> dict[int, float]:
        """The metric by seed."""
        return {run.seed: getattr(run, self.metric.key) for run in self.runs}

    @property
    def value(self) -> tuple[float, float | None]:
        """Mean and sample standard deviation of the metric over seeds; None for a single one."""
        return _spread(list(self.values.values()))

    @property
    def loss(self) -> float | None:
        """Mean training loss of the last epoch over seeds; None if a run has none, because it diverged for example."""
        losses = [run.loss for run in self.runs if run.loss is not None]
        return statistics.fmean(losses) if len(losses) == len(self.runs) else None

    def flops(self, key: str) -> float | None:
        """Average a count of FLOPs over seeds.

        Args:
            key: Metric key, such as "flops/train_total".

        Returns:
            The mean; None if a run does not have it.
        """
        counts = [run.flops[key] for run in self.runs if key in run.flops]
        return statistics.fmean(counts) if len(counts) == len(self.runs) else None


@dataclass(frozen=True)
class Comparison:
    """Runs side by side, as tables and figures show them.

    Args:
        rows: By task, from dense to sparse patterns, by method.
        baseline: The method that differences refer to, if any.
        notes: What a reader must know, such as missing runs, or seeds without a partner.
    """

    rows: tuple[Row, ...]
    baseline: str | None
    notes: tuple[str, ...]


def compare_runs(runs: Sequence[Run], baseline: str | None = None, missing: Sequence[str] = ()) -> Comparison:
    """Group runs into rows and compare them with a baseline.

    Args:
        runs: Finished runs.
        baseline: A method among them; None for no differences.
        missing: A line for each run that is not among them.

    Returns:
        The rows, and notes on what could not be paired or was left out.

    Raises:
        CompareError: If no run has the baseline's method.
    """
    methods = sorted({run.method for run in runs})
    if baseline is not None and baseline not in methods:
        raise CompareError(f"`--baseline` must be a method of these runs ({', '.join(methods)}); got {baseline!r}.")
    rows, notes = list[Row](), list[str]()
    for task in _grouped(runs, lambda run: (run.data, run.model, run.recipe or "")).values():
        metric = BITS_PER_BYTE if any(run.bits_per_byte is not None for run in task) else ACCURACY
        lacking = [run.folder for run in task if getattr(run, metric.key) is None]
        if lacking:
            notes.append(f"left out: {', '.join(lacking)}: no test {metric.title}, as after a divergence")
            task = [run for run in task if run.folder not in lacking]
        keys = _settings(task)
        for cell in _grouped(task, partial(_cell, keys=keys)).values():
            settings = {key: cell[0].config[key] for key in keys if key in cell[0].config}
            by_seed = {run.seed: run for run in reversed(cell)}
            row = Row(tuple(by_seed[seed] for seed in sorted(by_seed)), settings, metric)
            repeated = [run.folder for run in cell if by_seed[run.seed] is not run]
            if repeated:
                notes.append(f"left out: {', '.join(repeated)}: {row.label} with a seed that another run already has")
            notes += _lacking(row)
            rows.append(row)
    rows.sort(key=_order)
    if baseline is not None:
        rows = [_against(row, rows, baseline, notes) for row in rows]
    return Comparison(tuple(rows), baseline, (*notes, *missing))


def _lacking(row: Row) -> Iterator[str]:
    """Tell why a column is empty, although some of the runs could fill it."""
    for name, values in (
        ("training loss", [run.loss for run in row.runs]),
        ("FLOPs", [run.flops or None for run in row.runs]),
    ):
        without = [run.folder for run, value in zip(row.runs, values, strict=True) if value is None]
        if 0 < len(without) < len(row.runs):
            yield f"no {name} of {row.label}: {', '.join(without)} has none, as after a divergence or without a step"


def _against(row: Row, rows: Sequence[Row], baseline: str, notes: list[str]) -> Row:
    if row.method == baseline:
        return row
    # A dense row never has a partner in a sparse baseline, so no note says so.
    partners = [other for other in rows if other.method == baseline and _comparable(row, other)]
    if row.pattern is None and not partners:
        return row
    if len(partners) != 1:
        found = f"{len(partners)} rows" if partners else "no row"
        notes.append(f"no difference: {baseline} has {found} to compare {row.label} with")
        return row
    here, there = row.values, partners[0].values
    for label, lonely in ((row.label, here.keys() - there), (partners[0].label, there.keys() - here)):
        if lonely:
            seeds = ", ".join(map(str, sorted(lonely)))
            other = partners[0].label if label == row.label else row.label
            notes.append(f"unpaired: seed {seeds} of {label} has no run of {other}")
    return replace(row, difference=Difference.between(here, there))


def _comparable(row: Row, other: Row) -> bool:
    """Whether rows share task, pattern and all settings except those of their methods; a dense baseline fits any pattern."""
    shared = [key for key in row.settings.keys() & other.settings.keys() if not key.startswith("method.")]
    settings = all(row.settings[key] == other.settings[key] for key in shared)
    return row.task == other.task and other.pattern in (row.pattern, None) and settings


def _settings(runs: Sequence[Run]) -> list[str]:
    """Find what sets runs of the same pattern, method and seed apart, as in a sweep over learning rates."""

    def varying(cells: Iterable[Sequence[Run]], keys: set[str]) -> list[str]:
        cells = [cell for cell in cells if len(cell) > 1]
        return sorted(
            key for key in keys if any(len({repr(run.config.get(key)) for run in cell}) > 1 for cell in cells)
        )

    keys = {
        key for run in runs for key in run.config if key.removeprefix("choices.").split(".")[0] not in _NOT_A_SETTING
    }
    choices = {key for key in keys if key.startswith("choices.")}
    cells = _grouped(runs, lambda run: (run.pattern, run.method, run.seed))
    chosen = varying(cells.values(), choices)
    # Another optimizer has another default learning rate: name only differences that the choice itself does not bring.
    finer = _grouped(runs, lambda run: (run.pattern, run.method, run.seed, _values(run, chosen)))
    return chosen + varying(finer.values(), keys - choices)


def _cell(run: Run, keys: Sequence[str]) -> tuple[object, ...]:
    return run.pattern, run.method, _values(run, keys)


def _values(run: Run, keys: Sequence[str]) -> tuple[str, ...]:
    return tuple(repr(run.config.get(key)) for key in keys)


def _grouped(runs: Sequence[Run], key: Callable[[Run], tuple[object, ...]]) -> dict[tuple[object, ...], list[Run]]:
    groups: dict[tuple[object, ...], list[Run]] = defaultdict(list)
    for run in runs:
        groups[key(run)].append(run)
    return groups


def _order(row: Row) -> tuple[object, ...]:
    pattern = None if row.pattern is None else NMPattern.parse(row.pattern)
    sparsity = (-1.0, 0) if pattern is None else (-pattern.n / pattern.m, pattern.m)
    return (*map(str, row.task), sparsity, row.method, row.settings_text)


def _spread(values: Sequence[float]) -> tuple[float, float | None]:
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None
