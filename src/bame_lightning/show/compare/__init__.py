"""Compare finished runs, by data, model, recipe, pattern and method, with a baseline of the same seeds."""

from bame_lightning.show.compare.rows import Comparison, Difference, Row, compare_runs
from bame_lightning.show.compare.runs import CompareError, Run, find_runs
from bame_lightning.show.compare.tables import to_csv, to_markdown

__all__ = [
    "CompareError",
    "Comparison",
    "Difference",
    "Row",
    "Run",
    "compare_runs",
    "find_runs",
    "to_csv",
    "to_markdown",
]
