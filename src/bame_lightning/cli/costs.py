"""The work of `bame-flops`: count one forward pass, and add up the steps of each method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich import box
from rich.console import Console
from torch import nn

from bame_lightning.blocks.pattern import NMPattern
from bame_lightning.cli.models import Build, build_model, input_of
from bame_lightning.cli.parts import fitted
from bame_lightning.ledger.cost import PRODUCTS, Cost
from bame_lightning.ledger.flops import LABEL, Ledger, MacCounter
from bame_lightning.show.narrow import Table
from bame_lightning.show.numbers import flops as in_words
from bame_lightning.weights.layers import LayerPlan, plan_layers

CONVENTION = (
    "MACs of matrix products and convolutions; forward, input gradient and weight gradient of a layer cost the same, the "
    "first layer's too. FLOPs = 2 MACs. f = sparse / dense forward. hardware: row-wise N:M kernels only, so the input "
    "gradient is dense unless its mask is N:M, too."
)
# Two samples, because batch normalisation cannot train on one.
_SAMPLES = 2


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
    cfg, _ = fitted(cfg)
    build = instantiate(cfg.model)
    shape, classes = input_of(build, cfg.get("data"))
    model, counter = _trace(build, shape, classes)
    plans = plan_layers(model, pattern, {str(glob): rule for glob, rule in (cfg.sparsity.layers or {}).items()})
    patterns = {plan.name: plan.pattern for plan in plans if plan.pattern}
    bound = _costs(cfg, Cost("static", PRODUCTS), counter, patterns, {})
    methods, reads = dict[str, Any](), dict[str, float]()
    for name in map(str, cfg.methods):
        made = instantiate(cfg.methods[name], _convert_="all")
        cost = made if isinstance(made, Cost) else made.cost
        read = {p: made.mean_read_share(p, cfg.steps) for p in {pattern, *patterns.values()}} if cost.reads else {}
        methods[name] = {"title": cost.title, "formula": cost.formula, **_costs(cfg, cost, counter, patterns, read)}
        if read:
            reads[name] = read[pattern]
    return {
        "label": LABEL,
        "convention": CONVENTION,
        "model": HydraConfig.get().runtime.choices["model"],
        "input_shape": list(shape),
        "num_classes": classes,
        "pattern": str(pattern),
        **_forward(counter, plans),
        "steps": cfg.steps,
        "batch_size": cfg.batch_size,
        "read_share": reads,
        "methods": methods,
        "static_mask_bound": {key: bound["algorithmic"][key] for key in ("vs_dense", "vs_sr_ste")},
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


def _forward(counter: MacCounter, plans: Sequence[LayerPlan]) -> dict[str, Any]:
    """Count the forward pass of one sample, whole and by layer."""
    macs = {name: found.forward / _SAMPLES for name, found in counter.weights.items()}
    densities = {plan.name: plan.pattern.density for plan in plans if plan.pattern}
    other = counter.other.forward / _SAMPLES
    dense = sum(macs.values()) + other
    sparse = sum(densities.get(name, 1.0) * own for name, own in macs.items()) + other
    return {
        "dense_forward_macs": dense,
        "f": sparse / dense,
        "sparse_weights": len(densities),
        "layers": [
            {
                "name": plan.name,
                "forward_macs": macs.get(plan.name, 0.0),
                "pattern": str(plan.pattern) if plan.pattern else None,
                "reason": plan.reason,
            }
            for plan in plans
        ],
        "products_without_weight_macs": other,
    }


def _costs(
    cfg: DictConfig,
    cost: Cost,
    counter: MacCounter,
    patterns: Mapping[str, NMPattern],
    read: Mapping[NMPattern, float],
) -> dict[str, Any]:
    """The cost of a step and of the run, in both columns, given the share that is read for each pattern."""
    densities = {name: pattern.density for name, pattern in patterns.items()}
    ledger = Ledger(counter.weights, counter.other, densities, transposed_share=cost.transposed_share)
    ledger.book({name: cost.shares(pattern.density, read.get(pattern, 0.0)) for name, pattern in patterns.items()})
    metrics, dense = ledger.metrics(), sum(macs.forward for macs in counter.weights.values()) + counter.other.forward
    return {
        column: {
            "step_in_dense_forwards": metrics[f"{prefix}train_total"] / (2 * dense),
            "vs_dense": metrics[f"{prefix}train_vs_dense"],
            "vs_sr_ste": metrics[f"{prefix}train_vs_sr_ste"],
            "run_flops": metrics[f"{prefix}train_total"] / _SAMPLES * cfg.steps * cfg.batch_size,
        }
        for column, prefix in (("algorithmic", "flops/"), ("hardware", "flops/hardware/"))
    }


def show(report: dict[str, Any]) -> None:
    """Print the result of `count` for people, at most 80 columns wide."""
    console = Console(highlight=False, markup=False)
    console.width = min(console.width, 80)
    shape = "x".join(map(str, report["input_shape"]))
    console.print(f"{report['model']}, {shape} -> {report['num_classes']} classes, {report['pattern']}")
    console.print(_forward_table(report))
    console.print(_method_table(report))
    methods, bound = report["methods"], report["static_mask_bound"]
    any_cost = next(iter(methods.values()))["algorithmic"]
    reads = ", ".join(f"{methods[name]['title']} {read:.4g}" for name, read in report["read_share"].items())
    console.print(
        f"r, the share of dense weight gradients that is read, at most (frozen blocks are not): {reads}. Dense training for "
        f"{report['steps']:,} steps of {report['batch_size']} samples takes "
        f"{in_words(any_cost['run_flops'] / any_cost['vs_dense'])}."
    )
    console.print(
        f"Bound: no N:M mask trains for less than a static one, {bound['vs_dense']:.3f} of dense, "
        f"{1 / bound['vs_sr_ste']:.2f}x less than SR-STE."
    )
    console.print(f"All numbers are {report['label']}. {report['convention']}")


def _forward_table(report: dict[str, Any]) -> Table:
    """Make a table of the dense forward pass: one row for all sparse weights, a row for each dense layer."""
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
    for method in report["methods"].values():
        costs = [method[column] for column in ("algorithmic", "hardware")]
        keys = ("step_in_dense_forwards", "vs_dense", "vs_sr_ste")
        table.add_row(method["title"], method["formula"], *(f"{cost[key]:.3f}" for cost in costs for key in keys))
    return table
