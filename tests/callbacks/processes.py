"""Training in several real processes, as tests start it: `python -m tests.callbacks.processes JOB FOLDER RANKS`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from bame_lightning import SRSTE, BAMECallback, Evidence, OneBatch, RigL, Schedule, StaticMask, TransposableSTE
from bame_lightning.compute.choice import Choice
from bame_lightning.weights.invariants import InvariantError
from tests.callbacks.gan import EPOCHS, Gan
from tests.training import Spy, Task, trainer

ROOT = Path(__file__).parents[2]
BATCH = 8
"""Images in a step, over all ranks."""
SPARSE = (2, 4, 6)


def computed(**kwargs: Any) -> BAMECallback:
    """BAME whose layers are multiplied sparsely, as the first rank finds."""
    callback = BAMECallback(
        "2:4", schedule=Schedule(every=2), evidence=Evidence(read_every=3), compute="auto", **kwargs
    )
    callback.training.execution.choose = kernels_on_the_first
    return callback


def kernels_on_the_first(*args: Any) -> Choice:
    """Find the kernels fastest; only the first rank is asked."""
    assert not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    return Choice("kernels", "kernels", "kernels", "of a test")


METHODS: dict[str, Callable[..., Any]] = {
    "bame": lambda **kwargs: BAMECallback(
        "2:4",
        schedule=Schedule(every=2),
        evidence=Evidence(read_every=3, contenders=0.5, step_size=4.0),
        freeze_after=2,
        **kwargs,
    ),
    "bame_computed": lambda **kwargs: computed(**kwargs),
    "bame_one_batch": lambda **kwargs: BAMECallback("2:4", schedule=Schedule(every=3), evidence=OneBatch(), **kwargs),
    "both_ways": lambda **kwargs: BAMECallback(
        "1:4",
        schedule=Schedule(every=2),
        evidence=Evidence(read_every=3, contenders=0.5, step_size=4.0),
        both_ways=True,
        **kwargs,
    ),
    "rigl": lambda **kwargs: RigL("2:4", schedule=Schedule(every=3), **kwargs),
    "sr_ste": lambda **kwargs: SRSTE("2:4", **kwargs),
    "static": lambda **kwargs: StaticMask("2:4", init="random", **kwargs),
    "transposable": lambda **kwargs: TransposableSTE("2:4", refresh_every=3, **kwargs),
}


class Exact(Task):
    """In float64, where another order of sums decides nothing; the images of a step do not depend on the number of ranks."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.double()

    def train_dataloader(self) -> DataLoader[Any]:
        images, labels = super().train_dataloader().dataset.tensors
        data, ranks = TensorDataset(images.double(), labels), self.trainer.world_size
        # Lightning's own would shuffle.
        sampler = DistributedSampler(data, ranks, self.trainer.global_rank, shuffle=False)
        return DataLoader(data, batch_size=BATCH // ranks, sampler=sampler)


class Sharded(Exact):
    """Under FSDP2."""

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        for layer in self.model:
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)


def fsdp(ranks: int, **kwargs: Any) -> ModelParallelStrategy:
    return ModelParallelStrategy(ranks, 1, process_group_backend="gloo", **kwargs)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor, gathered by torch's own code where it is sharded."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def train(callback: Any, task: Task, ckpt_path: Path | None = None, **kwargs: Any) -> dict[str, Any]:
    """Train, and record what a rank saw: gradients before they were averaged; weights after every step; statistics."""
    record: dict[str, Any] = {"local": [], "weights": [], "metrics": []}

    def look(fit: L.Trainer, module: L.LightningModule) -> None:
        record["weights"].append([whole(module.model[i].weight) for i in SPARSE])
        record["metrics"].append({name: float(value) for name, value in fit.callback_metrics.items()})

    if isinstance(task, Exact) and not isinstance(task, Sharded):
        task.model[6].weight.register_hook(lambda gradient: record["local"].append(gradient.clone()))
    fit = trainer(callback, Spy(look), log_every_n_steps=1, **{"max_epochs": 3} | kwargs)
    fit.fit(task, ckpt_path=ckpt_path)
    state = callback.state_dict()
    summary = callback.summary()
    return record | {"state": state, "summary": summary, "rank": fit.global_rank}


