"""What sparse training costs beside dense training: time of steps and of what happens in them, memory, checkpoints.

    python -m benchmarks.performance steps resnet18 1:16 [--batch 32] [--width 512] [--cycles 2] [--threads 2] [--channels-last]
    python -m benchmarks.performance sections [--threads 2]
    python -m benchmarks.performance publish

`steps` lets dense training, SR-STE, RigL, static masks and BAME take turns, as `bame-bench` does, the masked ones with dense
products and with `compute="auto"`, and adds a row for each to `performance_steps.csv`. One thread is timed in processor time,
several by the clock on the wall. `sections` times the parts of BAME in steps of ResNet-18 (`performance_sections.csv`),
`validation` forward passes without gradients (`performance_validation.csv`). `publish` writes tables and a plot into
`docs/performance.md`. `make bench` does all of it: `python -m benchmarks.performance all`.
"""

from __future__ import annotations

import argparse
import csv
import logging
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import LambdaCallback
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader

from bame_lightning import BAMECallback, RigL, Schedule, StaticMask
from bame_lightning.blocks.layout import from_blocks, to_blocks
from bame_lightning.blocks.masks import top_n_mask
from bame_lightning.blocks.pattern import NMPattern
from bame_lightning.cli.measuring import random_batch
from bame_lightning.cli.models import build_model
from bame_lightning.cli.timed_training import CYCLE, FOREVER, Fit, take_turns
from bame_lightning.tasks import Classifier
from bame_lightning.tasks.gpt import gpt
from bame_lightning.tasks.models import mlp, resnet18, resnet50
from bame_lightning.tasks.vision_transformers import vit
from bame_lightning.weights.layers import plan_layers
from benchmarks.accuracy.study import processor
from benchmarks.documents import fill

HERE = Path(__file__).parent
STEPS, FIGURE = HERE / "performance_steps.csv", HERE / "performance.png"
SECTIONS, VALIDATION = HERE / "performance_sections.csv", HERE / "performance_validation.csv"
DOCUMENT, README = HERE.parent / "docs" / "performance.md", HERE.parent / "README.md"
IMAGES, TOKENS = ((3, 32, 32), 10), ((128,), 256)
# Builder, input shape and classes, batch.
MODELS: dict[str, tuple[Callable[..., nn.Module], tuple[tuple[int, ...], int], int]] = {
    "mlp": (mlp, ((1, 28, 28), 10), 128),
    "resnet18": (resnet18, IMAGES, 32),
    "resnet50": (resnet50, IMAGES, 32),
    "vit": (vit, IMAGES, 32),
    "gpt": (gpt, TOKENS, 32),
}
TITLES = {
    "dense": "dense",
    "sr_ste": "SR-STE",
    "static": "static mask",
    "bame": "BAME",
    "static_auto": "static mask, auto",
    "rigl_auto": "RigL, auto",
    "bame_auto": "BAME, auto",
}
"""Methods; `auto` computes sparsely what is faster so."""
COLOURS = {"sr_ste": "#D55E00", "static_auto": "#009E73", "bame": "black", "bame_auto": "#0072B2"}
CASES: list[dict[str, Any]] = [
    {"model": "mlp", "width": 512, "cycles": 10},
    *({"model": "mlp", "width": 2048, "batch": 256, "pattern": p} for p in ("1:16", "1:8", "1:4", "2:4")),
    {"model": "gpt", "width": 1024, "batch": 4, "cycles": 1},
    {"model": "gpt"},
    {"model": "vit", "cycles": 2},
    *({"model": "resnet18", "channels_last": last, "pattern": p} for last in (False, True) for p in ("1:16", "2:4")),
    {"model": "resnet18", "batch": 4},
    # The clock on the wall.
    *({"model": "mlp", "width": 2048, "batch": 256, "pattern": p, "threads": 2} for p in ("1:16", "1:8")),
    {"model": "gpt", "width": 1024, "batch": 4, "cycles": 1, "threads": 2},
    *({"model": "resnet18", "channels_last": last, "threads": 2} for last in (False, True)),
]
"""What `all` measures."""
VALIDATED: list[dict[str, Any]] = [
    {"model": "mlp", "width": 2048, "batch": 256},
    {"model": "gpt", "width": 1024, "batch": 4},
    {"model": "resnet18"},
]
NOT_YET = "Not measured yet."
KINDS = {
    "reads contenders": lambda step: step > 1 and step % 2 == 0,
    "and adapts": lambda step: step > 1 and step % 2 == 1,
    "reads all": lambda step: step == 0,
    "adapts then": lambda step: step == 1,
    "mean of all": lambda step: True,
}
"""Kinds of BAME's steps by their place in a cycle."""
CALLS = {
    "mask_gradients": "zero gradients",
    "enforce": "zero weights and momenta",
    "kept_offsets": "find what their blocks keep",
    "read": "read gradients",
    "accumulate": "move evidence",
    "contend": "choose contenders",
    "adapt": "adapt",
}
"""What is timed, by the name of the method; what one calls of another counts for the inner one only."""
COPY = "copying as many values"


