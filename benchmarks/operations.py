"""How many tensor operations does a method start in a step, beside those of the training itself?

    python -m benchmarks.operations                       # writes operations.csv and the table of docs/performance.md
    python -m benchmarks.operations --models resnet50 --methods bame

Counts every dispatched operation of a fit, views included, with the method and without it; the difference is the method's.
Work in hooks counts, and a fused operation over a list counts as one. On images of 32 x 32, in the models' own widths; the
counts depend on the size of layers only where pieces of 2^18 values are worked on one after the other (a CPU, readings of
everything). Nothing is timed.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torchvision
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from bame_lightning import SRSTE, BAMECallback, RigL, Schedule, StaticMask
from benchmarks.documents import fill

CSV = Path(__file__).parent / "operations.csv"
DOCUMENT = Path(__file__).parents[1] / "docs" / "performance.md"
CYCLE = 20
"""Steps between two readings of everything, the default."""
WARM = CYCLE
"""Steps that are not counted: the first one decides about scales and counts products."""
MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(3072, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
    ),
    "resnet18": lambda: torchvision.models.resnet18(num_classes=10),
    "resnet50": lambda: torchvision.models.resnet50(num_classes=10),
    "vit_b_16": lambda: torchvision.models.VisionTransformer(32, 16, 12, 12, 768, 3072, num_classes=10),
}
METHODS: dict[str, Callable[[str], Any]] = {
    "static": StaticMask,
    "bame": lambda pattern: BAMECallback(pattern, schedule=Schedule(0, 10**6, 2)),
    "rigl": lambda pattern: RigL(pattern, schedule=Schedule(0, 10**6, 100)),
    "sr_ste": SRSTE,
}
KINDS: dict[str, Callable[[int], bool]] = {
    "mean": lambda place: True,
    "reads contenders": lambda place: place % CYCLE != 0 and place % 2 == 0,
    "and adapts": lambda place: place % CYCLE != 0 and place % 2 == 1,
    "reads everything": lambda place: place % CYCLE == 0,
}
"""Kinds of BAME's steps, by their place in a cycle."""


class Operations(TorchDispatchMode):
    """Counts operations.

    A view of another type (`aten.view.dtype`) is followed by a `detach` where a dispatch mode watches, and only there: a
    profiler shows one operation. It is counted as one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self._retyped = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count it."""
        self.count += not (self._retyped and func is torch.ops.aten.detach.default)
        self._retyped = func is torch.ops.aten.view.dtype
        return func(*args, **(kwargs or {}))


class Task(L.LightningModule):
    """A network that is trained on batches of images."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        """The loss of a batch."""
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Descent with momentum."""
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)


class PerStep(L.Callback):
    """Counts the operations of each batch, all hooks included."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def on_train_start(self, *_: Any) -> None:
        """Begin."""
        self.mode = Operations()
        self.mode.__enter__()

    def on_train_batch_end(self, *_: Any) -> None:
        """End a batch; this callback is the last one."""
        self.counts.append(self.mode.count)
        self.mode.count = 0

    def on_train_end(self, *_: Any) -> None:
        """End."""
        self.mode.__exit__(None, None, None)


def count(model: Callable[[], nn.Module], method: Any | None, steps: int, log_every: int = 10**6) -> list[int]:
    """Operations of each step of a fit.

    Args:
        model: Makes the network.
        method: The method's callback; None for dense training.
        steps: Steps.
        log_every: Steps between two that are logged.
    """
    torch.manual_seed(0)
    batch = [torch.randn(2, 3, 32, 32), torch.tensor([0, 1])]
    watch = PerStep()
    L.Trainer(
        max_steps=steps,
        callbacks=[method, watch] if method else [watch],
        logger=False,
        log_every_n_steps=log_every,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    ).fit(Task(model()), DataLoader([batch] * steps, batch_size=None))  # type: ignore[arg-type]
    return watch.counts


def by_kind(with_method: list[int], without: list[int]) -> dict[str, float]:
    """Mean number of operations that a method adds to a step, by kind of step, over whole cycles after the warm-up."""
    added = [a - b for a, b in zip(with_method, without, strict=True)]
    places = range(WARM, len(added))
    return {
        kind: statistics.mean(added[place] for place in places if belongs(place)) for kind, belongs in KINDS.items()
    }


def main() -> None:
    """Count and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--pattern", default="1:16")
    args = parser.parse_args()
    rows = []
    for name in args.models:
        without = count(MODELS[name], None, WARM + CYCLE)
        for method in args.methods:
            callback = METHODS[method](args.pattern)
            found = by_kind(count(MODELS[name], callback, WARM + CYCLE), without)
            layers = len(callback.weights)
            rows.append(
                {"model": name, "pattern": args.pattern, "sparse_weights": layers, "method": method}
                | {kind: f"{value:.0f}" for kind, value in found.items()}
            )
            print(*rows[-1].values(), flush=True)
    with CSV.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    fill(DOCUMENT, "operations", "\n".join(table(rows)))


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The counts as lines of Markdown: kinds of steps of BAME, the mean of the others."""
    lines = [f"| model | sparse weights | {' | '.join(METHODS)} | {' | '.join(list(KINDS)[1:])} |"]
    lines.append("|---|" + "---:|" * (len(METHODS) + len(KINDS)))
    for name in dict.fromkeys(row["model"] for row in rows):
        own = {row["method"]: row for row in rows if row["model"] == name}
        cells = [own[method]["mean"] if method in own else "" for method in METHODS]
        cells += [own["bame"][kind] for kind in list(KINDS)[1:]] if "bame" in own else []
        lines.append(f"| {name} | {next(iter(own.values()))['sparse_weights']} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
