"""Networks of which processes reach different parts; tests start `python -m tests.callbacks.reached JOB FOLDER RANKS`."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional

from tests.callbacks.processes import METHODS, Exact, fsdp, main, save, whole
from tests.training import Spy, trainer

RANKS = 2
EPOCHS = 3


def adam(parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-2)


class Routed(Exact):
    """Every other image is routed to an expert, so that one of two ranks reaches it; a copy is asked under `no_grad`.

    One process sees all images, and reaches the expert in half of its batch. The late expert is reached from the second
    epoch on, by the other rank.
    """

    def __init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            layers = (nn.Flatten(), nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU())
            super().__init__(model=nn.Sequential(*layers), optimizer=adam)
            self.early, self.late, self.never, self.last = (nn.Linear(i, o) for i, o in (*[(48, 16)] * 3, (8, 5)))
        self.teacher = copy.deepcopy(self.model)
        self.double()

    def routed(self, images: Tensor, rank: int) -> Tensor:
        """Rows of a batch that one of two ranks holds."""
        places = torch.arange(len(images)) * self.trainer.world_size + self.trainer.global_rank
        return (places % RANKS == rank).nonzero().squeeze(-1)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        with torch.no_grad():
            taught = self.teacher(batch[0])
        flat = batch[0].flatten(1)
        hidden = self.model[1](flat)
        for expert, rank, start in ((self.early, 1, 0), (self.late, 0, 1)):
            rows = self.routed(flat, rank)
            if self.current_epoch >= start and len(rows):
                hidden = hidden.index_add(0, rows, expert(flat[rows]))
        hidden = self.model[2:](hidden)
        return functional.cross_entropy(self.last(hidden), batch[1]) + functional.mse_loss(hidden, taught)


PARTS = ("model.1", "model.3", "early", "late", "never", "teacher.1", "teacher.3")


def run(name: str, task: Exact, parts: Sequence[str], **kwargs: Any) -> dict[str, Any]:
    """Train, and record weights before, after every step, and which are sparse in the end."""
    callback = METHODS[name](verify=True)
    before = {part: whole(task.get_submodule(part).weight) for part in parts}
    weights: list[dict[str, Tensor]] = []
    look = Spy(lambda *_: weights.append({part: whole(task.get_submodule(part).weight) for part in parts}))
    fit = trainer(callback, look, **{"max_epochs": EPOCHS} | kwargs)
    fit.fit(task)
    state = callback.state_dict()
    masks = {layer: saved["mask"] for layer, saved in state["layers"].items()}
    return {"before": before, "weights": weights, "masks": masks, "steps": callback.steps, "rank": fit.global_rank}


def routed(name: str, ranks: int = 1, **kwargs: Any) -> dict[str, Any]:
    strategy = "ddp_find_unused_parameters_true" if ranks > 1 else "auto"
    return run(name, Routed(), PARTS, devices=ranks, strategy=strategy, **kwargs)


def ddp(folder: Path, ranks: int) -> None:
    for name in METHODS:
        save(routed(name, ranks), folder, name)
    save(routed("bame", ranks, accumulate_grad_batches=2, max_epochs=2), folder, "accumulated")


def ddp_bame(folder: Path, ranks: int) -> None:
    save(routed("bame", ranks), folder, "bame")


class Taught(Exact):
    """A network that learns from a copy of itself, beside a part that is frozen and one that nobody asks."""

    def __init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            layers = (nn.Flatten(), nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 6))
            super().__init__(model=nn.Sequential(*layers), optimizer=adam)
            self.frozen, self.idle = nn.Linear(48, 48), nn.Linear(16, 16)
        self.frozen.requires_grad_(False)
        self.teacher = copy.deepcopy(self.model)
        self.double()

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        images = batch[0].flatten(1)
        images = images + self.frozen(images)
        with torch.no_grad():
            taught = self.teacher(images)
        made = self.model(images)
        return functional.cross_entropy(made, batch[1]) + functional.mse_loss(made, taught)


class ShardedTaught(Taught):
    """The same under FSDP2."""

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        for layer in (*self.model, *self.teacher, self.frozen, self.idle):
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)


TAUGHT = ("model.1", "model.3", "frozen", "idle", "teacher.1", "teacher.3")


def sharded(folder: Path, ranks: int) -> None:
    for name in METHODS:
        save(run(name, ShardedTaught(), TAUGHT, devices=ranks, strategy=fsdp(ranks)), folder, name)


if __name__ == "__main__":
    main(globals())
