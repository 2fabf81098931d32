"""What one GPU says: the cost of methods in large training, sparse tensor cores, and whether all works there.

    python -m benchmarks.gpu                       # all parts, at most 20 minutes, then the tables
    python -m benchmarks.gpu layers smoke          # some of them
    python -m benchmarks.gpu --toy --out FOLDER    # tiny networks, on a CPU, too: does the script run?

Each part writes `gpu_PART.csv`. On a GPU, and unless `--toy`, the tables also go into `docs/performance.md`.
"""

from __future__ import annotations

import argparse
import csv
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader

from bame_lightning import SRSTE, BAMECallback, RigL, Schedule, StaticMask
from bame_lightning.blocks.masks import top_n_mask
from bame_lightning.blocks.pattern import NMPattern
from bame_lightning.blocks.transposable import both_ways_mask
from bame_lightning.compute.choice import PHASES
from bame_lightning.compute.choose import Call, choose
from bame_lightning.compute.operation import Linear
from bame_lightning.tasks.gpt import gpt
from benchmarks.documents import fill

HERE = Path(__file__).parent
DOCUMENT = HERE.parent / "docs" / "performance.md"
CYCLE = 20
"""Steps between two readings of everything, the default."""
FOREVER = Schedule(0, 10**6, 2)
Row = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """How large everything is.

    Args:
        images: Title -> network, side of an image, batch.
        width: Of the GPT; its feed-forward layers are four times as wide.
        depth: Blocks of the GPT.
        length: Tokens of a sample.
        batch: Samples of a batch of the GPT.
        layers: Outputs and inputs of single layers.
        tokens: Rows that they multiply.
        cycles: Cycles of 20 steps that are timed, after one to warm up.
    """

    images: dict[str, tuple[Callable[[], nn.Module], int, int]]
    width: int
    depth: int
    length: int
    batch: int
    layers: list[tuple[int, int]]
    tokens: int
    cycles: int


FULL = Size(
    images={
        "ResNet-50, 224": (torchvision.models.resnet50, 224, 256),
        "ViT-B/16, 224": (torchvision.models.vit_b_16, 224, 256),
        "ResNet-18, 32": (partial(torchvision.models.resnet18, num_classes=10), 32, 512),
    },
    width=2048,
    depth=8,
    length=1024,
    batch=16,
    layers=[(2048, 2048), (6144, 2048), (8192, 2048), (2048, 8192), (768, 768), (3072, 768), (768, 3072)],
    tokens=16384,
    cycles=2,
)
TOY = Size(
    images={"two layers": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 64), nn.Linear(64, 10)), 8, 4)},
    width=64,
    depth=1,
    length=8,
    batch=2,
    layers=[(64, 64)],
    tokens=8,
    cycles=1,
)
METHODS: dict[str, Callable[[str], Any]] = {
    "dense": lambda pattern: None,
    "static": StaticMask,
    "SR-STE": SRSTE,
    "BAME": lambda pattern: BAMECallback(pattern, schedule=FOREVER),
}


