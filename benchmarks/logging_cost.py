"""What logging costs: ResNet-20 under BAME, ten steps with all scalars and ten without, by turns in one run.

    python -m benchmarks.logging_cost [--pairs 14]

The loggers are those of `logger=csv_wandb` (W&B offline), the interval is the default of `bame-train`: the last of every ten
steps logs. Pictures and snapshots, which a run takes a fixed number of times whatever its length, are timed apart, and related
to a run of the recipe `fashion_mnist_resnet20`. Data are random: they cost nothing, and nothing that is timed depends on them.
Timed is the processor time of the training process, on one thread, which others on the machine disturb least; W&B writes its
file in a process of its own. Writes the result into docs/dashboards.md.
"""

from __future__ import annotations

import argparse
import logging
import math
import statistics
import textwrap
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset

from bame_lightning import BAMECallback, MaskImages, MaskSnapshots
from bame_lightning.cli.wandb_runs import wandb_logger
from bame_lightning.tasks import Classifier
from bame_lightning.tasks.small_resnets import resnet20
from benchmarks.documents import fill

DOCUMENT = Path(__file__).parents[1] / "docs" / "dashboards.md"
EVERY = 10
"""`trainer.log_every_n_steps` of bame-train."""
BATCH = 128
STEPS_OF_RECIPE = 3 * (60_000 // BATCH)
"""Of `fashion_mnist_resnet20`: 3 epochs."""
LOOKS = {MaskImages: 6, MaskSnapshots: 21}
"""How often each looks at the masks in a run: at the start, and then as often as its `at_most` says."""


class Turns(L.Callback):
    """Switches logging off and on every ten steps, and times each ten, without the time that was set aside."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.aside = 0.0
        self._begin = math.nan

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, index: int) -> None:
        if index % EVERY == 0:
            now = time.process_time()
            self.seconds.append(now - self._begin - self.aside)
            self._begin, self.aside = now, 0.0
            trainer.log_every_n_steps = EVERY if index // EVERY % 2 else 10**9


def set_aside(turns: Turns, look: Callable[..., None], times: list[float]) -> Callable[..., None]:
    def timed(*args: Any) -> None:
        begin = time.process_time()
        look(*args)
        times.append(time.process_time() - begin)
        turns.aside += times[-1]

    return timed


def measure(pairs: int, folder: str) -> tuple[list[float], dict[type, list[float]]]:
    """Seconds of each ten steps, the first of which warm up; and of each look at the masks."""
    steps = EVERY * (2 * pairs + 2) + 1
    turns, times = Turns(), defaultdict[type, list[float]](list)
    watchers = [MaskSnapshots(folder, at_most=LOOKS[MaskSnapshots] - 1), MaskImages(at_most=LOOKS[MaskImages] - 1)]
    for watcher in watchers:
        watcher.look = set_aside(turns, watcher.look, times[type(watcher)])  # type: ignore[method-assign]
    images, labels = torch.randn(BATCH, 1, 28, 28), torch.randint(10, (BATCH,))
    data = DataLoader(TensorDataset(images, labels), BATCH)
    task = Classifier(resnet20((1, 28, 28), 10), lambda p: torch.optim.SGD(p, 0.1, 0.9))
    trainer = L.Trainer(
        max_steps=steps,
        callbacks=[turns, *watchers, BAMECallback("1:16")],
        logger=[CSVLogger(folder, "", ""), wandb_logger(silent=True, save_dir=folder)],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(task, Endless(data))
    return turns.seconds[2:], times


class Endless:
    """Goes on with the same batches, so that the run is a single epoch."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.batches = list(loader)

    def __iter__(self) -> Any:
        while True:
            yield from self.batches


def report(seconds: list[float], times: dict[type, list[float]]) -> str:
    without, logged = seconds[0::2], seconds[1::2]
    pairs = list(zip(without, logged, strict=False))
    extra = [100 * (b - a) / a for a, b in pairs]
    step = statistics.median(without) / EVERY
    run = step * STEPS_OF_RECIPE
    looks = {kind: statistics.mean(found) for kind, found in times.items()}
    rest = {kind: LOOKS[kind] * looks[kind] for kind in looks}
    mean, error = statistics.mean(extra), statistics.stdev(extra) / math.sqrt(len(extra))
    text = (
        f"**What it costs.** Ten steps of ResNet-20 need {mean:.1f} ± {error:.1f} % more processor time if the last one logs "
        f"all scalars to CSV and offline W&B (mean and standard error of {len(pairs)} pairs). Pictures and snapshots take "
        f"{100 * sum(rest.values()) / run:.2f} % of `recipe=fashion_mnist_resnet20` (`python -m benchmarks.logging_cost`)."
    )
    return textwrap.fill(text, 128, break_long_words=False, break_on_hyphens=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=14, help="of ten steps with and ten without")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with TemporaryDirectory() as folder:
        text = report(*measure(args.pairs, folder))
    print(text)
    fill(DOCUMENT, "cost", text)


if __name__ == "__main__":
    main()
