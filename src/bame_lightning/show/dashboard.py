"""A workspace at W&B for runs of this package: sections and their panels."""

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
        layers: Layers whose maps are shown; W&B cannot choose pictures by a pattern of names, as it does scalars.

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
        _lines("Do blocks go on oscillating? Share in the latest adaptation", "bame/oscillation_rate"),
        _lines(
            "How many oscillations in all, and of how many blocks?",
            "bame/oscillations_total",
            "bame/oscillating_blocks",
        ),
        wr.MediaBrowser(title="What do the most restless blocks do?", media_keys=["bame/restless_blocks"]),
        _by_layer("Which layers oscillate? Oscillations per adaptation so far", "oscillation_frequency"),
        _lines("How restless are the most restless blocks? Percentiles", *(f"{frequency}_p{p}" for p in (50, 90, 99))),
        _lines("When do masks change? Positions changed, log scale", "bame/flip_rate", log_y=True),
        _by_layer("Which layers change? Positions changed, log scale", "flip_rate", log_y=True),
        _lines("How many blocks are frozen?", "bame/frozen_fraction", range_y=(0.0, None)),
        _by_layer("Which layers freeze?", "frozen_fraction", range_y=(0.0, None)),
    ]


def _masks(layers: Sequence[str]) -> list[Any]:
    maps = [
        wr.MediaBrowser(title=f"{layer}", media_keys=[f"bame/maps/{layer}/{name}" for name in ("mask", "oscillations")])
        for layer in layers
    ]
    return [
        _lines("How much of the first mask is left?", "bame/survival"),
        _lines("Blocks whose gradients are read", "bame/designated_fraction"),
        _lines("Evidence / weakest weight: percentiles", *(f"bame/evidence_to_weight_p{p}" for p in (50, 90))),
        _lines("Predicted loss reduction of an adaptation", "bame/predicted_loss_reduction"),
        _lines("Non-zeros in sparse layers", "bame/density"),
        *maps,
    ]


def _flops() -> list[Any]:
    return [
        _lines("Training FLOPs so far (counted, not executed)", "flops/train_total"),
        _lines("Training FLOPs / those of dense training", "flops/train_vs_dense"),
        _lines("Training FLOPs / those of SR-STE", "flops/train_vs_sr_ste"),
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


def _lines(title: str, *metrics: str, **more: Any) -> wr.LinePlot:
    return wr.LinePlot(title=title, x=STEP, y=list(metrics), **more)


def _by_layer(title: str, metric: str, **more: Any) -> wr.LinePlot:
    return wr.LinePlot(title=title, x=STEP, metric_regex=f"bame/layer/.*/{metric}", **more)