class Task(L.LightningModule):
    """Any network that is trained to classify, images or every token."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: Any, index: int) -> Tensor:
        """The loss of a batch."""
        return functional.cross_entropy(self.network(batch[0]).flatten(0, -2).float(), batch[1].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Descent with momentum."""
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class Clock(L.Callback):
    """Times whole cycles of steps after the first one, then counts what another cycle launches on the GPU.

    Args:
        cycles: Cycles to time.
    """

    def __init__(self, cycles: int) -> None:
        self.last = (1 + cycles) * CYCLE
        self.milliseconds = 0.0
        self.launches: float | None = None
        self.peak: float | None = None
        self._profiler: profile | None = None

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Look at the clock where a cycle ends."""
        gpu = trainer.strategy.root_device.type == "cuda"
        if trainer.global_step not in (CYCLE, self.last):
            return
        if gpu:
            torch.cuda.synchronize()
        if trainer.global_step == CYCLE:
            self._began = time.perf_counter()
            return
        self.milliseconds = 1e3 * (time.perf_counter() - self._began) / (self.last - CYCLE)
        if gpu:
            self.peak = torch.cuda.max_memory_allocated() / 2**20
            self._profiler = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
            self._profiler.__enter__()

    def on_train_end(self, *_: Any) -> None:
        """Count the launches of the last cycle."""
        if self._profiler is not None:
            self._profiler.__exit__(None, None, None)
            launched = [e.count for e in self._profiler.key_averages() if "LaunchKernel" in e.key]
            self.launches = sum(launched) / CYCLE


def timed(network: Callable[[], nn.Module], callback: Any, batch: list[Tensor], size: Size, precision: Any) -> Row:
    """Train for some cycles; milliseconds and launches a step, peak memory, and what computed the layers."""
    clock, device = Clock(size.cycles), batch[0].device
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    steps = clock.last + CYCLE
    torch.manual_seed(0)
    running = L.Trainer(
        max_steps=steps,
        callbacks=[callback, clock] if callback else [clock],
        precision=precision,
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    running.fit(Task(network()), DataLoader([batch] * steps, batch_size=None))  # type: ignore[arg-type]
    row = {
        "ms": f"{clock.milliseconds:.3g}",
        "launches": number(clock.launches, ".0f"),
        "peak_mib": number(clock.peak, ".0f"),
    }
    if callback is not None and getattr(callback, "compute", "dense") != "dense":
        chosen = callback.training.execution.choices.values()
        row["sparse_layers"] = sum(not choice.dense for choice in chosen)
    return row


def number(value: float | None, form: str) -> str:
    """A number, or nothing where it was not measured."""
    return "" if value is None else format(value, form)


def overhead(size: Size, device: torch.device) -> Iterator[Row]:
    """What methods add to steps of image networks, in bf16 with large batches."""
    for title, (network, side, batch_size) in size.images.items():
        batch = [torch.randn(batch_size, 3, side, side), torch.randint(10, (batch_size,))]
        moved = [part.to(device) for part in batch]
        dense = 0.0
        for method, make in METHODS.items():
            row = timed(network, make("1:16"), moved, size, "bf16-mixed")
            dense = dense or float(row["ms"])
            yield {
                "network": title,
                "batch": batch_size,
                "method": method,
                **row,
                "over_dense": f"{float(row['ms']) / dense:.2f}",
            }


def language(size: Size, device: torch.device) -> Iterator[Row]:
    """A GPT in bf16, its sparse layers computed densely and by sparse tensor cores."""
    network = partial(gpt, (size.length,), 256, width=size.width, depth=size.depth, heads=size.width // 64)
    batch = [torch.randint(256, (size.batch, size.length), device=device) for _ in range(2)]
    made: list[tuple[str, str, str, Any]] = [("dense", "", "dense", None)]
    for pattern in ("2:4", "1:8"):
        for compute in ("dense", "auto"):
            both = {"both_ways": True, "compute": compute}
            made.append(("static", pattern, compute, StaticMask(pattern, **both)))  # type: ignore[arg-type]
            made.append(("BAME", pattern, compute, BAMECallback(pattern, schedule=FOREVER, **both)))  # type: ignore[arg-type]
    dense = 0.0
    for method, pattern, compute, callback in made:
        row = timed(network, callback, batch, size, "bf16-true")
        dense = dense or float(row["ms"])
        yield {
            "width": size.width,
            "method": method,
            "pattern": pattern,
            "compute": compute,
            **{"sparse_layers": ""},
            **row,
            "over_dense": f"{float(row['ms']) / dense:.2f}",
        }


def layers(size: Size, device: torch.device) -> Iterator[Row]:
    """Single layers by shape: milliseconds of the dense product, and how many times as fast the sparse one is."""
    for outputs, inputs in size.layers:
        for pattern in map(NMPattern.parse, ("2:4", "1:8", "1:16")):
            weight = torch.randn(outputs, inputs, device=device, dtype=torch.bfloat16)
            blocks = weight.view(-1, pattern.m)
            mask = both_ways_mask(top_n_mask(blocks.abs(), pattern.n), blocks, outputs).view(weight.shape)
            found = choose(Linear(), weight, mask, pattern, Call((size.tokens, inputs)), rounds=20)
            row: Row = {"outputs": outputs, "inputs": inputs, "tokens": size.tokens, "pattern": str(pattern)}
            for phase in PHASES[:2]:
                took = found.milliseconds.get(phase, {})
                row[f"{phase}_ms"] = number(took.get("dense"), ".3f")
                fast = took.get("semi_structured")
                row[f"{phase}_times_as_fast"] = number(took["dense"] / fast if fast else None, ".2f")
            yield {**row, "chosen": found.words}


SMOKE: dict[str, Callable[..., Any]] = {
    "static": partial(StaticMask, "2:4", both_ways=True),
    "BAME": partial(BAMECallback, "1:8", schedule=Schedule(every=2), both_ways=True),
    "RigL": partial(RigL, "1:8", schedule=Schedule(every=5), both_ways=True),
    "SR-STE": partial(SRSTE, "2:4"),
}


def smoke(size: Size, device: torch.device) -> Iterator[Row]:
    """Does it work there: a loss scaler, a compiled network, a resumed run, the same bits in two runs."""
    for method, make in SMOKE.items():
        for check, run in (
            ("loss scaler", partial(_trained, precision="16-mixed")),
            ("compiled", partial(_trained, compiled=True)),
            ("sparse products", partial(_trained, precision="bf16-true", compute="auto")),
            ("resumed", _resumed),
            ("two runs", _twice),
        ):
            if check == "sparse products" and method == "SR-STE":
                continue  # its latent weights are dense
            try:
                run(make, device)
                outcome = "holds"
            except Exception as error:
                outcome = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
            yield {"method": method, "check": check, "outcome": outcome}


class Stop(L.Callback):
    """Ends a run after an epoch."""

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Say so."""
        trainer.should_stop = True


