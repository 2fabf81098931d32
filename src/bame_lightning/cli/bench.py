"""`bame-bench`: what a training step costs by each method, measured."""

from __future__ import annotations

import io
import logging
import statistics
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import hydra
import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch.callbacks import LambdaCallback
from omegaconf import DictConfig
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader
from typing_extensions import override

from bame_lightning.callbacks import SRSTE, BAMECallback, StaticMask
from bame_lightning.callbacks.base import SparseCallback
from bame_lightning.cli.conf import conf_dir
from bame_lightning.cli.models import build_model, input_of
from bame_lightning.cli.questions import answer, check_counts, layer_rules
from bame_lightning.schedule import Schedule
from bame_lightning.tasks import Classifier

Fit = Callable[[], tuple[L.LightningModule, list[L.Callback]]]
"""Makes a module and its callbacks, the same in each call."""
CYCLE = 10
"""Steps after which BAME's default has done everything: it reads all blocks at every tenth step, and adapts at every other."""
FOREVER = Schedule(0, 10**6)


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="bench")
def main(cfg: DictConfig) -> None:
    """Measure what the configuration describes, and print it.

    Args:
        cfg: The composed configuration.
    """
    answer("bame-bench", cfg, bench, _print)


def bench(cfg: DictConfig) -> dict[str, Any]:
    """Measure training steps of each method.

    Args:
        cfg: The composed configuration.

    Returns:
        What `json=true` prints.

    Raises:
        ValueError: If the configuration holds a wrong value.
    """
    check_counts(cfg, "batch_size", "cycles")
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    build = instantiate(cfg.model)
    shape, classes = input_of(build, cfg.get("data"))
    batch = random_batch(shape, classes, cfg.batch_size)
    layers = layer_rules(cfg)
    methods: dict[str, Callable[[], list[L.Callback]]] = {
        "dense": list,
        "sr_ste": lambda: [SRSTE(cfg.pattern, layers=layers)],
        "static": lambda: [StaticMask(cfg.pattern, layers=layers)],
        "bame": lambda: [BAMECallback(cfg.pattern, layers=layers, schedule=FOREVER)],
    }

    def fit(callbacks: Callable[[], list[L.Callback]]) -> tuple[L.LightningModule, list[L.Callback]]:
        torch.manual_seed(0)
        return Classifier(build_model(build, shape, classes), instantiate(cfg.optimizer)), callbacks()

    turns = take_turns({name: partial(fit, make) for name, make in methods.items()}, batch, cfg.cycles)
    return {
        "model": HydraConfig.get().runtime.choices["model"],
        "input_shape": list(shape),
        "pattern": str(cfg.pattern),
        "batch_size": cfg.batch_size,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "methods": {name: times.summary(turns["dense"]) for name, times in turns.items()},
    }


def random_batch(shape: tuple[int, ...], classes: int, size: int) -> list[Tensor]:
    """Inputs and labels that mean nothing: images of three dimensions, or sequences of tokens of one."""
    generator = torch.Generator().manual_seed(0)
    if len(shape) == 1:
        return list(torch.randint(classes, (2, size, *shape), generator=generator))
    labels = torch.randint(classes, (size,), generator=generator)
    return [torch.randn(size, *shape, generator=generator), labels]


@dataclass(frozen=True)
class Times:
    """What a method's steps took, and what its callbacks hold.

    Args:
        seconds: Of one step after another, from the start of a cycle.
        logging: Seconds that metrics take, at a step that logs.
        weights: Sparse weights.
        held: Bytes that the callbacks hold in tensors.
        saved: Bytes that they add to a checkpoint.
    """

    seconds: list[float]
    logging: float
    weights: int
    held: int
    saved: int

    def ratios(self, dense: Times) -> list[float]:
        """Time over dense of each step of a cycle: the median over cycles, each step against the dense one beside it."""
        pairs = [mine / other for mine, other in zip(self.seconds, dense.seconds, strict=True)]
        return [statistics.median(pairs[step::CYCLE]) for step in range(CYCLE)]

    def summary(self, dense: Times) -> dict[str, float]:
        """Milliseconds of a step; ratios to dense training of all steps and of each kind of BAME's; bytes a sparse weight."""
        ratios, weights = self.ratios(dense), max(1, self.weights)
        return {
            "median_ms": 1e3 * statistics.median(self.seconds),
            "over_dense": statistics.mean(ratios),
            "reads_all": ratios[0],
            "adapts_all": ratios[1],
            "reads_some": statistics.median(ratios[2::2]),
            "adapts_some": statistics.median(ratios[3::2]),
            "logging_ms": 1e3 * self.logging,
            "held_bytes_a_weight": self.held / weights,
            "saved_bytes_a_weight": self.saved / weights,
        }