def save(record: dict[str, Any], folder: Path, name: str) -> None:
    torch.save(record, folder / f"{name}-rank{record['rank']}.pt")


def ddp_bame(folder: Path, ranks: int) -> None:
    save(train(METHODS["bame"](verify=True), Exact(), devices=ranks, strategy="ddp"), folder, "bame")


def ddp(folder: Path, ranks: int) -> None:
    for name, make in METHODS.items():
        save(train(make(verify=True), Exact(), devices=ranks, strategy="ddp"), folder, name)


def sharded(folder: Path, ranks: int) -> None:
    for name, make in METHODS.items():
        save(train(make(verify=True), Sharded(), devices=ranks, strategy=fsdp(ranks)), folder, name)


def train_gan(ranks: int) -> dict[str, Any]:
    """Train two networks with an optimizer each, and record weights after every batch."""
    callback, task = METHODS["bame"](verify=True), Gan()
    weights: list[Any] = []
    spy = Spy(lambda *_: weights.append([sparse.weight.detach().clone() for sparse in callback.weights]))
    strategy = "ddp_find_unused_parameters_true" if ranks > 1 else "auto"
    fit = trainer(callback, spy, max_epochs=EPOCHS, devices=ranks, strategy=strategy)
    fit.fit(task)
    clocks = {clock["layers"][0].partition(".")[0]: clock["steps"] for clock in callback.state_dict()["clocks"]}
    flops = callback.summary()["flops"]
    return {"weights": weights, "clocks": clocks, "flops": flops, "rank": fit.global_rank}


def several_optimizers(folder: Path, ranks: int) -> None:
    save(train_gan(ranks), folder, "gan")


def corrupted(folder: Path, ranks: int) -> None:
    """One rank goes astray after step 5; record what becomes of the run."""

    def mask(callback: Any) -> None:
        # Another weight of the first block: the count stays right.
        callback.weights[1].kept[0, :4] = ~callback.weights[1].kept[0, :4]

    def weight(callback: Any) -> None:
        callback.weights[1].values[0, :4] += callback.weights[1].kept[0, :4]

    def evidence(callback: Any) -> None:
        pruned = ~callback.evolving[2].sparse.mask()[7]
        callback.evolving[2].evidence[7] += 1e-9 * pruned

    def latent(callback: Any) -> None:
        callback.method.latents[0].value[0, 0] += 1e-6

    def noise(callback: Any) -> None:
        callback.evolving[0].noise *= 2

    never = Schedule(start=0, stop=1, every=1)
    still = BAMECallback("2:4", schedule=Schedule(stop=20, every=2))
    cases: dict[str, tuple[Any, Any, Callable[[Any], None], int, int]] = {
        # method, module, what happens, to whom, epochs of 8 steps
        "mask": (StaticMask("2:4"), Exact(), mask, ranks - 2, 7),
        "weight": (StaticMask("2:4"), Exact(), weight, ranks - 1, 1),
        "evidence": (still, Exact(), evidence, ranks - 1, 7),
        "latent": (SRSTE("2:4", verify=True), Exact(), latent, ranks - 1, 1),
        "noise": (BAMECallback("2:4", schedule=never), Sharded(), noise, ranks - 1, 1),
    }
    for name, (callback, task, change, rank, epochs) in cases.items():

        def look(fit: L.Trainer, _: Any, callback: Any = callback, change: Any = change, rank: int = rank) -> None:
            if fit.global_step == 5 and fit.global_rank == rank:
                with torch.no_grad():
                    change(callback)

        strategy = fsdp(ranks) if isinstance(task, Sharded) else "ddp"
        fit = trainer(callback, Spy(look), max_epochs=epochs, devices=ranks, strategy=strategy)
        message = "trained on"
        try:
            fit.fit(task)
        except InvariantError as error:
            message = str(error)
        torch.save(message, folder / f"{name}-rank{fit.global_rank}.pt")