class StraightThrough(torch.autograd.Function):
    """Values under the mask of the largest N, whose gradient goes straight through, with a decay of what is pruned."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, n: int, m: int) -> Tensor:
        kept = from_blocks(top_n_mask(to_blocks(weight.abs(), m), n), weight.shape)
        ctx.save_for_backward(weight, kept)
        return weight * kept

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        weight, kept = ctx.saved_tensors
        return gradient + 2e-4 * weight * ~kept, None, None


class Masked(nn.Module):
    def __init__(self, pattern: NMPattern) -> None:
        super().__init__()
        self.pattern = pattern

    def forward(self, weight: Tensor) -> Tensor:
        masked: Tensor = StraightThrough.apply(weight, self.pattern.n, self.pattern.m)
        return masked


def published_sr_ste(model: nn.Module, pattern: NMPattern) -> None:
    """SR-STE as its authors' layers have it: every forward pass makes the mask of every weight."""
    for plan in plan_layers(model, pattern):
        if plan.pattern:
            module, _, name = plan.name.rpartition(".")
            parametrize.register_parametrization(model.get_submodule(module), name, Masked(pattern))


def make_fit(args: argparse.Namespace, method: str) -> Fit:
    build, (shape, classes), _ = MODELS[args.model]
    width: dict[str, Any] = {}
    if args.width:
        width = {"hidden": [args.width] * 2} if args.model == "mlp" else {"width": args.width}
    torch.manual_seed(0)
    model = build_model(partial(build, **width), shape, classes)
    images = random_batch(shape, classes, args.batch)
    if args.channels_last:
        model, images[0] = model.to(memory_format=torch.channels_last), images[0].to(memory_format=torch.channels_last)
    if method == "sr_ste":
        published_sr_ste(model, NMPattern.parse(args.pattern))
    name, _, compute = method.partition("_")
    how: Any = {"compute": compute or "dense"}
    callbacks = {
        "static": partial(StaticMask, args.pattern, **how),
        "rigl": partial(RigL, args.pattern, schedule=Schedule(0, 10**6, every=100), **how),
        "bame": partial(BAMECallback, args.pattern, schedule=FOREVER, **how),
    }
    task = Classifier(model, lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=5e-4))
    return Fit(task, [callbacks[name]()] if name in callbacks else [], images)


def steps(args: argparse.Namespace) -> None:
    args.batch = args.batch or MODELS[args.model][2]
    turns = take_turns({method: partial(make_fit, args, method) for method in TITLES}, args.cycles)
    case = {
        "model": args.model,
        "pattern": args.pattern,
        "batch": args.batch,
        "width": args.width or "",
        "threads": args.threads,
        "format": "channels last" if args.channels_last else "",
    }
    rows = [
        case
        | {
            "cycles": args.cycles,
            "method": method,
            **{key: f"{value:.4g}" for key, value in times.summary(turns["dense"]).items() if value is not None},
            "spread": f"{spread(times.seconds, turns['dense'].seconds):.4g}",
            "processor": processor(),
        }
        for method, times in turns.items()
    ]
    for row in rows:
        print(*(row[key] for key in (*case, "method", "median_ms", "over_dense", "spread")), flush=True)
    add(STEPS, rows, list(case))


def spread(mine: list[float], dense: list[float]) -> float:
    """Standard deviation of the time over dense from one cycle to the next."""
    sums = [[sum(took[at : at + CYCLE]) for at in range(0, len(took), CYCLE)] for took in (mine, dense)]
    ratios = [a / b for a, b in zip(*sums, strict=True)]
    return statistics.stdev(ratios) if len(ratios) > 1 else 0.0


