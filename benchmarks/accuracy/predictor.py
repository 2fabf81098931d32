"""How well does the predicted loss reduction of an adaptation rank what it really gains? Spearman's rank correlation.

    python -m benchmarks.accuracy.predictor

Trains the MLP of `recipes/fashion_mnist_mlp.yaml` for two epochs. At every fifth adaptation the batch of the step is evaluated
just before and just after the swaps, in double precision; so is the next batch. Two predictions are ranked against what was
realised: `logged`, what the callback logs, minus the gradient of the step times the change of the weights; and `squares`, by
how much the squares of what is revived exceed those of what is pruned, over the layer's unit of weights to gradients, which
makes a loss of it. The last run swaps in any number of blocks a row.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from scipy.stats import spearmanr  # type: ignore[import-untyped]
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from bame_lightning import BAMECallback, Evidence, Schedule
from bame_lightning.bame.table import EvolvingLayer
from bame_lightning.blocks.layout import to_blocks
from bame_lightning.tasks import Classifier, FashionMNIST
from bame_lightning.tasks.models import mlp
from bame_lightning.tasks.schedulers import cosine

CSV = Path(__file__).parent / "predictor.csv"


class Watch(L.Callback):
    """Notes predicted and realised loss reduction of adaptations.

    Args:
        method: The method in the same Trainer.
    """

    def __init__(self, method: BAMECallback) -> None:
        self.method = method
        self.rows: list[dict[str, float]] = []

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.module, self.batches = pl_module, iter(trainer.datamodule.train_dataloader())  # type: ignore[attr-defined]
        self.method.training.run.observers.append(self.note)

    @override
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batch = batch

    @contextmanager
    def note(self) -> Iterator[None]:
        """Compare before and after every fifth adaptation."""
        other = None if self.method.adaptations % 5 else next(self.batches, None)
        if other is None:
            yield
            return
        self.method.method.enforce()
        before, choice = [self.loss(self.batch), self.loss(other)], [latent(layer) for layer in self.method.evolving]
        yield
        layers = self.method.evolving
        self.rows.append(
            {
                "step": self.method.steps,
                "flips": sum(int(layer.last_flips) for layer in layers),
                "logged": sum(float(layer.predicted) for layer in layers),
                "squares": sum(map(squares, layers, choice)),
                "same_batch": before[0] - self.loss(self.batch),
                "next_batch": before[1] - self.loss(other),
            }
        )

    def loss(self, batch: list[Tensor]) -> float:
        with torch.no_grad():
            return float(functional.cross_entropy(self.module(batch[0]).double(), batch[1]))


def latent(layer: EvolvingLayer) -> tuple[Tensor, Tensor]:
    """What an adaptation chooses from, weights where kept and evidence where pruned; and the mask."""
    mask = layer.sparse.mask().clone()
    return torch.where(mask, to_blocks(layer.sparse.values, mask.shape[1]), layer.evidence), mask


def squares(layer: EvolvingLayer, choice: tuple[Tensor, Tensor]) -> float:
    """By how much the squares of what was revived exceed those of what was pruned."""
    values, before = choice
    assert layer.unit is not None
    return float((values.square() * (layer.sparse.mask().float() - before.float())).sum() / layer.unit)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for every, one_per_row in ((2, True), (10, True), (2, False)):
        L.seed_everything(0, verbose=False)
        task = Classifier(mlp(), lambda p: torch.optim.SGD(p, 0.05, 0.9, weight_decay=5e-4), cosine)
        method = BAMECallback("1:16", schedule=Schedule(every=every), evidence=Evidence(one_per_row=one_per_row))
        watch = Watch(method)
        data = FashionMNIST(val_size=0)
        trainer = L.Trainer(
            max_epochs=2, callbacks=[method, watch], logger=False, enable_checkpointing=False, accelerator="cpu"
        )
        trainer.fit(task, datamodule=data)
        for half, part in (
            ("first", watch.rows[: len(watch.rows) // 2]),
            ("second", watch.rows[len(watch.rows) // 2 :]),
        ):
            for realised in ("same_batch", "next_batch"):
                for predicted in ("logged", "squares"):
                    swaps = [row for row in part if row["flips"]]
                    rank = spearmanr([row[predicted] for row in swaps], [row[realised] for row in swaps])
                    rows.append(
                        {
                            "every": every,
                            "one_per_row": one_per_row,
                            "half_of_run": half,
                            "realised_on": realised,
                            "predicted": predicted,
                            "adaptations": len(swaps),
                            "rank_correlation": f"{rank.statistic:.3f}",
                            "p": f"{rank.pvalue:.2g}",
                            "mean_predicted": f"{sum(row[predicted] for row in swaps) / len(swaps):.3g}",
                            "mean_realised": f"{sum(row[realised] for row in swaps) / len(swaps):.3g}",
                        }
                    )
                    print(rows[-1], flush=True)
    with CSV.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
