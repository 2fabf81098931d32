"""`bame-audit`: does every block of a checkpoint obey its N:M pattern?"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bame_lightning.audit import AuditError, AuditReport, audit_checkpoint
from bame_lightning.cli.checkpoints import add_arguments, printable

_DESCRIPTION = """\
Check that every block of a checkpoint's weights obeys its N:M pattern: at most
N non-zeros in every M consecutive weights of the input dimension. Reads
Lightning checkpoints and plain state dicts (also under "state_dict" or
"model"), and never runs code from the file."""

_EPILOG = """\
which weights are checked:
  If the checkpoint holds the state of a sparsity callback, the layers it
  names, each by its own saved pattern and mask. A block then also violates if
  a weight outside the mask is not zero, or if the mask does not keep exactly
  N. With --pattern, a weight saved under another pattern is judged by
  --pattern as well, where its M divides the input dimension.

  Otherwise --pattern is required, and every floating weight named *weight with
  two or more dimensions is checked if M divides its input dimension: the
  second, or the first for what --transposed names. A dense classifier or
  embedding therefore fails until --dense names it.

exit status:
  0  at least one weight was checked, and every one obeys
  1  a block violates, no weight was checked, or the input is unusable
  2  the command line cannot be parsed"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `bame-audit`.

    Args:
        argv: Arguments, by default those of the command line.

    Returns:
        Exit status: 0 if everything obeys, else 1.
    """
    parser = argparse.ArgumentParser(
        prog="bame-audit",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    args = parser.parse_args(argv)
    try:
        report = audit_checkpoint(args.checkpoint, args.pattern, dense=args.dense, transposed=args.transposed)
    except AuditError as error:
        print(f"bame-audit: {printable(str(error))}", file=sys.stderr)
        return 1
    _print(report, Console(markup=False, highlight=False))
    return 0 if report.compliant else 1


def _print(report: AuditReport, console: Console) -> None:
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
        console.print(f"OK: all {sum(layer.blocks for layer in report.layers)} blocks obey.", soft_wrap=True)


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


if __name__ == "__main__":
    sys.exit(main())