def refused(folder: Path, ranks: int) -> None:
    """Record what is said of shards that cannot be right."""

    class Uneven(Sharded):
        def __init__(self) -> None:
            super().__init__(model=nn.Sequential(nn.Flatten(), nn.Linear(48, 15), nn.ReLU(), nn.Linear(15, 5)))

    class Columns(Exact):
        def configure_model(self) -> None:
            fully_shard(self.model, mesh=self.device_mesh["data_parallel"], shard_placement_fn=lambda _: Shard(1))

        def __init__(self) -> None:
            layers = (nn.Flatten(), nn.Linear(48, 16, bias=False), nn.ReLU(), nn.Linear(16, 6, bias=False))
            super().__init__(model=nn.Sequential(*layers))

    class Odd(Sharded):
        def __init__(self) -> None:
            super().__init__(model=nn.Sequential(nn.Flatten(), nn.Linear(48, 4), nn.ReLU(), nn.Linear(4, 5)))

    averaging = EMAWeightAveraging(decay=0.9)
    cases: dict[str, tuple[Any, Any, list[Any], tuple[int, int]]] = {
        "uneven": (StaticMask("2:4"), Uneven(), [], (ranks, 1)),
        "columns": (StaticMask("2:4"), Columns(), [], (ranks, 1)),
        "tensor_parallel": (StaticMask("2:4"), Sharded(), [], (1, ranks)),
        "averaging": (StaticMask("2:4"), Sharded(), [averaging], (ranks, 1)),
        "transposable": (TransposableSTE("2:4"), Odd(), [], (ranks, 1)),
        "both_ways": (BAMECallback("1:4", both_ways=True), Odd(), [], (ranks, 1)),
    }
    for name, (callback, task, more, (data, tensor)) in cases.items():
        strategy = ModelParallelStrategy(data, tensor, process_group_backend="gloo")
        fit = trainer(callback, *more, devices=ranks, strategy=strategy)
        message = "trained on"
        try:
            fit.fit(task)
        except ValueError as error:
            message = str(error)
        torch.save(message, folder / f"{name}-rank{fit.global_rank}.pt")


RESUMED = ("bame", "rigl", "sr_ste")


def until(epoch: int) -> Spy:
    return Spy(lambda fit, _: setattr(fit, "should_stop", fit.global_step == 8 * epoch))


def checkpoints(folder: Path, ranks: int) -> None:
    """Train in one go; in two halves, saved in both formats; and the second half of what one process began."""
    for name in RESUMED:
        options = {"devices": ranks, "max_epochs": 4}
        save(train(METHODS[name](), Sharded(), strategy=fsdp(ranks), **options), folder, f"{name}-whole")
        for kind in ("directory", "file"):
            distributed = kind == "directory"
            strategy = fsdp(ranks, save_distributed_checkpoint=distributed)
            first = trainer(METHODS[name](), until(2), min_epochs=1, strategy=strategy, **options)
            first.fit(Sharded())
            first.save_checkpoint(folder / f"{name}-{kind}.ckpt")
        for kind in ("directory", "file", "single"):
            path = folder / f"{name}-{kind}.ckpt"
            record = train(METHODS[name](), Sharded(), path, strategy=fsdp(ranks), **options)
            save(record, folder, f"{name}-{kind}")


def launch(job: Callable[[Path, int], None], folder: Path, ranks: int) -> None:
    """Run a job of some module on some ranks; Lightning starts the others by running the same command again."""
    command = [sys.executable, "-W", "ignore", "-m", job.__module__, job.__name__, str(folder), str(ranks)]
    done = subprocess.run(command, timeout=1200, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]


def main(jobs: dict[str, Any]) -> None:
    """Run the job that the command line names, of those that the module holds which was started."""
    torch.set_num_threads(1)
    jobs[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3]))


if __name__ == "__main__":
    main(globals())
