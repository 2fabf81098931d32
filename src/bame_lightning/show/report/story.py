"""The sentences before the first figure of a page and after its last one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bame_lightning.show.find_runs import flatten, read_overrides
from bame_lightning.show.numbers import flops as in_words
from bame_lightning.show.numbers import times


def headline(summary: Mapping[str, Any]) -> Iterator[str]:
    """Say the result: quality, cost, whether every block obeys, oscillation.

    Args:
        summary: Of a run; empty while it goes on.

    Yields:
        Sentences.
    """
    for stage, name in (("test", "Test"), ("val", "Validation")):
        if summary.get(f"{stage}_bits_per_byte") is not None:
            yield f"{name}: {summary[f'{stage}_bits_per_byte']:.4f} bits per byte."
            break
        if summary.get(f"{stage}_accuracy") is not None:
            yield f"{name} accuracy: {summary[f'{stage}_accuracy']:.2%}."
            break
    counted = summary.get("flops") or {}
    if counted.get("flops/train_total"):
        ratios = [
            f"{counted[f'flops/train_vs_{key}']:.1%} of {name}"
            for key, name in (("dense", "dense training"), ("sr_ste", "SR-STE"))
            if counted.get(f"flops/train_vs_{key}")
        ]
        told = f": {' and '.join(ratios)}" if ratios else ""
        yield f"Training took {in_words(counted['flops/train_total'])} (counted, not executed){told}."
    if "compliant" in summary:
        blocks = sum(layer["blocks"] for layer in summary["layers"])
        bad = sum(layer["violations"] for layer in summary["layers"])
        yield f"All {blocks:,} blocks obey." if summary["compliant"] else f"{bad:,} of {blocks:,} blocks VIOLATE it."
    yield from oscillations(summary.get("sparse") or {})


def oscillations(sparse: Mapping[str, Any]) -> Iterator[str]:
    """Say how much oscillation there was.

    Example:
        >>> told = {"oscillations": 52, "oscillating_blocks": 37, "blocks": 18432, "oscillating_blocks_in_last_tenth": 0}
        >>> list(oscillations(told))
        ['37 of 18,432 blocks oscillated, 52 times in all; 0 in the last tenth of the adaptations.']
    """
    if "oscillations" not in sparse:
        return
    some, blocks, count = (sparse[key] for key in ("oscillating_blocks", "blocks", "oscillations"))
    if not count:
        yield f"None of the {blocks:,} blocks oscillated."
        return
    late = sparse["oscillating_blocks_in_last_tenth"]
    yield (
        f"{some:,} of {blocks:,} blocks oscillated, {times(count)} in all; {late:,} in the last tenth of the adaptations."
    )


def made(summary: Mapping[str, Any], folder: Path) -> Iterator[tuple[str, str]]:
    """Say how a run can be made again.

    Args:
        summary: Of the run.
        folder: The run's folder; Hydra keeps the overrides of its command there.

    Yields:
        Names and values.
    """
    provenance = summary.get("provenance") or {}
    if words := read_overrides(folder):  # of a run that goes on
        provenance = {"command": " ".join(["bame-train", *words])} | provenance
    if command := provenance.get("command"):
        yield "command", command
    if "seed" in summary:
        yield "seed", str(summary["seed"])
    if date := provenance.get("date"):
        yield "date", str(date)
    if versions := provenance.get("versions"):
        yield "versions", ", ".join(f"{name} {version}" for name, version in versions.items())
    if config := summary.get("config"):
        yield "configuration", "\n".join(f"{key}={value}" for key, value in sorted(flatten(config).items()))
