"""Figures as plotly takes them, made of plain lists, so that tests can read the numbers from the page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import floor, log10
from typing import Any

from bame_lightning.show.numbers import flops as in_words
from bame_lightning.show.report.logs import Log, Series, thinned_together

# Okabe and Ito's colours, told apart with any colour vision.
BLUE, ORANGE, GREEN, PINK, AMBER, SKY, BLACK, BROWN = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#222222", "#8C6D1F"),
)
COLOURS = (BLUE, ORANGE, GREEN, PINK, AMBER, SKY, BLACK, BROWN)
POINTS = 1000
"""The most points of a line."""
_LINES = 6
"""The most layers that are drawn as lines; if there are more, they become rows of a heat map."""
_CELLS = 300
"""The most columns of a heat map."""

Trace = dict[str, Any]


@dataclass(frozen=True)
class Figure:
    """A plot of the page.

    Args:
        name: Short name, unique on the page.
        title: The question that it answers.
        note: What it shows, and how to read it.
        data: Plotly's traces.
        layout: Plotly's layout, which overrides that of the page.
        wide: Whether it takes the whole width of the page.
    """

    name: str
    title: str
    note: str
    data: Sequence[Trace]
    layout: Mapping[str, Any] = field(default_factory=dict)
    wide: bool = False


def line(name: str, series: Series, colour: str, **more: Any) -> Trace:
    """Draw a metric over time.

    Args:
        name: What the legend calls it.
        series: The metric.
        colour: Colour of the line.
        **more: Anything else of a plotly trace.

    Returns:
        A trace; x are optimizer steps.
    """
    shown = series.thinned(POINTS)
    # A line needs two points.
    mode = "lines" if len(shown.steps) > 1 else "markers"
    style = {"color": colour, "width": 2, **more.pop("line", {})}
    marker = {"color": colour, "size": 7}
    return {"type": "scatter", "name": name, "x": shown.steps, "y": shown.values, "mode": mode} | {
        "line": style,
        "marker": marker,
        **more,
    }


def axis(title: str, *, share: bool = False, **more: Any) -> dict[str, Any]:
    """Describe an axis; a share is shown in percent."""
    return {"title": {"text": title, "standoff": 8}, **({"tickformat": ",.4~%"} if share else {}), **more}


def quality(log: Log) -> Iterator[Figure]:
    """Draw loss, and accuracy or bits per byte, over training."""
    notes = {
        "loss": (
            "Does the loss fall?",
            "Mean over an epoch of training, and over the validation set at its end; the star is the final test.",
        ),
        "accuracy": (
            "How many answers are right?",
            "Share of right answers in an epoch of training, in validation at its end, and in the final test (star).",
        ),
        "bits_per_byte": ("How well is text predicted?", "Bits for each byte of text; fewer are better."),
    }
    for metric, (title, note) in notes.items():
        traces = [
            line(name, log[f"{stage}/{metric}"], colour)
            for stage, name, colour in (("train", "training", BLUE), ("val", "validation", ORANGE))
            if log[f"{stage}/{metric}"]
        ]
        if test := log[f"test/{metric}"]:
            star = {"color": BLACK, "size": 12, "symbol": "star"}
            traces.append(line("test", test, BLACK, mode="markers", marker=star))
        if traces:
            layout = {"yaxis": axis(metric.replace("_", " "), share=metric == "accuracy")}
            yield Figure(metric, title, note, traces, layout)


def masks(log: Log) -> Iterator[Figure]:
    """Draw when masks change, and how much is left of the first ones."""
    if flips := log["bame/flip_rate"]:
        note = (
            "Share of mask positions that the latest adaptation changed; a swap changes two. The axis is logarithmic."
        )
        rates = log.layers("flip_rate")
        yield by_layer("flip_rate", "When do masks change?", note, flips, rates, "positions changed", logarithmic=True)
    if survival := log["bame/survival"]:
        note = "Share of the positions kept by the first mask that are kept now."
        layout = {"yaxis": axis("still kept", share=True)}
        title = "How much of the first mask is left?"
        yield Figure("survival", title, note, [line("all layers", survival, BLACK)], layout)


def freezing(log: Log) -> Iterator[Figure]:
    """Draw how many blocks are frozen, if any is."""
    frozen = log["bame/frozen_fraction"]
    if any(frozen.values):
        note = "Share of blocks whose mask is final because they oscillated too often."
        layers = log.layers("frozen_fraction")
        yield by_layer("frozen", "How many blocks are frozen?", note, frozen, layers, "frozen blocks")


def cost(log: Log) -> Iterator[Figure]:
    """Draw training FLOPs so far beside those of dense training and SR-STE for as many steps."""
    total = log["flops/train_total"]
    if not total:
        return
    traces = [line("this run", total, BLUE, line={"width": 3})]
    for key, name, colour, dash in (("dense", "dense", BLACK, "dash"), ("sr_ste", "SR-STE", ORANGE, "dot")):
        reference = referred(total, log[f"flops/train_vs_{key}"])
        if reference:
            traces.append(line(name, reference, colour, line={"dash": dash}))
    for trace in traces:
        trace["text"] = [None if value is None else in_words(value) for value in trace["y"]]
        trace["hovertemplate"] = "%{text}<extra>%{fullData.name}</extra>"
    note = (
        "FLOPs so far, counted, not executed: two for each multiply-add that the method needs. Dense and SR-STE: the same "
        "network for as many steps."
    )
    top = max(value for trace in traces for value in trace["y"] if value is not None)
    yield Figure("flops", "What does training cost?", note, traces, {"yaxis": _flops_axis(top)})


def _flops_axis(top: float) -> dict[str, Any]:
    """Describe an axis from zero whose ticks are round numbers with units."""
    power = 10.0 ** floor(log10(top / 4))
    stride = next(digit * power for digit in (1, 2, 5, 10) if digit * power >= top / 5)
    values = [stride * count for count in range(floor(top / stride) + 1)]
    return axis("", tickvals=values, ticktext=[in_words(value) for value in values], range=[0, 1.05 * top])


def referred(total: Series, ratio: Series) -> Series:
    """Recover the reference of a ratio.

    Args:
        total: FLOPs of the run so far.
        ratio: FLOPs of the run / those of the reference, where known.

    Returns:
        FLOPs of the reference.

    Example:
        >>> referred(Series([9, 19], [10.0, 20.0]), Series([19], [0.5]))
        Series(steps=[19], values=[40.0])
    """
    ratios = dict(zip(ratio.steps, ratio.values, strict=True))
    found = [
        (step, value / share)
        for step, value in zip(total.steps, total.values, strict=True)
        if value is not None and (share := ratios.get(step))
    ]
    return Series([step for step, _ in found], [value for _, value in found])


def by_layer(
    name: str,
    title: str,
    note: str,
    whole: Series,
    layers: Mapping[str, Series],
    unit: str,
    *,
    logarithmic: bool = False,
) -> Figure:
    """Draw a share over all layers as a line, and each layer as a line, too, or as a row of a heat map if there are many.

    Args:
        name: As in `Figure`.
        title: As in `Figure`.
        note: As in `Figure`.
        whole: The share over all layers.
        layers: The same by layer.
        unit: Title of the axis: what the share is.
        logarithmic: Whether the axis, and the colours, are logarithmic; zeros leave gaps.

    Returns:
        The figure.
    """
    # A single point between two zeros would leave no line.
    marks = {"mode": "lines+markers", "marker": {"size": 3}} if logarithmic else {}
    everything = line("all layers", whole, BLACK, line={"width": 3}, **marks)
    top = max((value for series in (whole, *layers.values()) for value in series.values if value), default=1.0)
    scale = {"type": "log"} if logarithmic else {"range": [0, 1.05 * top]}
    layout: dict[str, Any] = {"yaxis": axis(unit, share=True, **scale)}
    labels = short(list(layers))
    if len(layers) <= _LINES:
        colours = (BLUE, ORANGE, GREEN, PINK, AMBER, SKY)
        lines = [
            line(label, series, colour, line={"width": 1.5}, **marks)
            for label, series, colour in zip(labels, layers.values(), colours, strict=False)
        ]
        return Figure(name, title, note, [*lines, everything], layout)
    steps, values = thinned_together(layers, _CELLS)
    heat: Trace = {
        "type": "heatmap",
        "x": steps,
        "y": list(range(len(labels))),
        "z": values,
        "zmin": 0,
        "zmax": top,
        "logarithmic": logarithmic,  # the page colours by powers of ten then
        "rownames": list(layers),  # shown when the pointer is over a cell; the page puts them there
        "colorscale": "Viridis",
        "hovertemplate": "%{text}, step %{x}: %{z:.4~%}<extra></extra>",
        "yaxis": "y2",
    }
    height = 16 * len(labels)
    share = height / (height + 190)
    heat["colorbar"] = {"tickformat": ",.4~%", "thickness": 12, "outlinewidth": 0, "len": share, "y": share / 2}
    layout = {
        "xaxis": {"anchor": "y2"},
        "yaxis": layout["yaxis"] | {"domain": [share + 0.04, 1.0]},
        "yaxis2": rows(list(layers)) | {"domain": [0.0, share]},
        "height": 110 + height + 190,
    }
    note = f"{note} A line over all layers, and a row for each."
    return Figure(name, title, note, [everything, heat], layout, wide=True)


def rows(names: Sequence[str]) -> dict[str, Any]:
    """Describe an axis with a row for each layer, the first on top."""
    return {
        "tickvals": list(range(len(names))),
        "ticktext": short(names),
        "range": [len(names) - 0.5, -0.5],
        "showgrid": False,
        "zeroline": False,
    }


def short(labels: Sequence[str], length: int = 22) -> list[str]:
    """Shorten names of layers for axes: drop the parts with which all start, and cut the middle, where they differ least.

    Example:
        >>> short(["model.encoder.7.attention.in_proj_weight", "model.head"])
        ['encoder.7.…proj_weight', 'head']
    """
    parts = [label.split(".") for label in labels]
    shared = 0
    while len(parts) > 1 and all(len(part) > shared + 1 and part[shared] == parts[0][shared] for part in parts):
        shared += 1
    names = [".".join(part[shared:]) for part in parts]
    head = (length - 1) // 2
    return [name if len(name) <= length else f"{name[:head]}…{name[head + 1 - length :]}" for name in names]
