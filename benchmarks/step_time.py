"""What a training step costs under each method, as a ratio to dense training and beside SR-STE in the same process.

    python -m benchmarks.step_time [--models mlp resnet18] [--patterns 2:4 1:16] [--rounds 5]

Methods take turns: a short `Trainer.fit` each, round after round, so that a slow minute of the machine hits all of them
alike. Reported are medians over all steps of all rounds but each fit's first, and, for the evolution, the mean, in which
readings and adaptations are spread over all steps.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from bame_lightning import SRSTE, BAMECallback, Schedule, StaticMask
from bame_lightning.tasks.models import mlp, resnet18

MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "mlp": (lambda: mlp((1, 28, 28), 10), (1, 28, 28), 128),
    "resnet18": (lambda: resnet18((3, 32, 32), 10), (3, 32, 32), 32),
}
METHODS: dict[str, Callable[[str], L.Callback | None]] = {
    "dense": lambda pattern: None,
    "sr_ste": lambda pattern: SRSTE(pattern),
    "static": lambda pattern: StaticMask(pattern),
    "bame": lambda pattern: BAMECallback(pattern, schedule=Schedule(0, 10**6)),
}
STEPS = 31  # three adaptations and readings of all blocks, behind one step of warm-up


class Task(L.LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return functional.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class Clock(L.Callback):
    def __init__(self) -> None:
        self.ticks: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ticks.append(time.perf_counter())


def measure(model: str, method: str, pattern: str) -> list[float]:
    make, shape, batch = MODELS[model]
    torch.manual_seed(0)
    images, labels = torch.randn(batch, *shape), torch.randint(10, (batch,))
    data = DataLoader(TensorDataset(images, labels), batch_size=batch)
    clock, sparse = Clock(), METHODS[method](pattern)
    trainer = L.Trainer(
        max_steps=STEPS,
        callbacks=[clock, *([sparse] if sparse else [])],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Task(make()), data)
    return [now - before for before, now in zip(clock.ticks, clock.ticks[1:], strict=False)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--patterns", nargs="+", default=["2:4", "1:16"])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    print("| model | pattern | method | median ms | median / dense | mean / dense |\n|---|---|---|---|---|---|")
    for model in args.models:
        for pattern in args.patterns:
            times: dict[str, list[float]] = defaultdict(list)
            for _ in range(args.rounds):
                for method in METHODS:
                    times[method] += measure(model, method, pattern)
            dense = times["dense"]
            for method, seconds in times.items():
                median, mean = statistics.median(seconds), statistics.mean(seconds)
                ratios = f"{median / statistics.median(dense):.2f} | {mean / statistics.mean(dense):.2f}"
                print(f"| {model} | {pattern} | {method} | {1e3 * median:.1f} | {ratios} |", flush=True)


if __name__ == "__main__":
    main()
