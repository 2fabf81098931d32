"""A comparison as text: cells for people, CSV for programs."""

from __future__ import annotations

import csv
import io
from itertools import groupby

from bame_lightning.show.compare.rows import BITS_PER_BYTE, Comparison, Row
from bame_lightning.show.numbers import flops as in_words

_COLUMNS = (
    *("data", "model", "recipe", "pattern", "method", "settings", "seeds"),
    *("test_accuracy_mean", "test_accuracy_std", "test_bits_per_byte_mean", "test_bits_per_byte_std", "train_loss"),
    *("flops_train_total", "flops_train_vs_dense", "flops_train_vs_sr_ste"),
    *("difference_mean", "difference_low", "difference_high", "paired_seeds"),
)
WORDS = ("pattern", "method", "settings")  # columns of people's tables that hold words, not numbers


def to_csv(comparison: Comparison) -> str:
    """Write a comparison for programs: accuracies in [0, 1], and empty cells where there is no number.

    Differences are those of bits per byte if the task has them, else of accuracies.

    Args:
        comparison: What to write.

    Returns:
        The text of a CSV file.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for row in comparison.rows:
        bits = row.value if row.metric is BITS_PER_BYTE else (None, None)
        seen = row.difference
        half = None if seen is None else seen.half_width
        counts = [row.flops(f"flops/{key}") for key in ("train_total", "train_vs_dense", "train_vs_sr_ste")]
        interval = [None, None] if seen is None or half is None else [seen.mean - half, seen.mean + half]
        paired = [None, *interval, None] if seen is None else [seen.mean, *interval, " ".join(map(str, seen.seeds))]
        seeds = " ".join(str(run.seed) for run in row.runs)
        name = [*row.task, row.pattern, row.method, row.settings_text, seeds]
        writer.writerow([*name, *row.accuracy, *bits, row.loss, *counts, *paired])
    return text.getvalue()


def to_markdown(comparison: Comparison) -> str:
    """Write a comparison for people: a table for each data set, model and recipe, and notes.

    Args:
        comparison: What to write.

    Returns:
        The text of a Markdown file.
    """
    lines = ["# Comparison", "", explanation(comparison)]
    for task, rows in tasks(comparison):
        names, table = cells(rows, comparison.baseline)
        align = ("---" if name in WORDS else "---:" for name in names)
        lines += ["", f"## {task}", "", f"| {' | '.join(names)} |", f"|{'|'.join(align)}|"]
        lines += [f"| {' | '.join(_escaped(cell) for cell in row)} |" for row in table]
    if comparison.notes:
        lines += ["", "Notes:", "", *(f"- {_escaped(note)}" for note in comparison.notes)]
    return "\n".join([*lines, ""])


def explanation(comparison: Comparison) -> str:
    """Explain how to read the columns.

    Args:
        comparison: What is shown.

    Returns:
        A paragraph.
    """
    metrics = list(dict.fromkeys(row.metric for row in comparison.rows))
    shown = " or ".join(f"{metric.title}{metric.unit}" for metric in metrics)
    text = f"Test {shown}: mean ± sample standard deviation over seeds. Loss: mean training loss of the last epoch."
    if any(row.flops("flops/train_total") is not None for row in comparison.rows):
        text += " FLOPs: of the whole training, counted, not executed."
    if comparison.baseline is not None:
        units = " or ".join(metric.difference_unit for metric in metrics)
        text += (
            f" Difference: to {comparison.baseline} in {units}, paired by seed, with its 95 % confidence interval "
            "(Student t); an interval that holds 0 leaves open which one is better."
        )
    return text


def tasks(comparison: Comparison) -> list[tuple[str, list[Row]]]:
    """Split a comparison into tasks, whose rows can be compared.

    Args:
        comparison: What is shown.

    Returns:
        A title and the rows of each data set, model and recipe.
    """
    groups = groupby(comparison.rows, key=lambda row: row.task)
    return [(", ".join(part for part in task if part), list(rows)) for task, rows in groups]


def cells(rows: list[Row], baseline: str | None) -> tuple[list[str], list[list[str]]]:
    """Lay out rows of one task; empty columns are left out.

    Args:
        rows: Rows of one task.
        baseline: The method that differences refer to, if any.

    Returns:
        Titles of the columns, and cells by row.
    """
    names = [
        "pattern",
        "method",
        "settings",
        "seeds",
        rows[0].metric.title,
        "loss",
        "FLOPs",
        "FLOPs / dense",
        "FLOPs / SR-STE",
    ]
    names += [] if baseline is None else [f"difference to {baseline}"]
    table = [_cells(row, baseline) for row in rows]
    kept = [index for index, _ in enumerate(names) if any(row[index] for row in table)]
    return [names[index] for index in kept], [[row[index] for index in kept] for row in table]


def _cells(row: Row, baseline: str | None) -> list[str]:
    mean, deviation = row.value
    scale, digits = row.metric.scale, row.metric.digits
    total, dense, sr_ste = (row.flops(f"flops/{key}") for key in ("train_total", "train_vs_dense", "train_vs_sr_ste"))
    found = [
        row.pattern or "dense",
        row.method,
        row.settings_text,
        str(len(row.runs)),
        f"{scale * mean:.{digits}f}" + ("" if deviation is None else f" ± {scale * deviation:.{digits}f}"),
        "" if row.loss is None else f"{row.loss:.4f}",
        "" if total is None else in_words(total),
        "" if dense is None else f"{dense:.3f}",
        "" if sr_ste is None else f"{sr_ste:.3f}",
    ]
    return found if baseline is None else [*found, _difference(row, baseline)]


def _difference(row: Row, baseline: str) -> str:
    if row.method == baseline:
        return "baseline"
    seen = row.difference
    if seen is None:
        return ""

    def shown(value: float) -> str:
        return f"{row.metric.scale * value:+.{row.metric.digits}f}"

    if seen.half_width is None:
        return f"{shown(seen.mean)} (one pair)"
    return f"{shown(seen.mean)} [{shown(seen.mean - seen.half_width)}, {shown(seen.mean + seen.half_width)}]"


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|")
