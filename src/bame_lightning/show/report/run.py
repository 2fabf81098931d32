"""The report on one run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from bame_lightning.blocks.pattern import NMPattern
from bame_lightning.show.find_runs import read_summary
from bame_lightning.show.maps import CHANGES, COUNTS, FROZEN, NOTHING, mask_title
from bame_lightning.show.mask_file import Layer, LayerMaps, Snapshots, read_snapshots
from bame_lightning.show.numbers import amount
from bame_lightning.show.report.figures import cost, freezing, masks, quality, short
from bame_lightning.show.report.logs import read_log
from bame_lightning.show.report.oscillation import oscillation
from bame_lightning.show.report.page import Report, Section
from bame_lightning.show.report.story import headline, made


def run_report(folder: Path) -> Report:
    """Collect the contents of a run's folder.

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
    dense = bool(summary) and summary.get("pattern") is None
    if (snapshots is None or not snapshots.steps) and not dense:
        notes.append(
            "No maps of masks: the run recorded no snapshots (they come with callbacks=default, for sparse methods)."
        )
    taken = snapshots if snapshots is not None and snapshots.steps else None
    sections = [
        Section("Quality", tuple(quality(log))),
        Section("Masks", (*masks(log), *oscillation(log, taken), *freezing(log)), maps=taken is not None),
        Section("Cost", tuple(cost(log))),
    ]
    return Report(
        title=f"{title} on {about}" if about else title,
        headline=tuple(headline(summary)),
        facts=tuple(_facts(summary)),
        notes=tuple(notes),
        sections=tuple(section for section in sections if section.figures or section.maps),
        maps=None if taken is None else _maps(taken),
        made=tuple(made(summary, folder)),
    )


def _facts(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    sparse = summary.get("sparse") or {}
    if "adaptations" in sparse:
        yield "adaptations of the masks", f"{sparse['adaptations']:,}"
    if "flips" in sparse:
        yield "mask positions changed", f"{sparse['flips']:,}"
    if "survival" in sparse:
        yield "first mask still kept", f"{sparse['survival']:.1%}"
    if "frozen_fraction" in sparse:
        yield "frozen blocks", f"{sparse['frozen_fraction']:.1%}" if sparse["frozen_fraction"] else "none"
    if "epochs" in summary:
        yield "length", f"{amount(summary['epochs'], 'epoch')}, {amount(summary['steps'], 'step')}"
        yield "wall time", f"{summary['wall_seconds']:,.0f} s"


def _maps(snapshots: Snapshots) -> dict[str, Any]:
    """Put snapshots into plain types.

    Masks become hexadecimal digits of four positions each, in row-major order. Values of blocks become lists of rows.
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
        "colours": {"nothing": NOTHING, "counts": list(COUNTS), "frozen": FROZEN},
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
        if all(value is not None for value in values):
            found[key] = [value.int().tolist() for value in values]
    if "frozen" in found and not any(maps_.frozen.any() for maps_ in maps if maps_.frozen is not None):
        del found["frozen"]  # nothing to see
    tallies = [one.tally for one in maps if one.tally is not None]
    if tallies:
        found["told"] = [_told(tally) for tally in tallies]
    return found


def _told(tally: Tensor) -> str:
    """Say how many blocks of a whole layer have oscillated, if a tally tells."""
    restless, blocks = int(tally[1:].sum()), int(tally.sum())
    return f"Of all {blocks:,} blocks of the layer {restless:,} have oscillated."
