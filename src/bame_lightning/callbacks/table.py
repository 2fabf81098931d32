"""The table of layers that the user sees at the start of fit."""

from __future__ import annotations

from collections.abc import Sequence
from io import StringIO

from rich.console import Console

from bame_lightning.methods.execution import Computed
from bame_lightning.show.narrow import Table
from bame_lightning.weights.layers import LayerPlan


def layer_table(plans: Sequence[LayerPlan]) -> str:
    """Render one row per weight matrix: its pattern and blocks, or why it stays dense.

    Args:
        plans: For each weight, whether it is sparse, and why.

    Returns:
        The table as text as wide as the terminal, 80 columns where there is none, with a line of totals below.
    """
    table = Table("Layer", "Type", "Shape", "Blocks", "Pattern")
    for plan in plans:
        shape = " x ".join(map(str, plan.weight.shape))
        blocks = f"{plan.blocks:,}" if plan.pattern else ""
        name = plan.name.removesuffix(".weight")
        table.add_row(
            name, plan.kind, shape, blocks, str(plan.pattern or f"dense: {plan.reason.removeprefix('dense ')}")
        )
    return f"{_text(table)}{_totals(plans)}"


def products_table(layers: Sequence[Computed]) -> str:
    """Render a table of what computes the products of the sparse layers, and why; layers computed alike share a row.

    Args:
        layers: The modules that hold sparse weights.

    Returns:
        The table as text as wide as the terminal, 80 columns where there is none.
    """
    alike: dict[str, list[str]] = {}
    for layer in layers:
        words = "to be chosen" if layer.choice is None else layer.choice.words
        alike.setdefault(words, []).append(layer.name or layer.sparse.label)
    table = Table("Products", "Layers")
    for words, names in alike.items():
        table.add_row(words, ", ".join(names))
    return _text(table)


def _text(table: Table) -> str:
    with StringIO() as text:
        Console(file=text, width=min(100, Console(stderr=True).width), markup=False, highlight=False).print(table)
        return text.getvalue()


def _totals(plans: Sequence[LayerPlan]) -> str:
    # Tied weights are listed twice but exist once.
    sizes = {id(plan.weight): plan.weight.numel() for plan in plans}
    sparse = [plan for plan in plans if plan.pattern]
    kept = sum(plan.blocks * plan.pattern.n for plan in sparse if plan.pattern)
    masked = sum(plan.weight.numel() for plan in sparse)
    return f"{len(sparse)} of {len(sizes)} weight matrices are sparse: {kept:,} of their {masked:,} weights are kept."