def validation(args: argparse.Namespace) -> None:
    """Time forward passes without gradients, dense and as `auto` has chosen, in turns: the shortest of some rounds."""
    rows = []
    for case in VALIDATED:
        usual = {"batch": None, "width": None, "channels_last": False}
        given = argparse.Namespace(**usual | case, pattern=args.pattern)
        given.batch = given.batch or MODELS[given.model][2]
        fit = make_fit(given, "static_auto")
        quiet: dict[str, Any] = dict.fromkeys(
            ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
        )
        trainer = L.Trainer(max_steps=2, callbacks=fit.callbacks, **quiet)
        trainer.fit(fit.module, DataLoader([fit.batch] * 2, batch_size=None))  # type: ignore[arg-type]
        callback, model = fit.callbacks[0], fit.module.eval()
        execution = callback.training.execution  # type: ignore[attr-defined]
        took: dict[str, list[float]] = defaultdict(list)
        clock = time.process_time if args.threads == 1 else time.perf_counter
        for _ in range(7):
            for how in ("dense", "auto"):
                if how == "auto":
                    execution.bind(model, callback.weights, watching=False)  # type: ignore[attr-defined]
                with torch.no_grad():
                    began = clock()
                    model(fit.batch[0])
                    took[how].append(clock() - began)
                execution.release()
        forward = [(choice.forward, choice.milliseconds["forward"]) for choice in execution.choices.values()]
        dense, chosen = sum(ms["dense"] for _, ms in forward), sum(ms[name] for name, ms in forward)
        rows.append(
            {"model": given.model, "width": given.width or "", "pattern": args.pattern, "batch": given.batch}
            | {"threads": args.threads, "sparse_layers": f"{dense / chosen:.2f}"}
            | {
                "dense_ms": f"{1e3 * min(took['dense']):.2f}",
                "times_as_fast": f"{min(took['dense']) / min(took['auto']):.2f}",
            }
        )
        print(*rows[-1].values(), flush=True)
    add(VALIDATION, rows, ["model", "width", "pattern", "batch", "threads"])


