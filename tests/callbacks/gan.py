"""A GAN: two optimizers that hold sparse weights, each at a pace of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from tests.training import Task

EPOCHS, BATCHES, CRITIC_STEPS = 5, 16, 5
STEPS = {"critic": 80, "maker": 16}
"""A maker steps after batches 4, 9, ..., 79."""


class Gan(Task):
    """Both networks sparse; the maker is trained in every fifth batch only. Ranks share the inputs of a batch."""

    def __init__(self) -> None:
        super().__init__(nn.Identity(), batch=4)
        self.automatic_optimization = False
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.maker = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 48))
            self.critic = nn.Sequential(nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1))
        self.batches = 0
        self.double()

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        critic, maker = self.optimizers()
        noise = torch.randn(4, 8, generator=torch.Generator().manual_seed(self.batches)).double()
        noise = noise[self.trainer.global_rank :: self.trainer.world_size]
        with torch.no_grad():
            made = self.maker(noise)
        critic.zero_grad()
        self.manual_backward(self.critic(made).mean() - self.critic(batch[0].flatten(1)).square().mean())
        critic.step()
        self.batches += 1
        if self.batches % CRITIC_STEPS == 0:
            maker.zero_grad()
            self.manual_backward(-self.critic(self.maker(noise)).mean())
            maker.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(part.parameters(), lr=1e-2) for part in (self.critic, self.maker)]

    def train_dataloader(self) -> DataLoader[Any]:
        images, labels = super().train_dataloader().dataset.tensors
        data, ranks = TensorDataset(images.double(), labels), self.trainer.world_size
        sampler = DistributedSampler(data, ranks, self.trainer.global_rank, shuffle=False)
        return DataLoader(data, batch_size=4 // ranks, sampler=sampler)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["batches"] = self.batches

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.batches = checkpoint["batches"]
