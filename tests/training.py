"""Small training runs for the tests of callbacks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset


def tiny_model() -> nn.Sequential:
    """A stem that 4 does not divide, a grouped and a plain convolution, two linear layers."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.Conv2d(8, 8, 1),
        nn.Flatten(),
        nn.Linear(8 * 16, 16),
        nn.ReLU(),
        nn.Linear(16, 5),
    )


class Task(L.LightningModule):
    """Classify noise with fixed labels, so that every gradient is reproducible."""

    def __init__(
        self,
        model: nn.Module | None = None,
        optimizer: Callable[..., torch.optim.Optimizer] | None = None,
        batch: int = 8,
    ) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = model or tiny_model()
        self.make_optimizer = optimizer or (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-3))
        self.batch = batch

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        loss = functional.cross_entropy(self.model(batch[0]), batch[1])
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make_optimizer(self.parameters())

    def train_dataloader(self) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(1)
        images = torch.randn(64, 3, 4, 4, generator=generator)
        labels = torch.randint(5, (64,), generator=generator)
        return DataLoader(TensorDataset(images, labels), batch_size=self.batch)


def trainer(*callbacks: L.Callback, **kwargs: Any) -> L.Trainer:
    """A Trainer on the CPU that writes nothing and says nothing, unless asked to."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(callbacks=list(callbacks), **(defaults | kwargs))


class Spy(L.Callback):
    """Call a function after every batch, when the optimizer has stepped."""

    def __init__(self, look: Callable[[L.Trainer, L.LightningModule], None]) -> None:
        self.look = look

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.look(trainer, pl_module)


def blocks_over(weight: Tensor, n: int, m: int) -> int:
    """Blocks with more than `n` non-zeros, counted one by one along the input dimension."""
    rows = weight.detach().movedim(1, -1).flatten(0, -2)
    return sum(int((row[i : i + m] != 0).sum()) > n for row in rows for i in range(0, len(row), m))
