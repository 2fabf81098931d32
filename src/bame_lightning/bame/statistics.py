"""Numbers about masks: metrics of a step, and the summary of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bame_lightning.bame.evolving import EvolvingBlocks
from bame_lightning.bame.oscillation import oscillated_lately, oscillation_frequency
from bame_lightning.bame.table import EvolvingLayer
from bame_lightning.blocks.statistics import percentiles, pooled_mean


def metrics_of(layers: Sequence[EvolvingLayer], adaptations: int) -> dict[str, Tensor]:
    """Tell how blocks oscillate and freeze, over all weights and layer by layer.

    Args:
        layers: The evolving state of each weight.
        adaptations: Adaptations so far.
    """
    frequencies = [oscillation_frequency(layer.oscillations, adaptations) for layer in layers]
    found = {
        "bame/oscillation_frequency": pooled_mean(frequencies),
        "bame/frozen_fraction": pooled_mean(layer.frozen for layer in layers),
        "bame/predicted_loss_reduction": _total(layers, lambda layer: layer.predicted),
        "bame/oscillation_rate": pooled_mean(oscillated_lately(each.oscillations, each.quiet, 1) for each in layers),
        "bame/oscillations_total": _total(layers, lambda layer: layer.oscillations),
        "bame/oscillating_blocks": _total(layers, lambda layer: layer.oscillations > 0),
        "bame/adaptations": torch.tensor(float(adaptations)),
    }
    refused = [layer.refused * layer.sparse.rows.parts for layer in layers if layer.refused is not None]
    if refused:
        found["bame/refused_swaps"] = torch.stack(refused).sum().float()
    for layer, frequency in zip(layers, frequencies, strict=True):
        key = f"bame/layer/{layer.sparse.label}"
        found[f"{key}/oscillation_frequency"] = frequency.mean()
        found[f"{key}/frozen_fraction"] = layer.frozen.float().mean()
    closest = [layer.closeness().amax(-1).clamp_min(0) for layer in layers]
    # Over all rows: a mean of percentiles is not a percentile.
    for name, values, percents in (
        ("oscillation_frequency", frequencies, (50, 90, 99)),
        ("evidence_to_weight", closest, (50, 90)),
    ):
        whole = [layer.sparse.rows.gather(value) for layer, value in zip(layers, values, strict=True)]
        each = percentiles(whole, percents)
        found |= {f"bame/{name}_p{p}": value for p, value in zip(percents, each, strict=True)}
    return found


def contention(groups: Sequence[EvolvingBlocks], inside: Sequence[bool]) -> dict[str, Tensor]:
    """Share of blocks that hold a contender, and share of pruned positions that are contenders.

    Args:
        groups: Weights that evolve together.
        inside: Whether each group is in the window of its optimizer; after that nothing contends.
    """
    designated = [group.designated.float() * within for group, within in zip(groups, inside, strict=True)]
    contenders = sum(sum(map(len, group.contended())) for group, within in zip(groups, inside, strict=True) if within)
    pruned = sum(group.table.pruned_positions for group in groups)
    return {
        "bame/designated_fraction": pooled_mean(designated),
        "bame/contender_fraction": torch.tensor(contenders / max(1, pruned)),
    }


def summary_of(
    layers: Sequence[EvolvingLayer], adaptations: int, mean: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
) -> dict[str, Any]:
    """Count, in plain numbers, how often blocks oscillated, and how many are frozen.

    Args:
        layers: The evolving state of each weight.
        adaptations: Adaptations so far.
        mean: Takes the mean over processes.
    """
    # Nothing here may look at the weights: Lightning has moved them to the CPU by now.
    frequencies = [oscillation_frequency(layer.oscillations, adaptations) for layer in layers]
    means = {
        "oscillation_frequency": pooled_mean(frequencies),
        "frozen_fraction": pooled_mean(layer.frozen for layer in layers),
    }
    refused = [layer.sparse.rows.total(layer.refused) for layer in layers if layer.refused is not None]
    tenth = -(-adaptations // 10)
    counts = {
        "blocks": _total(layers, lambda layer: torch.ones_like(layer.oscillations)),
        "oscillations": _total(layers, lambda layer: layer.oscillations),
        "oscillating_blocks": _total(layers, lambda layer: layer.oscillations > 0),
        "oscillating_blocks_in_last_tenth": _total(
            layers, lambda layer: oscillated_lately(layer.oscillations, layer.quiet, tenth)
        ),
    }
    return {
        **({"refused_swaps": sum(map(int, refused))} if refused else {}),
        **{name: round(float(value)) for name, value in mean(counts).items()},
        **{name: float(value) for name, value in mean(means).items()},
    }


def _total(layers: Sequence[EvolvingLayer], values: Callable[[EvolvingLayer], Tensor]) -> Tensor:
    """Sum over all rows of all layers, so that the mean over ranks is right."""
    totals = [values(layer).sum().double() * layer.sparse.rows.parts for layer in layers]
    return torch.stack(totals).sum() if totals else torch.zeros((), dtype=torch.float64)
