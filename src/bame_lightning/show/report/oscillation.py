"""Figures of oscillation: its rate and total, how many blocks oscillate how often, which layers, traces of single blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch

from bame_lightning.show.mask_file import MOST, Snapshots, Trace, most_restless
from bame_lightning.show.numbers import times
from bame_lightning.show.report.figures import BLUE, COLOURS, ORANGE, Figure, axis, by_layer, line, rows, short
from bame_lightning.show.report.logs import Log, Series


def oscillation(log: Log, snapshots: Snapshots | None) -> Iterator[Figure]:
    """Draw what a run shows of oscillation.

    Args:
        log: What was logged.
        snapshots: The recorded snapshots; None if there are none.

    Yields:
        Figures, those that have something to show.
    """
    adaptations = log["bame/adaptations"]
    if adaptations and (rate := per_adaptation(log["bame/oscillation_frequency"], adaptations)):
        layers = log.layers("oscillation_frequency").items()
        rates = {name: per_adaptation(series, adaptations) for name, series in layers}
        note = (
            "Blocks that oscillate in one adaptation, in percent: the mean since the previous point. A block oscillates "
            "when an adaptation brings back a weight that an earlier one pruned."
        )
        yield by_layer("oscillation_rate", "Do blocks go on oscillating?", note, rate, rates, "of all blocks")
    if total := log["bame/oscillations_total"]:
        lines = [line("oscillations", total, BLUE), line("blocks", log["bame/oscillating_blocks"], ORANGE)]
        note = "Oscillations of all blocks so far, and how many blocks have oscillated at least once."
        layout = {"yaxis": axis("so far", rangemode="tozero")}
        yield Figure("oscillation_total", "How many oscillations are there in all?", note, lines, layout)
    tallies = [maps.tally for maps in snapshots.maps[-1]] if snapshots and snapshots.maps else []
    if snapshots and tallies and all(tally is not None for tally in tallies):
        found = torch.stack([tally for tally in tallies if tally is not None])
        yield _counts(found.sum(0).tolist())
        yield _layers([layer.label for layer in snapshots.layers], found)
    if snapshots and snapshots.traces:
        yield _traces(most_restless(snapshots.traces))


def per_adaptation(frequency: Series, adaptations: Series) -> Series:
    """Undo the accumulation of a frequency.

    Args:
        frequency: Oscillations so far / blocks / adaptations so far.
        adaptations: Adaptations so far.

    Returns:
        Oscillations per block and adaptation since the previous point, wherever there was an adaptation in between.

    Example:
        >>> per_adaptation(Series([5, 9, 15], [0.5, 0.5, 0.4]), Series([5, 9, 15], [2.0, 2.0, 5.0]))
        Series(steps=[5, 15], values=[0.5, 0.333333])
    """
    counts = dict(zip(adaptations.steps, adaptations.values, strict=True))
    found, before, done = Series(), 0.0, 0.0
    for step, value in zip(frequency.steps, frequency.values, strict=True):
        count = counts.get(step)
        if value is None or count is None or count <= done:
            continue
        found.steps.append(step)
        # The logs hold single precision; a difference of such numbers has fewer digits.
        found.values.append(round(max(0.0, value * count - before) / (count - done), 6))
        before, done = value * count, count
    return found


def _counts(tally: Sequence[int]) -> Figure:
    last = max((count for count, blocks in enumerate(tally) if blocks), default=0)
    names = [f"{count}" if count < MOST else f"{MOST} or more" for count in range(last + 1)]
    shown = tally[: last + 1]
    bars = {
        "type": "bar",
        "x": names,
        "y": shown,
        "text": [f"{blocks:,}" for blocks in shown],
        "textposition": "outside",
        "cliponaxis": False,
        "hovertemplate": "%{y:,} blocks oscillated %{x} times<extra></extra>",
        "marker": {"color": BLUE},
    }
    layout = {
        "xaxis": axis("oscillations of a block", type="category"),
        "yaxis": _log_counts(max(shown)),
    }
    note = "Blocks of all layers at the end, by how often each oscillated; the axis of blocks is logarithmic."
    return Figure("oscillation_counts", "How many blocks oscillate how often?", note, [bars], layout)


def _log_counts(top: int) -> dict[str, Any]:
    """Describe a logarithmic axis that starts below 1, so that a single block is seen."""
    powers = range(len(str(top)))
    ticks: dict[str, Any] = {
        "tickvals": [10**power for power in powers],
        "ticktext": [f"{10**power:,}" for power in powers],
    }
    return axis("blocks", type="log", range=[-0.3, len(str(top)) + 0.1], **ticks)


def _layers(names: list[str], tallies: torch.Tensor) -> Figure:
    blocks, restless = tallies.sum(1), tallies[:, 1:].sum(1)
    often = (tallies * torch.arange(MOST + 1)).sum(1)
    told = [
        f"{some:,} of {every:,} blocks, {times(count) if count else 'never'}"
        for some, every, count in zip(restless.tolist(), blocks.tolist(), often.tolist(), strict=True)
    ]
    shares = (restless / blocks).tolist()
    bars = {
        "type": "bar",
        "orientation": "h",
        "x": shares,
        "y": list(range(len(names))),
        "text": [f"{share:.2%}" for share in shares],
        "textposition": "auto",
        "customdata": [f"{name}: {text}" for name, text in zip(names, told, strict=True)],
        "hovertemplate": "%{customdata}<extra></extra>",
        "marker": {"color": BLUE},
    }
    layout = {
        "xaxis": axis("blocks that oscillated", share=True, range=[0, 1.15 * max(shares) or 1.0], nticks=5),
        "yaxis": rows(names),
        "height": 130 + 20 * max(5, len(names)),
        "bargap": 0.25 if len(names) > 3 else 0.6,
    }
    note = "Share of a layer's blocks that oscillated at least once. The network's first layer is on top."
    if len(names) <= 4:
        note += " " + "; ".join(f"{name}: {text}" for name, text in zip(short(names), told, strict=True)) + "."
    wide = len(names) > 6
    return Figure("oscillation_layers", "Which layers oscillate, at which depth?", note, [bars], layout, wide=wide)


def _traces(traces: Sequence[Trace]) -> Figure:
    data: list[dict[str, Any]] = []
    bands: list[dict[str, Any]] = []
    places, names, base = [], [], 0
    end = max(trace.since + len(trace.kept) - 1 for trace in traces)
    labels = short(list(dict.fromkeys(trace.label for trace in traces)), 16)
    shortened = dict(zip(dict.fromkeys(trace.label for trace in traces), labels, strict=True))
    for index, trace in enumerate(traces):
        m = trace.kept.shape[1]
        data += [_line(trace, x, y, base, COLOURS[index % len(COLOURS)]) for x, y in paths(trace)]
        bands.append(_band(trace.since, end, base, m))
        places.append(base + (m - 1) / 2)
        often = "1 time" if trace.oscillations == 1 else f"{trace.oscillations:,} times"
        names.append(f"{shortened[trace.label]}<br>{trace.filter:,} / {trace.block:,}<br>{often}")
        base += m + 3
    layout = {
        "shapes": bands,
        "xaxis": axis("adaptation", range=[0, end]),
        "yaxis": {
            "tickvals": places,
            "ticktext": names,
            "range": [base - 2, -1.5],
            "showgrid": False,
            "zeroline": False,
        },
        "height": 120 + 66 * len(traces),
        "hovermode": "closest",
    }
    note = (
        "A band is a block (layer, filter / block of the filter); its height is the M positions. A line is a position that "
        "is kept, a vertical stroke is a swap. Positions that a block kept throughout are left out. A band begins when its "
        "block was first among the most restless: earlier swaps are counted, but not drawn."
    )
    title = "What do the most restless blocks do?"
    return Figure("restless", title, note, data, layout, wide=True)


def _band(since: int, end: int, base: int, m: int) -> dict[str, Any]:
    """Shade the M positions of a block for as long as it was followed."""
    box = {"x0": since, "x1": end, "y0": base - 0.5, "y1": base + m - 0.5}
    return {"type": "rect", "layer": "below", "fillcolor": "#f2f2f2", "line": {"width": 0}, **box}


def _line(trace: Trace, x: list[int], y: list[int], base: int, colour: str) -> dict[str, Any]:
    """Draw how one kept place moves, in the band that begins at `base`."""
    return {
        "type": "scatter",
        "mode": "lines",
        "name": trace.title,
        "x": x,
        "y": [base + position for position in y],
        "customdata": y,
        "hovertemplate": f"{trace.title}<br>after adaptation %{{x}}: position %{{customdata}}<extra></extra>",
        "line": {"shape": "hv", "width": 2, "color": colour},
        "showlegend": False,
    }


def paths(trace: Trace) -> list[tuple[list[int], list[int]]]:
    """Follow each kept place of a block through its swaps.

    Args:
        trace: The block.

    Returns:
        A line for each of the N places whose position ever changed, or for all places if none did: adaptations and positions
        at the start, at each change, and at the end of the trace.

    Example:
        >>> kept = torch.tensor([[1, 0, 0, 1], [0, 1, 0, 1], [0, 1, 0, 1]]).bool()
        >>> paths(Trace("a", 0, 0, since=7, oscillations=0, kept=kept))
        [([7, 8, 9], [0, 1, 1])]
    """
    sets = [set(row.nonzero().flatten().tolist()) for row in trace.kept]
    slots = [[(trace.since, position)] for position in sorted(sets[0])]
    for time, (before, after) in enumerate(pairwise(sets), trace.since + 1):
        for old, new in zip(sorted(before - after), sorted(after - before), strict=True):
            next(slot for slot in slots if slot[-1][1] == old).append((time, new))
    end = trace.since + len(sets) - 1
    moved = [slot for slot in slots if len(slot) > 1] or slots
    closed = [[*slot, (end, slot[-1][1])] for slot in moved]
    return [([time for time, _ in slot], [position for _, position in slot]) for slot in closed]
