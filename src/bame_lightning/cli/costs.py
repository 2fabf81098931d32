"""The work of `bame-flops`: count one forward pass, and book the steps of each method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich import box
from rich.console import Console
from torch import nn

from bame_lightning.bame.evidence import OneBatch
from bame_lightning.blocks.pattern import NMPattern
from bame_lightning.cli.models import Build, build_model, input_of
from bame_lightning.cli.parts import fit_parts
from bame_lightning.cli.questions import layer_rules
from bame_lightning.ledger.flops import LABEL, Ledger, MacCounter, Shares, mean_read_share
from bame_lightning.show.narrow import Table
from bame_lightning.weights.layers import plan_layers

CONVENTION = (
    "MACs of matrix products and convolutions; forward, input gradient and weight gradient of a layer cost the same, the "
    "first layer's too. FLOPs = 2 MACs. f = sparse / dense forward. hardware: row-wise N:M kernels only, so the input "
    "gradient is dense unless its mask is N:M, too."
)
# Two samples, since batch normalisation cannot train on one.
_SAMPLES = 2


@dataclass(frozen=True)
class _Method:
    title: str
    formula: str
    shares: Callable[[float], Shares]
    transposed_share: float = 1.0


def count(cfg: DictConfig) -> dict[str, Any]:
    """Count the cost of training by each method.

    Args:
        cfg: The composed configuration.

    Returns:
        What `json=true` prints: the model's dense forward pass by layer, and for each method the cost of a step and of
        the run in both columns.

    Raises:
        ValueError: If the configuration holds a wrong value.
    """
    pattern = NMPattern.parse(cfg.pattern)
    cfg = fit_parts(cfg)
    build = instantiate(cfg.model)
    shape, classes = input_of(build, cfg.get("data"))
    model, counter = _trace(build, shape, classes)

    plans = plan_layers(model, pattern, layer_rules(cfg))
    densities = {plan.name: plan.pattern.density for plan in plans if plan.pattern}
    forward = {name: macs.forward / _SAMPLES for name, macs in counter.weights.items()}
    other = counter.other.forward / _SAMPLES
    dense = sum(forward.values()) + other
    sparse = sum(densities.get(name, 1.0) * macs for name, macs in forward.items()) + other

    reads = {
        "bame": mean_read_share(instantiate(cfg.schedule), instantiate(cfg.evidence), cfg.steps),
        "rigl": mean_read_share(instantiate(cfg.rigl_schedule), OneBatch(), cfg.steps),
    }
    samples = cfg.steps * cfg.batch_size
    methods: dict[str, Any] = {
        name: {"formula": method.formula, **_costs(method, counter, densities, dense, samples)}
        for name, method in _methods(**reads).items()
    }
    bound = methods["static"]["algorithmic"]
    return {
        "label": LABEL,
        "convention": CONVENTION,
        "model": HydraConfig.get().runtime.choices["model"],
        "input_shape": list(shape),
        "num_classes": classes,
        "pattern": str(pattern),
        "dense_forward_macs": dense,
        "f": sparse / dense,
        "sparse_weights": len(densities),
        "layers": [
            {
                "name": plan.name,
                "forward_macs": forward.get(plan.name, 0.0),
                "pattern": str(plan.pattern) if plan.pattern else None,
                "reason": plan.reason,
            }
            for plan in plans
        ],
        "products_without_weight_macs": other,
        "steps": cfg.steps,
        "batch_size": cfg.batch_size,
        "read_share": reads,
        "methods": methods,
        "static_mask_bound": {key: bound[key] for key in ("vs_dense", "vs_sr_ste")},
    }


def _trace(build: Build, shape: tuple[int, ...], classes: int) -> tuple[nn.Module, MacCounter]:
    """Run one forward pass without memory or arithmetic; layers are named as in `bame-train`."""
    with torch.device("meta"):
        network = build_model(build, shape, classes)
        model = nn.ModuleDict({"model": network})
        try:
            with MacCounter(model) as counter:
                network(torch.empty(_SAMPLES, *shape, dtype=torch.long if len(shape) == 1 else None))  # tokens
        except RuntimeError as error:
            raise ValueError(f"`model` cannot process inputs of shape {shape}: {error}") from error
    return model, counter


def _methods(bame: float, rigl: float) -> dict[str, _Method]:
    return {
        "dense": _Method("dense", "3", lambda density: Shares()),
        "sr_ste": _Method("SR-STE", "f + 2", Shares.sr_ste),
        "bi_mask": _Method("Bi-Mask", "2f + 1", Shares.bi_mask, transposed_share=0.0),
        "bame": _Method("BAME", "3f + r(1-f)", lambda density: Shares.bame(density, bame)),
        "rigl": _Method("RigL", "3f + r(1-f)", lambda density: Shares.bame(density, rigl)),
        "static": _Method("static", "3f", Shares.static),
        "static_transposable": _Method("transposable", "3f", Shares.static, transposed_share=0.0),
    }


def _costs(
    method: _Method, counter: MacCounter, densities: dict[str, float], dense_forward: float, samples: int
) -> dict[str, dict[str, float]]:
    ledger = Ledger(counter.weights, counter.other, densities, transposed_share=method.transposed_share)
    ledger.book({name: method.shares(density) for name, density in densities.items()})
    metrics = ledger.metrics()
    columns = {}
    for column, prefix in (("algorithmic", "flops/"), ("hardware", "flops/hardware/")):
        flops = metrics[f"{prefix}train_total"] / _SAMPLES
        columns[column] = {
            "step_in_dense_forwards": flops / (2 * dense_forward),
            "vs_dense": metrics[f"{prefix}train_vs_dense"],
            "vs_sr_ste": metrics[f"{prefix}train_vs_sr_ste"],
            "run_flops": flops * samples,
        }
    return columns


def show(report: dict[str, Any]) -> None:
    """Print what `count` returned for people, at most 80 columns wide."""
    console = Console(highlight=False, markup=False)
    console.width = min(console.width, 80)
    shape = "x".join(map(str, report["input_shape"]))
    console.print(f"{report['model']}, {shape} -> {report['num_classes']} classes, {report['pattern']}")
    console.print(_forward_table(report))
    console.print(_method_table(report))
    reads, bound = report["read_share"], report["static_mask_bound"]
    console.print(
        f"r, the share of dense weight gradients that is read: BAME {reads['bame']:.4g} (an upper bound: frozen blocks are "
        f"not read), RigL {reads['rigl']:.4g}. Dense training for {report['steps']:,} steps of {report['batch_size']} "
        f"samples takes {report['methods']['dense']['algorithmic']['run_flops']:.3g} FLOPs."
    )
    console.print(
        f"Bound: no N:M mask trains for less than a static one, {bound['vs_dense']:.3f} of dense, "
        f"{1 / bound['vs_sr_ste']:.2f}x less than SR-STE."
    )
    console.print(f"All numbers are {report['label']}. {report['convention']}")


def _forward_table(report: dict[str, Any]) -> Table:
    """The dense forward pass: what becomes sparse together, what stays dense one by one."""
    table = Table("forward pass of one sample", box=box.SIMPLE_HEAD)
    for title in ("GMACs", "share"):
        table.add_column(title, justify="right", no_wrap=True)

    def row(title: str, macs: float) -> None:
        table.add_row(title, f"{macs / 1e9:,.4g}", f"{macs / report['dense_forward_macs']:.3f}")

    row("dense", report["dense_forward_macs"])
    row(
        f"weights that become sparse: {report['sparse_weights']}",
        sum(layer["forward_macs"] for layer in report["layers"] if layer["pattern"]),
    )
    dense = [layer for layer in report["layers"] if not layer["pattern"] and layer["forward_macs"]]
    dense.sort(key=lambda layer: -layer["forward_macs"])
    for layer in dense[:4]:
        row(f"{layer['name'].removesuffix('.weight')}: {layer['reason']}", layer["forward_macs"])
    if dense[4:]:
        row(f"{len(dense[4:])} more that stay dense", sum(layer["forward_macs"] for layer in dense[4:]))
    if report["products_without_weight_macs"]:
        row("products without a weight (attention's scores)", report["products_without_weight_macs"])
    row("sparse (share: f)", report["f"] * report["dense_forward_macs"])
    return table


def _method_table(report: dict[str, Any]) -> Table:
    table = Table("\nmethod", "\nformula", title="One step: cost in dense forwards", box=box.SIMPLE_HEAD)
    table.padding, table.pad_edge = (0, 1, 0, 0), False
    for title in ("counted\ncost", "\n/dense", "\n/SR-STE", "hardware\ncost", "\n/dense", "\n/SR-STE"):
        table.add_column(title, justify="right", no_wrap=True)
    for name, method in _methods(**report["read_share"]).items():
        costs = [report["methods"][name][column] for column in ("algorithmic", "hardware")]
        keys = ("step_in_dense_forwards", "vs_dense", "vs_sr_ste")
        table.add_row(method.title, method.formula, *(f"{cost[key]:.3f}" for cost in costs for key in keys))
    return table