def sections(args: argparse.Namespace) -> None:
    """Time what BAME does in each kind of step of ResNet-18, batch 32, in milliseconds; and a pass over its weights."""
    clock = time.process_time if args.threads == 1 else time.perf_counter
    took: dict[str, float] = defaultdict(float)
    steps: list[dict[str, float]] = []
    going_on: list[str] = []

    def time_calls(thing: Any) -> None:
        for name in CALLS:
            if hasattr(thing, name):
                setattr(thing, name, timed(name, getattr(thing, name)))

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any, **named: Any) -> Any:
            began = clock()
            going_on.append(name)
            found = call(*given, **named)
            going_on.pop()
            spent = clock() - began
            took[name] += spent
            if going_on:
                took[going_on[-1]] -= spent
            return found

        return run

    def start(*_: Any) -> None:
        for group in callback.method.groups:
            time_calls(group)
            time_calls(group.contenders)
        time_calls(callback.method._zeros)

    def note(*_: Any) -> None:
        steps.append(dict(took))
        took.clear()

    torch.manual_seed(0)
    callback = BAMECallback(args.pattern, schedule=FOREVER)
    shape, classes = IMAGES
    task = Classifier(
        build_model(resnet18, shape, classes), lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=5e-4)
    )
    count = (args.cycles + 1) * CYCLE
    L.Trainer(
        max_steps=count,
        callbacks=[LambdaCallback(on_train_start=start, on_train_batch_end=note), callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(task, DataLoader([random_batch(shape, classes, 32)] * count, batch_size=None))  # type: ignore[arg-type]
    measured = list(enumerate(steps))[CYCLE:]
    rows = [
        {"pattern": args.pattern, "threads": args.threads, "part": name}
        | {
            kind: f"{1e3 * statistics.mean(took.get(name, 0) for step, took in measured if of_kind(step % CYCLE)):.2f}"
            for kind, of_kind in KINDS.items()
        }
        for name in CALLS
    ]
    one, other = torch.rand(2, sum(sparse.kept.numel() for sparse in callback.weights))
    passes = []
    for _ in range(7):
        began = clock()
        one.copy_(other)
        passes.append(f"{1e3 * (clock() - began):.2f}")
    rows.append(
        {"pattern": args.pattern, "threads": args.threads, "part": COPY} | dict.fromkeys(KINDS, min(passes, key=float))
    )
    add(SECTIONS, rows, ["pattern", "threads", "part"])


def add(path: Path, rows: list[dict[str, Any]], key: list[str]) -> None:
    """Put rows into a file, in the place of those with the same key."""

    def of(row: dict[str, Any]) -> list[str]:
        return [str(row[name]) for name in key]

    fresh = [of(row) for row in rows]
    old = [row for row in read(path) if of(row) not in fresh]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows([*old, *rows])


def read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def publish(args: argparse.Namespace) -> None:
    found = read(STEPS)
    shown = [method for method in TITLES if method != "dense"]
    executed = [
        f"| case | threads | dense, ms | {' | '.join(TITLES[method] for method in shown)} |",
        "|---|---:|---:|" + "---:|" * len(shown),
    ]
    memory = [
        "| model, 1:16 | held | saved | peak, MiB: dense | SR-STE | static mask | BAME | BAME, auto |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    spreads: list[float] = []
    for case in cases(found):
        rows = {row["method"]: row for row in case}
        dense, bame = rows["dense"], rows["bame"]
        width = f" of width {dense['width']}" if dense["width"] else ""
        layout = f", {dense['format']}" if dense["format"] else ""
        case_name = f"{dense['model']}{width}{layout}, {dense['pattern']}, {dense['batch']}"
        ratios = [f"{float(rows[m]['over_dense']):.2f}" for m in shown]
        executed.append(
            f"| {case_name} | {dense['threads']} | {float(dense['median_ms']):.0f} | {' | '.join(ratios)} |"
        )
        spreads += [float(rows[m]["spread"]) for m in shown if int(rows[m]["cycles"]) > 1]
        if (dense["threads"], dense["pattern"], layout) != ("1", "1:16", ""):
            continue
        held = [f"{float(bame[key]):.1f}" for key in ("held_bytes_a_weight", "saved_bytes_a_weight")]
        held += [
            f"{float(rows[method]['peak_mib']):.0f}" if rows[method]["peak_mib"] else "-"
            for method in ("dense", "sr_ste", "static", "bame", "bame_auto")
        ]
        memory.append(f"| {dense['model']}{width}, batch {dense['batch']} | {' | '.join(held)} |")
    hardware = f"On {processor()}, torch {torch.__version__}"
    cycles = sorted({int(row["cycles"]) for row in found})
    where = ", ".join(sorted({row["processor"] for row in found}))
    measured = (
        f"On {where}, torch {torch.__version__}; {cycles[0]} to {cycles[-1]} cycles of 20 steps, whose ratios have a "
        f"standard deviation of {statistics.median(spreads):.2f}, at most {max(spreads):.2f}. One thread: processor time; two: "
        "the clock on the wall."
    )
    judged = [
        "| case | dense, ms | whole network | its sparse layers |",
        "|---|---:|---:|---:|",
        *(
            f"| {row['model']}{' of width ' * bool(row['width'])}{row['width']}, {row['pattern']}, {row['batch']} "
            f"| {float(row['dense_ms']):.0f} | {row['times_as_fast']}x | {row['sparse_layers']}x |"
            for row in read(VALIDATION)
            if row["threads"] == "1"
        ),
    ]
    fill(README, "faster", headline(found))
    fill(DOCUMENT, "validation", "\n".join(judged))
    fill(DOCUMENT, "executed", "\n".join([measured, "", *executed]))
    fill(DOCUMENT, "sections", "\n".join(sections_table(hardware)) if read(SECTIONS) else NOT_YET)
    fill(DOCUMENT, "memory", "\n".join(memory))
    draw(found)


def headline(rows: list[dict[str, str]]) -> str:
    """What a step on two threads takes at 1:16, in a sentence."""
    names = {"mlp": "an MLP", "gpt": "a GPT", "resnet18": "ResNet-18"}
    parts = []
    for case in cases(rows):
        of = {row["method"]: row for row in case}
        dense = of["dense"]
        if (dense["threads"], dense["pattern"], dense["format"]) == ("2", "1:16", ""):
            width = f" of width {dense['width']}" if dense["width"] else ""
            bame, static = (float(of[method]["over_dense"]) for method in ("bame_auto", "static_auto"))
            parts.append(f"{names[dense['model']]}{width} {bame:.2f} (static mask {static:.2f})")
    return f"- **Time of a training step at 1:16 with `auto`**, dense = 1, on two threads of a CPU: {', '.join(parts)}."


def sections_table(hardware: str) -> list[str]:
    lines = [f"{hardware}; batch 32, one thread, processor time.", ""]
    lines += [f"| ms | {' | '.join(KINDS)} |", "|---|" + "---:|" * len(KINDS)]
    rows = [row for row in read(SECTIONS) if row["threads"] == "1"]
    parts = {CALLS[row["part"]]: [float(row[kind]) for kind in KINDS] for row in rows if row["part"] in CALLS}
    parts["together"] = [sum(times) for times in zip(*parts.values(), strict=True)]
    parts |= {row["part"]: [float(row[kind]) for kind in KINDS] for row in rows if row["part"] == COPY}
    return lines + [f"| {name} | {' | '.join(f'{time:.1f}' for time in times)} |" for name, times in parts.items()]


def everything(args: argparse.Namespace) -> None:
    sections(argparse.Namespace(pattern="1:16", cycles=2, threads=1))
    for pattern in ("1:16", "1:8"):
        validation(argparse.Namespace(pattern=pattern, threads=args.threads))
    for case in CASES:
        measure(**case)
    publish(args)


def measure(**case: Any) -> None:
    usual = {"pattern": "1:16", "batch": None, "width": None, "cycles": 3, "channels_last": False, "threads": 1}
    args = argparse.Namespace(**usual | case)
    torch.set_num_threads(args.threads)
    steps(args)


def cases(rows: list[dict[str, str]]) -> list[list[dict[str, str]]]:
    groups: dict[tuple[str, ...], list[dict[str, str]]] = defaultdict(list)
    for row in rows:
        groups[tuple(row[name] for name in ("model", "pattern", "batch", "width", "threads", "format"))].append(row)
    order = {name: place for place, name in enumerate(MODELS)}
    return [groups[key] for key in sorted(groups, key=lambda k: (order[k[0]], int(k[3] or 0), k[1], int(k[2]), *k[4:]))]


def draw(rows: list[dict[str, str]]) -> None:
    """Time of a step over dense, case by case: dense products as points, chosen ones as bars."""
    found = [{row["method"]: row for row in case} for case in cases(rows)]
    figure = Figure(figsize=(8, 0.6 + 0.42 * len(found)), layout="constrained")
    axes = figure.subplots()
    names = []
    for place, case in enumerate(found):
        dense = case["dense"]
        width = f" {dense['width']}" if dense["width"] else ""
        layout = f", {dense['format']}" if dense["format"] else ""
        threads = f"{dense['threads']} thread{'s' * (dense['threads'] != '1')}"
        names.append(f"{dense['model']}{width}{layout}, {dense['pattern']}, batch {dense['batch']}, {threads}")
        for offset, method in ((-0.2, "static_auto"), (0.2, "bame_auto")):
            ratio = float(case[method]["over_dense"])
            axes.barh(place + offset, ratio, 0.38, color=COLOURS[method], label=TITLES[method] if not place else None)
        for method in ("sr_ste", "bame"):
            ratio = float(case[method]["over_dense"])
            axes.plot(ratio, place, "o", color=COLOURS[method], label=TITLES[method] if not place else None)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("time of a training step / dense")
    figure.legend(frameon=False, ncols=4, loc="outside upper center")
    figure.savefig(FIGURE, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("steps")
    one.add_argument("model", choices=list(MODELS))
    one.add_argument("pattern")
    one.add_argument("--batch", type=int)
    one.add_argument("--width", type=int)
    one.add_argument("--cycles", type=int, default=2)
    one.add_argument("--channels-last", action="store_true")
    judged = commands.add_parser("validation")
    judged.add_argument("--pattern", default="1:16")
    parts = commands.add_parser("sections")
    parts.add_argument("--pattern", default="1:16")
    parts.add_argument("--cycles", type=int, default=5)
    calls = {"publish": publish, "all": everything}
    for command, call in [
        (one, steps),
        (parts, sections),
        (judged, validation),
        *((commands.add_parser(name), call) for name, call in calls.items()),
    ]:
        command.add_argument("--threads", type=int, default=2)
        command.set_defaults(call=call)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    args.call(args)


if __name__ == "__main__":
    main()
