"""A workspace at W&B for runs of this package: which panels, in which sections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws

STEP = "trainer/global_step"
NAME = "BAME: how masks evolve"
PATTERN, METHOD = wr.Config("nm_sparsity.pattern"), wr.Config("nm_sparsity.method")


def workspace(entity: str, project: str, layers: Sequence[str] = ()) -> ws.Workspace:
    """Lay out the workspace; nothing is sent.

    Args:
        entity: User or team at W&B.
        project: Project whose runs are shown.
        layers: Layers whose maps are shown; pictures, unlike scalars, cannot be chosen by a pattern of names.

    Returns:
        A workspace of five sections: Oscillation, Masks, FLOPs, Quality, Sweep.
    """
    sections = [
        ws.Section(name=name, panels=panels, is_open=True)
        for name, panels in (
            ("Oscillation", _oscillation()),
            ("Masks", _masks(layers)),
            ("FLOPs", _flops()),
            ("Quality", _quality()),
            ("Sweep", _sweep()),
        )
    ]
    settings = ws.WorkspaceSettings(x_axis=STEP)
    return ws.Workspace(entity=entity, project=project, name=NAME, sections=sections, settings=settings)


def _oscillation() -> list[Any]:
    frequency = "bame/oscillation_frequency"
    return [
        _lines("Oscillation frequency of blocks: mean", frequency),
        _lines("Oscillation frequency: percentiles", *(f"{frequency}_p{p}" for p in (50, 90, 99))),
        _by_layer("Oscillation frequency by layer", "oscillation_frequency"),
        _lines("Mask positions changed by the latest adaptation", "bame/flip_rate"),
        _by_layer("Positions changed by layer", "flip_rate"),
        _lines("Frozen blocks", "bame/frozen_fraction"),
        _by_layer("Frozen blocks by layer", "frozen_fraction"),
    ]


def _masks(layers: Sequence[str]) -> list[Any]:
    maps = [
        wr.MediaBrowser(title=f"{layer}", media_keys=[f"bame/maps/{layer}/{name}" for name in ("mask", "oscillations")])
        for layer in layers
    ]
    return [
        _lines("Initial mask that is still kept", "bame/survival"),
        _lines("Age of masks, in adaptations", "bame/mask_age"),
        _lines("Blocks whose gradients are read", "bame/designated_fraction"),
        _lines("Evidence / weakest weight: percentiles", *(f"bame/evidence_to_weight_p{p}" for p in (50, 90))),
        _lines("Predicted loss reduction of an adaptation", "bame/predicted_loss_reduction"),
        _lines("Non-zeros in sparse layers", "bame/density"),
        *maps,
    ]


def _flops() -> list[Any]:
    return [
        _lines("Training FLOPs so far (counted, not executed)", "flops/train_total"),
        _lines("Training FLOPs / dense training", "flops/train_vs_dense"),
        _lines("Training FLOPs / SR-STE", "flops/train_vs_sr_ste"),
        _lines("On hardware for row-wise N:M: / dense training", "flops/hardware/train_vs_dense"),
    ]


def _quality() -> list[Any]:
    return [
        _lines("Loss", "train/loss", "val/loss"),
        _lines("Accuracy", "train/accuracy", "val/accuracy"),
        wr.ScalarChart(title="Test accuracy", metric=wr.SummaryMetric("test/accuracy"), groupby_aggfunc="max"),
        wr.ScalarChart(title="Every block obeys (1: yes)", metric=wr.SummaryMetric("compliant"), groupby_aggfunc="min"),
    ]


def _sweep() -> list[Any]:
    accuracy, flops = wr.SummaryMetric("test/accuracy"), wr.SummaryMetric("flops/train_total")
    columns = [
        wr.ParallelCoordinatesPlotColumn(metric=metric, display_name=name)
        for metric, name in ((METHOD, "method"), (PATTERN, "N:M"), (flops, "training FLOPs"), (accuracy, "accuracy"))
    ]
    legend = "${run:displayName}: ${config:nm_sparsity.value.pattern}"
    return [
        wr.ScatterPlot(
            title="Accuracy against training FLOPs", x=flops, y=accuracy, log_x=True, legend_template=legend
        ),
        wr.ScatterPlot(title="Accuracy against N:M", x=PATTERN, y=accuracy, legend_template=legend),
        wr.BarPlot(title="Mean accuracy by N:M", metrics=["test/accuracy"], groupby=PATTERN, groupby_aggfunc="mean"),
        wr.ParallelCoordinatesPlot(title="Method, pattern, cost, accuracy", columns=columns),
    ]


def _lines(title: str, *metrics: str) -> wr.LinePlot:
    return wr.LinePlot(title=title, x=STEP, y=list(metrics))


def _by_layer(title: str, metric: str) -> wr.LinePlot:
    return wr.LinePlot(title=title, x=STEP, metric_regex=f"bame/layer/.*/{metric}")
