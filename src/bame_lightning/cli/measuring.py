"""The work of `bame-bench`: let methods train in turns, and print a table of times."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich import box
from rich.console import Console
from torch import Tensor

from bame_lightning.cli.models import build_model, input_of
from bame_lightning.cli.parts import fitted
from bame_lightning.cli.timed_training import CYCLE, Fit, take_turns
from bame_lightning.show.narrow import Table
from bame_lightning.show.numbers import amount
from bame_lightning.tasks import Classifier


def bench(cfg: DictConfig) -> dict[str, Any]:
    """Measure training steps of each method.

    Args:
        cfg: The composed configuration.

    Returns:
        The report that `json=true` prints.

    Raises:
        ValueError: If the configuration holds a wrong value.
    """
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    cfg, _ = fitted(cfg)
    shape, _ = input_of(instantiate(cfg.model), cfg.get("data"))
    turns = take_turns({name: partial(make_fit, cfg, name) for name in map(str, cfg.methods)}, cfg.cycles)
    return {
        "model": HydraConfig.get().runtime.choices["model"],
        "input_shape": list(shape),
        "pattern": str(cfg.pattern),
        "batch_size": cfg.batch_size,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "methods": {
            name: {"adapts": "schedule" in (cfg.methods[name] or {}), **times.summary(turns["dense"])}
            for name, times in turns.items()
        },
    }


def make_fit(cfg: DictConfig, method: str) -> Fit:
    """Make what a method trains: always the same network from the same seed, on the same batch.

    Args:
        cfg: The composed configuration.
        method: Its name among the configuration's `methods`.

    Returns:
        Module, callbacks and batch.
    """
    build = instantiate(cfg.model)
    shape, classes = input_of(build, cfg.get("data"))
    callback = instantiate(cfg.methods[method], _convert_="all")
    torch.manual_seed(0)
    task = Classifier(build_model(build, shape, classes), instantiate(cfg.optimizer))
    return Fit(task, [callback] if callback else [], random_batch(shape, classes, cfg.batch_size))


def random_batch(shape: tuple[int, ...], classes: int, size: int) -> list[Tensor]:
    """Draw random inputs and labels: images for a shape of three numbers, sequences of tokens for one number."""
    generator = torch.Generator().manual_seed(0)
    if len(shape) == 1:
        return list(torch.randint(classes, (2, size, *shape), generator=generator))
    labels = torch.randint(classes, (size,), generator=generator)
    return [torch.randn(size, *shape, generator=generator), labels]


def show(report: dict[str, Any]) -> None:
    """Print the result of `bench` for people, at most 80 columns wide."""
    console = Console(highlight=False, markup=False)
    console.width = min(console.width, 80)
    shape, methods = "x".join(map(str, report["input_shape"])), report["methods"]
    console.print(
        f"{report['model']}, {shape}, batch {report['batch_size']}, {report['pattern']}, {amount(report['threads'], 'thread')}"
    )
    table = Table("", box=box.SIMPLE_HEAD)
    for name in methods:
        table.add_column(name, justify="right", no_wrap=True)
    for title, key in _ROWS.items():
        of_cycle = key in ("reads_some", "adapts_some", "reads_all", "adapts_all")
        table.add_row(
            title, *(_shown(None if of_cycle and not found["adapts"] else found[key]) for found in methods.values())
        )
    console.print(table)
    console.print(
        "Medians over steps. Methods take turns, and each step is compared with the dense step beside it. The mean is over "
        f"{CYCLE} steps, in which BAME's default does everything once."
    )


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


_ROWS = {
    "a step, ms": "median_ms",
    "a step / dense, mean": "over_dense",
    "  reads contenders": "reads_some",
    "  and adapts": "adapts_some",
    "  reads everything": "reads_all",
    "  adapts after that": "adapts_all",
    "metrics of a logged step, ms": "logging_ms",
    "peak of memory, MiB": "peak_mib",
    "bytes held, a sparse weight": "held_bytes_a_weight",
    "bytes saved, a sparse weight": "saved_bytes_a_weight",
}