def take_turns(fits: dict[str, Fit], batch: list[Tensor], cycles: int) -> dict[str, Times]:
    """Train with several methods at once, a step of each in turn.

    Args:
        fits: What to train, by name.
        batch: Of every step.
        cycles: Cycles of `CYCLE` steps to measure, after one that is not.

    Returns:
        Times by name.

    Raises:
        Exception: What any of them raised.
    """
    turns = [threading.Semaphore(0) for _ in fits]
    runs = [
        _Run(fit, batch, (cycles + 1) * CYCLE, turns[i], turns[(i + 1) % len(turns)])
        for i, fit in enumerate(fits.values())
    ]
    for run in runs:
        run.start()
    turns[0].release()
    for run in runs:
        run.join()
        if run.error:
            raise run.error
    return {name: run.times() for name, run in zip(fits, runs, strict=True)}


class _Run(threading.Thread):
    """A fit that waits for its turn before each step, so that only one of them runs at any time."""

    def __init__(
        self, fit: Fit, batch: list[Tensor], steps: int, mine: threading.Semaphore, following: threading.Semaphore
    ) -> None:
        super().__init__(daemon=True)  # those that wait for one that failed must not keep the process alive
        self.fit, self.batch, self.steps = fit, batch, steps
        self.mine, self.following = mine, following
        self.seconds: list[float] = []
        self.callbacks: list[L.Callback] = []
        self.error: Exception | None = None
        self._began = 0.0

    @override
    def run(self) -> None:
        self.mine.acquire()
        try:
            module, self.callbacks = self.fit()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                L.Trainer(
                    max_steps=self.steps,
                    callbacks=[LambdaCallback(on_train_batch_end=self._next), *self.callbacks],
                    logger=False,
                    enable_checkpointing=False,
                    enable_progress_bar=False,
                    enable_model_summary=False,
                ).fit(module, DataLoader([self.batch] * self.steps, batch_size=None))  # type: ignore[arg-type]
        except Exception as error:
            self.error = error
        self.following.release()

    def _next(self, *_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._began)
        if len(self.seconds) < self.steps:  # what follows the last step is not for others to bear
            self.following.release()
            self.mine.acquire()
        self._began = time.perf_counter()

    def times(self) -> Times:
        """What was measured, once all have finished."""
        sparse = [callback for callback in self.callbacks if isinstance(callback, SparseCallback)]
        held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in _tensors(sparse)}
        began = time.perf_counter()
        for callback in sparse:
            callback.method_statistics()
        metrics = time.perf_counter() - began
        saved = io.BytesIO()
        torch.save([callback.state_dict() for callback in sparse], saved)
        weights = sum(weight.kept.numel() for callback in sparse for weight in callback.weights)
        size = len(saved.getbuffer()) if sparse else 0
        return Times(self.seconds[CYCLE:], metrics, weights, sum(held.values()), size)


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors that an object of this package holds, but for parameters."""
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)
    elif type(value).__module__.startswith("bame_lightning") and hasattr(value, "__dict__"):
        yield from _tensors(vars(value))


def _print(report: dict[str, Any]) -> None:
    console = Console(highlight=False, markup=False)
    console.width = min(console.width, 80)
    shape, methods = "x".join(map(str, report["input_shape"])), report["methods"]
    console.print(
        f"{report['model']}, {shape}, batch {report['batch_size']}, {report['pattern']}, {report['threads']} threads"
    )
    table = Table("", box=box.SIMPLE_HEAD)
    for name in methods:
        table.add_column(name, justify="right", no_wrap=True)
    for title, key in _ROWS.items():
        only_bame = key in ("reads_some", "adapts_some", "reads_all", "adapts_all")
        table.add_row(title, *("" if only_bame and name != "bame" else f"{methods[name][key]:.3g}" for name in methods))
    console.print(table)
    console.print(
        "Medians of steps that methods take in turns in one process; each is compared with the dense step beside it. The mean "
        f"is that of the {CYCLE} steps in which BAME's default does everything."
    )


_ROWS = {
    "a step, ms": "median_ms",
    "a step / dense, mean": "over_dense",
    "  reads some blocks": "reads_some",
    "  reads some, adapts": "adapts_some",
    "  reads all, designates": "reads_all",
    "  reads some, adapts all": "adapts_all",
    "metrics of a logged step, ms": "logging_ms",
    "bytes held, a sparse weight": "held_bytes_a_weight",
    "bytes saved, a sparse weight": "saved_bytes_a_weight",
}


if __name__ == "__main__":
    main()
