"""The results of a run: a plain dictionary, a JSON file, a page of text."""

from __future__ import annotations

import json
import os
import platform
import shlex
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning import Trainer
from rich.console import Console
from rich.panel import Panel

import bame_lightning
from bame_lightning.blocks.pattern import NMPattern
from bame_lightning.callbacks import Dense
from bame_lightning.callbacks.driver import SparseCallback
from bame_lightning.checkpoints.audit import audit_checkpoint
from bame_lightning.checkpoints.replacing import replacing
from bame_lightning.ledger.flops import LABEL
from bame_lightning.show.find_runs import strict_json
from bame_lightning.show.narrow import Table
from bame_lightning.show.numbers import amount, times
from bame_lightning.show.numbers import flops as in_words

_NEVER_FLIPPED = (
    "NO MASK EVER CHANGED: this was training with a static mask, not BAME. Likely reasons: the run is too short, or its "
    "schedule leaves no room for adaptations (compare method.schedule.start, stop and every with the number of steps); "
    "evidence moves too little (method.evidence.step_size, contenders, read_every), or its margin is too large; under "
    "method=bame_one_batch the learning rate is 0 or tiny."
)
_NOTHING_PRUNED = (
    "NOTHING IS PRUNED: N = M keeps every weight of a block, so this was training of a dense network. Choose N < M, for "
    "instance pattern=2:4."
)


def summarize(
    trainer: Trainer,
    method: SparseCallback | Dense,
    *,
    metrics: Mapping[str, Any],
    seconds: float,
    config: Mapping[str, Any],
    run_dir: Path,
) -> dict[str, Any]:
    """Collect the results of a finished run.

    Args:
        trainer: The trainer that fitted and tested.
        method: The callback that made the network sparse, or counted the cost of a dense one.
        metrics: The last logged values, by key.
        seconds: Wall time of training.
        config: The configuration of the run.
        run_dir: The run folder.

    Returns:
        Plain types only; paths are relative to the run folder.
    """
    checkpoint = run_dir / "checkpoints" / "last.ckpt"
    saved = trainer.checkpoint_callback is not None and checkpoint.is_file()  # else it may be of an earlier run
    summary: dict[str, Any] = {
        **{name: config["choices"].get(name) for name in ("recipe", "data", "model", "method", "sparsity")},
        "pattern": None if isinstance(method, Dense) else str(NMPattern.parse(config["pattern"])),
        "seed": config["seed"],
        **{
            f"{stage}_{name}": float(metrics[f"{stage}/{name}"]) if f"{stage}/{name}" in metrics else None
            for stage in ("test", "val", "train")
            for name in ("accuracy", "loss", "bits_per_byte")
        },
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        "wall_seconds": round(seconds, 2),
        "checkpoint": str(checkpoint.relative_to(run_dir)) if saved else None,
    }
    sparse = method.summary()
    summary["flops"] = sparse.pop("flops")
    if isinstance(method, Dense):
        return summary
    summary |= {"sparse": sparse, "warning": None}
    if saved:
        report = audit_checkpoint(checkpoint)
        summary["compliant"] = report.compliant
        summary["layers"] = [
            {"name": row.name, "pattern": str(row.pattern), "blocks": row.blocks, "violations": row.violations}
            for row in report.layers
        ]
    patterns = [NMPattern.parse(pattern) for pattern in sparse["layers"].values()]
    if all(pattern.n == pattern.m for pattern in patterns):
        summary["warning"] = _NOTHING_PRUNED
    elif sparse.get("flips") == 0:
        summary["warning"] = _NEVER_FLIPPED
    return summary


def provenance(command: str, words: Sequence[str]) -> dict[str, Any]:
    """Note how a run was made, for those who want to make it again.

    Args:
        command: Name of the command.
        words: Its arguments.

    Returns:
        The command, the date of the end in UTC, and the versions of libraries.
    """
    return {
        "command": shlex.join([command, *words]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {
            "bame_lightning": bame_lightning.__version__,
            "torch": torch.__version__,
            "lightning": lightning.__version__,
            "python": platform.python_version(),
        },
    }


def write_summary(summary: Mapping[str, Any], path: Path) -> None:
    """Write the summary as strict JSON (a number that is not finite becomes null); readers see all of it or nothing.

    Args:
        summary: What `summarize` returned.
        path: The file to write.
    """
    with replacing(path) as part:
        part.write_text(json.dumps(strict_json(summary), indent=2, allow_nan=False) + "\n")


def print_summary(summary: Mapping[str, Any], run_dir: Path) -> None:
    """Print the summary for people, at most 80 columns wide.

    Args:
        summary: What `summarize` returned.
        run_dir: The run folder.
    """
    console = Console(highlight=False)
    console.width = min(console.width, 80)
    facts = Table.grid(padding=(0, 2))
    for name, value in _facts(summary):
        facts.add_row(name, value)
    facts.add_row("run folder", os.path.relpath(run_dir) if run_dir.is_relative_to(Path.cwd()) else str(run_dir))
    if summary["checkpoint"]:
        facts.add_row("checkpoint", summary["checkpoint"])
    title = " ".join(filter(None, (summary["method"], summary["pattern"])))
    console.print(Panel(facts, title=title, title_align="left"))
    if summary.get("layers"):
        console.print(_layer_table(summary["layers"]))
    if summary.get("warning"):
        console.print(Panel(summary["warning"], title="WARNING", title_align="left", style="bold red"))


def _facts(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "task", f"{summary['data']}, {summary['model']}, seed {summary['seed']}"
    for stage in ("test", "val"):
        if summary[f"{stage}_bits_per_byte"] is not None:
            yield f"{stage} bits per byte", f"{summary[f'{stage}_bits_per_byte']:.4f}"
        if summary[f"{stage}_accuracy"] is not None:
            yield f"{stage} accuracy", f"{summary[f'{stage}_accuracy']:.2%}"
    if "compliant" in summary:
        bad = sum(layer["violations"] for layer in summary["layers"])
        blocks = sum(layer["blocks"] for layer in summary["layers"])
        yield "compliance", f"all {blocks:,} blocks obey" if summary["compliant"] else f"{bad:,} of {blocks:,} VIOLATE"
    sparse = summary.get("sparse", {})
    if "flips" in sparse:
        adaptations = f" in {amount(sparse['adaptations'], 'adaptation')}" if "adaptations" in sparse else ""
        yield "masks", amount(sparse["flips"], "flip") + adaptations
    if "oscillations" in sparse:
        some, late = sparse["oscillating_blocks"], sparse["oscillating_blocks_in_last_tenth"]
        told = f"{amount(some, 'block')}, {times(sparse['oscillations'])} in all; {late:,} in the last tenth"
        yield "oscillation", told if some else "none"
    if sparse.get("frozen_fraction"):
        yield "frozen blocks", f"{sparse['frozen_fraction']:.1%}"
    if flops := summary.get("flops"):
        ratios = f"{flops['flops/train_vs_dense']:.3f} of dense, {flops['flops/train_vs_sr_ste']:.3f} of SR-STE"
        yield "training cost", f"{in_words(flops['flops/train_total'])}, {ratios} ({LABEL})"
    length = f"{amount(summary['epochs'], 'epoch')}, {amount(summary['steps'], 'step')}"
    yield "length", f"{length}, {summary['wall_seconds']:.1f} s"


def _layer_table(layers: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("layer", "pattern")
    for title in ("blocks", "violations"):
        table.add_column(title, justify="right", no_wrap=True)
    for layer in layers:
        table.add_row(layer["name"], layer["pattern"], f"{layer['blocks']:,}", f"{layer['violations']:,}")
    return table
