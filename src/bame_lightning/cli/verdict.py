"""The output of `bame-audit`."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.text import Text

from bame_lightning.checkpoints.audit import AuditReport
from bame_lightning.cli.command import printable
from bame_lightning.show.narrow import Table


def show(report: AuditReport) -> None:
    """Print which weights were checked, which were not, and the verdict."""
    console = Console(markup=False, highlight=False)
    if report.layers:
        console.print(_layer_table(report))
    if report.skipped:
        console.print(_skipped_table(report))
    failing = [layer for layer in report.layers if not layer.compliant]
    for layer in failing:
        line = f"{layer.name} violates {layer.pattern}: {layer.reason}"
        console.print(printable(line), soft_wrap=True)
    if not report.layers:
        console.print("FAILED: no weight was checked; the table says why.", soft_wrap=True)
    elif failing:
        names = {layer.name for layer in report.layers}
        bad = {layer.name for layer in failing}
        console.print(f"FAILED: {len(bad)} of {len(names)} checked weights violate the pattern.", soft_wrap=True)
        if not report.from_state:
            hint = "If it is dense on purpose, as classifiers and embeddings often are, exclude it: --dense "
            console.print(printable(f"{hint}'{failing[-1].name}'"), soft_wrap=True)
    else:
        where = f" of '{printable(report.key)}'" if report.key and report.unread else ""
        console.print(f"OK: all {sum(layer.blocks for layer in report.layers):,} blocks{where} obey.", soft_wrap=True)
    broken = {layer.name: layer.not_finite for layer in report.layers if layer.not_finite}
    for name, count in broken.items():
        console.print(f"{printable(name)} holds values that are not finite: {count:,}", soft_wrap=True)
    if report.dropped:
        console.print(f"Names are those without {', '.join(report.dropped)}", soft_wrap=True)
    if report.unread:
        console.print(printable(f"Not read: {'; '.join(report.unread)}"), soft_wrap=True)


def _layer_table(report: AuditReport) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title="Checked", title_justify="left")
    table.add_column("layer", overflow="fold")
    table.add_column("pattern", no_wrap=True)
    for header in ("blocks", "density", "violating"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for layer in report.layers:
        table.add_row(
            printable(layer.name),
            str(layer.pattern),
            str(layer.blocks),
            f"{layer.density:.2%}",
            str(layer.violations),
            Text("obeys", "green") if layer.compliant else Text("VIOLATES", "bold red"),
        )
    return table


def _skipped_table(report: AuditReport) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title="Not checked", title_justify="left")
    table.add_column("layer", overflow="fold")
    table.add_column("reason", overflow="fold")
    for name, reason in report.skipped.items():
        table.add_row(printable(name), printable(reason))
    return table
