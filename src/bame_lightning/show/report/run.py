"""The report on one run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bame_lightning.blocks.pattern import NMPattern
from bame_lightning.show.find_runs import read_summary
from bame_lightning.show.maps import CHANGES, block_title, mask_title, patch
from bame_lightning.show.mask_file import Layer, LayerMaps, Snapshots, read_snapshots
from bame_lightning.show.report.figures import cost, evolution, quality, short
from bame_lightning.show.report.logs import read_log
from bame_lightning.show.report.page import Report, Section

_DIGITS = 4
"""Significant digits of a mean over blocks, about what snapshots hold."""


def run_report(folder: Path) -> Report:
    """Collect what a run folder holds.

    Args:
        folder: The run's folder; the run may be going on, or have been cut off.

    Returns:
        What to show.

    Raises:
        ReportError: If the run logged no `metrics.csv`.
        ValueError: If its snapshots cannot be read.
    """
    summary = read_summary(folder) or {}
    snapshots = read_snapshots(folder)
    sparse = summary.get("sparse") or {}
    order = list(sparse.get("layers") or {}) or [layer.label for layer in (snapshots or Snapshots()).layers]
    log = read_log(folder, order)
    parts = (summary.get("method"), summary.get("pattern"))
    about = ", ".join(str(summary[key]) for key in ("data", "model") if summary.get(key))
    title = " ".join(filter(None, parts)) or folder.resolve().name
    notes = [] if summary else ["This run has no summary.json: it is going on, or was cut off."]
    if summary.get("warning"):
        notes.append(str(summary["warning"]))
    sections = [
        Section("Quality", tuple(quality(log))),
        Section("Masks", tuple(evolution(log))),
        Section("Cost", tuple(cost(log))),
    ]
    dense = bool(summary) and summary.get("pattern") is None
    if (snapshots is None or not snapshots.steps) and not dense:
        notes.append(
            "No maps of masks: the run recorded no snapshots (they come with callbacks=default, for sparse methods)."
        )
    return Report(
        title=f"{title} on {about}" if about else title,
        facts=tuple(_facts(summary)),
        notes=tuple(notes),
        sections=tuple(section for section in sections if section.figures),
        maps=_maps(snapshots) if snapshots is not None and snapshots.steps else None,
    )


def _facts(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for stage in ("test", "val"):
        if summary.get(f"{stage}_bits_per_byte") is not None:
            yield f"{stage} bits per byte", f"{summary[f'{stage}_bits_per_byte']:.4f}"
        elif summary.get(f"{stage}_accuracy") is not None:
            yield f"{stage} accuracy", f"{summary[f'{stage}_accuracy']:.2%}"
    flops = summary.get("flops") or {}
    if flops.get("flops/train_total"):
        yield "training FLOPs", f"{flops['flops/train_total']:.3g}"
        for key, name in (("dense", "dense"), ("sr_ste", "SR-STE")):
            if flops.get(f"flops/train_vs_{key}"):
                yield f"of {name}'s FLOPs", f"{flops[f'flops/train_vs_{key}']:.1%}"
    sparse = summary.get("sparse") or {}
    if "flips" in sparse:
        yield "mask positions changed", f"{sparse['flips']:,}"
    if "adaptations" in sparse:
        yield "adaptations", f"{sparse['adaptations']:,}"
    if "frozen_fraction" in sparse:
        yield "frozen blocks", f"{sparse['frozen_fraction']:.1%}"
    if "compliant" in summary:
        bad = sum(layer["violations"] for layer in summary["layers"])
        yield "compliance", "every block obeys" if summary["compliant"] else f"{bad:,} blocks VIOLATE"
    if "seed" in summary:
        yield "seed", str(summary["seed"])
        yield "length", f"{summary['epochs']} epochs, {summary['steps']:,} steps"
        yield "wall time", f"{summary['wall_seconds']:,.0f} s"


def _maps(snapshots: Snapshots) -> dict[str, Any]:
    """Put snapshots into plain types.

    Masks are hexadecimal digits, four positions each in row-major order; values of blocks are lists of rows.
    """
    layers = []
    for index, (layer, name) in enumerate(
        zip(snapshots.layers, short([one.label for one in snapshots.layers], 40), strict=True)
    ):
        layers.append({"name": name} | _layer(layer, [maps[index] for maps in snapshots.maps]))
    return {
        "steps": snapshots.steps,
        "adaptations": snapshots.adaptations,
        "changes": [{"label": label, "colour": colour} for label, colour in CHANGES],
        "layers": layers,
    }


def _layer(layer: Layer, maps: list[LayerMaps]) -> dict[str, Any]:
    shape = list(maps[0].mask.shape)
    pattern = NMPattern.parse(layer.pattern)
    found: dict[str, Any] = {
        "m": layer.m,
        "shape": shape,
        "title": mask_title(layer.label, pattern, (layer.filters, layer.positions), shape),
        "masks": [np.packbits(one.mask.numpy()).tobytes().hex() for one in maps],
    }
    for key in ("oscillations", "frozen"):
        values = [getattr(one, key) for one in maps]
        if values[0] is not None:
            size = (layer.filters, layer.positions // layer.m)
            found[f"{key}_title"] = block_title(layer.label, size, values[0].shape)
            found[f"{key}_cell"] = list(patch(size, *values[0].shape))
            found[key] = [[[_rounded(cell) for cell in row] for row in one.tolist()] for one in values]
    return found


def _rounded(value: float) -> float | int:
    rounded = float(f"{value:.{_DIGITS}g}")
    return int(rounded) if rounded.is_integer() else rounded