def _trained(
    make: Callable[..., Any],
    device: torch.device,
    *,
    precision: Any = "32-true",
    compiled: bool = False,
    resume: Path | None = None,
    half: Path | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """Train a small network and return its weights, in which every sparse one must obey its mask."""
    torch.manual_seed(0)
    network: Any = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10))
    callback, task = make(verify=not compiled, **options), Task(network)
    if compiled:
        task.network = torch.compile(network, backend="inductor" if device.type == "cuda" else "eager")  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(1)
    kind = torch.bfloat16 if precision == "bf16-true" else torch.float32
    batches = [
        [torch.randn(64, 128, generator=generator).to(kind), torch.randint(10, (64,), generator=generator)]
        for _ in range(20)
    ]
    running = L.Trainer(
        max_epochs=2,
        min_epochs=1,
        callbacks=[callback, *([Stop()] if half else [])],
        precision=precision,
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=1,
        deterministic="warn",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    running.fit(task, DataLoader(batches, batch_size=None), ckpt_path=resume)  # type: ignore[arg-type]
    if half:
        running.save_checkpoint(half)
    if not callback.weights or not all(sparse.obeys for sparse in callback.weights):
        raise AssertionError("a pruned weight is not zero after training")
    return {name: value.detach().cpu() for name, value in network.state_dict().items()}


def _twice(make: Callable[..., Any], device: torch.device) -> None:
    _same(_trained(make, device), _trained(make, device))


def _resumed(make: Callable[..., Any], device: torch.device) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "half.ckpt"

        whole = _trained(make, device)
        _trained(make, device, half=path)
        _same(whole, _trained(make, device, resume=path))


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    differ = [name for name in one if not torch.equal(one[name], other[name])]
    if differ:
        raise AssertionError(f"{', '.join(differ)} differ in their bits")


PARTS: dict[str, Callable[[Size, torch.device], Iterator[Row]]] = {
    "smoke": smoke,
    "layers": layers,
    "language": language,
    "overhead": overhead,
}


def measure(parts: list[str], size: Size, device: torch.device, out: Path, minutes: float) -> dict[str, list[Row]]:
    """Run some parts, and write a file for each; what there is no time for is left out, and said so."""
    ends, found = time.monotonic() + 60 * minutes, dict[str, list[Row]]()
    for part in parts:
        rows = found[part] = []
        for row in PARTS[part](size, device):
            rows.append(row)
            print(part, *row.values(), flush=True)
            write(out / f"gpu_{part}.csv", rows)
            if time.monotonic() > ends:
                print(f"{part} ends here: {minutes:g} minutes are over", flush=True)
                return found
    return found


def write(path: Path, rows: list[Row]) -> None:
    """Write rows, whose columns may differ."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def tables(found: dict[str, list[Row]], device: torch.device) -> str:
    """All rows as Markdown."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
    lines = [f"On {name}, torch {torch.__version__}; `python -m benchmarks.gpu`."]
    for part, rows in found.items():
        columns = list(dict.fromkeys(name for row in rows for name in row))
        lines += [
            "",
            f"**{PARTS[part].__doc__}**",
            "",
            f"| {' | '.join(columns)} |",
            "|---|" + "---|" * (len(columns) - 1),
        ]
        lines += [f"| {' | '.join(str(row.get(name, '')) for name in columns)} |" for row in rows]
    return "\n".join(lines)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--toy", action="store_true", help="tiny networks")
    parser.add_argument("--out", type=Path, default=HERE, help="where the files go")
    parser.add_argument("--minutes", type=float, default=20, help="no new row is begun after these")
    args = parser.parse_args()
    if wrong := sorted(set(args.parts) - PARTS.keys()):
        parser.error(f"no part is called {', '.join(wrong)}; there are {', '.join(PARTS)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not args.toy:
        parser.error("torch finds no GPU here; --toy runs tiny networks on the CPU")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    args.out.mkdir(parents=True, exist_ok=True)
    found = measure(args.parts or list(PARTS), TOY if args.toy else FULL, device, args.out, args.minutes)
    if device.type == "cuda" and not args.toy:
        fill(DOCUMENT, "gpu", tables(found, device))


if __name__ == "__main__":
    main()
