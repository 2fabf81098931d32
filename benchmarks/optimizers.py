"""Train under masks with every optimizer of torch and of other libraries that are installed; write docs/optimizers.md.

    python -m benchmarks.optimizers [--only torch,timm] [--results outputs/optimizers.jsonl]

Each by name is in `optimizers.md` beside this file. Each runs in a process of its own, uncompiled, first alone, then under
`BAMECallback`: every step must be counted, every block must obey after every step, and state that holds one value per weight
must rest at one constant where weights are pruned. What was tried already is kept in the results, so that a run that was cut
off goes on; remove the file to begin anew.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import inspect
import json
import logging
import math
import multiprocessing
import warnings
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from queue import Empty
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

from bame_lightning import BAMECallback, Evidence, Schedule
from bame_lightning.weights.weight_state import WeightState

DOCUMENT = Path(__file__).parents[1] / "docs" / "optimizers.md"
LIST = Path(__file__).with_suffix(".md")
LIBRARIES = {
    "torch": "torch.optim",
    "pytorch_optimizer": "pytorch_optimizer",
    "timm": "timm.optim",
    "torchao": "torchao.optim",
    "bitsandbytes": "bitsandbytes.optim",
    "torch_optimizer": "torch_optimizer",
    "torch-optimi": "optimi",
    "dadaptation": "dadaptation",
    "schedulefree": "schedulefree",
    "lion-pytorch": "lion_pytorch",
    "prodigyopt": "prodigyopt",
    "came-pytorch": "came_pytorch",
    "adan-pytorch": "adan_pytorch",
    "kron-torch": "kron_torch",
    "galore-torch": "galore_torch",
    "apollo-torch": "apollo_torch",
    "adam-mini": "adam_mini",
    "adabelief-pytorch": "adabelief_pytorch",
    "muon-optimizer": "muon",
    "heavyball": "heavyball",
}
NEEDED = {"lr": 1e-3, "num_data": 64, "num_iterations": 24}
"""Arguments that some optimizers have no default for."""
PATIENCE = 300
"""Seconds that one optimizer may take."""
OURS = "bame_lightning"


class Small(L.LightningModule):
    """Classify noise. `graph`: gradients keep their graph; `sharp`: the optimizer evaluates the loss twice."""

    def __init__(self, make: Callable[[nn.Module], Optimizer], *, graph: bool, sharp: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, padding=1),
            nn.Flatten(),
            nn.Linear(256, 32),
            nn.ReLU(),
            nn.Linear(32, 32),
            nn.ReLU(),
            nn.Linear(32, 5),
        )
        self.make, self.graph, self.sharp = make, graph, sharp
        self.automatic_optimization = not sharp
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = functional.cross_entropy(self.net(batch[0]), batch[1])
        self.losses.append(float(loss))
        if self.sharp:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)

            def closure() -> Tensor:
                again = functional.cross_entropy(self.net(batch[0]), batch[1])
                self.manual_backward(again)
                return again

            optimizer.step(closure=closure)
        return loss

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        loss.backward(*args, **kwargs, create_graph=self.graph)

    def configure_optimizers(self) -> Optimizer:
        return self.make(self)

    def on_train_epoch_start(self) -> None:
        for optimizer in self.trainer.optimizers:
            if hasattr(optimizer, "train"):
                optimizer.train()  # those without a schedule swap averages in for validation

    def train_dataloader(self) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(1)
        images = torch.randn(64, 3, 4, 4, generator=generator)
        return DataLoader(TensorDataset(images, torch.randint(5, (64,), generator=generator)), batch_size=8)


class Watch(L.Callback):
    """Look at every block after every step, and at what the optimizer keeps."""

    def __init__(self, method: BAMECallback) -> None:
        self.method, self.over, self.stale = method, 0, 0
        self.state: WeightState | None = None
        self.rests: dict[str, float] = {}
        self.values: set[str] = set()
        self.copies: set[str] = set()

    @torch.no_grad()  # some optimizers keep views that only such a look may read
    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        state = self.state = self.state or WeightState(trainer.optimizers[0])
        for sparse in self.method.weights:
            blocks = sparse.weight.detach().movedim(1, -1).reshape(-1, 4)
            self.over += int(((blocks != 0).sum(-1) > 2).sum())
            copies = state.copies(sparse.weight, sparse.name)
            for key, value in state.elementwise(sparse.weight, sparse.name):
                pruned = value[~sparse.kept]
                if pruned.min() == pruned.max() != 0:
                    self.rests[key] = float(pruned.min())
                else:
                    self.stale += int((pruned != 0).sum())
                (self.copies if any(value is copy for copy in copies) else self.values).add(key)


def fit(module: Small, *callbacks: L.Callback, epochs: int) -> None:
    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    L.Trainer(accelerator="cpu", devices=1, max_epochs=epochs, callbacks=list(callbacks), **quiet).fit(module)


def ways(cls: type) -> Iterator[dict[str, Any]]:
    """Ways to use an optimizer, the plain one first: which parameters it takes, and what it needs of gradients."""
    arguments = inspect.signature(cls).parameters
    required = {name for name, argument in arguments.items() if argument.default is inspect.Parameter.empty}

    def made(parameters: Any, **more: Any) -> Optimizer:
        needed = {name: value for name, value in NEEDED.items() if name in required}
        around = {"base_optimizer": torch.optim.SGD, "lr": 0.05, "momentum": 0.9} if sharp else {}
        made: Optimizer = cls(parameters, **(needed | around | more))
        return made

    def wrapped(module: nn.Module) -> Optimizer:
        made: Optimizer = cls(torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9))
        return made

    def muon(module: nn.Module) -> Optimizer:
        matrices = [p for p in module.parameters() if p.dim() >= 2]
        rest = [p for p in module.parameters() if p.dim() < 2]
        return made([{"params": matrices, "use_muon": True}, {"params": rest, "use_muon": False}])

    sharp = "base_optimizer" in arguments
    makers: list[Callable[[nn.Module], Optimizer]] = [
        lambda module: made(module.parameters()),
        lambda module: made(module.parameters(), momentum=0.9),
        wrapped,
        muon,
        lambda module: made([p for p in module.parameters() if p.dim() == 2]),
        lambda module: made(module.named_parameters()),
        lambda module: made(module),
    ]
    for graph in (False, True):
        for make in makers:
            yield {"make": make, "graph": graph, "sharp": sharp and make is not wrapped}


def try_one(cls: type) -> dict[str, Any]:
    """Train alone until a way is found, then under masks."""
    problem = ""
    for way in ways(cls):
        try:
            alone = Small(**way)
            fit(alone, epochs=3)
        except Exception as error:  # whatever it is, it is not ours
            problem = problem or f"{type(error).__name__}: {error}"
        else:
            break
    else:
        return {"result": "not tried", "why": problem}
    method = BAMECallback("2:4", schedule=Schedule(every=2), evidence=Evidence(read_every=2))
    watch, module = Watch(method), Small(**way)
    try:
        fit(module, method, watch, epochs=3)
    except Exception as error:
        refused = isinstance(error, ValueError) and OURS in str(inspect.trace()[-1].filename)
        return {"result": "refused" if refused else "fails", "why": f"{type(error).__name__}: {error}"}
    wrong = {
        "steps not counted": module.trainer.global_step - method.steps,
        "blocks over": watch.over,
        "state that is not zero": watch.stale,
        "not finite": sum(not math.isfinite(loss) for loss in module.losses[-4:]),
    }
    found = [f"{name}: {count}" for name, count in wrong.items() if count]
    loss = sum(module.losses[-8:]) / 8
    if not math.isfinite(sum(alone.losses)) or max(alone.losses) > 100:
        found = [name for name in found if not name.startswith("not finite")]
    elif loss > 10 * max(alone.losses):
        found.append(f"loss {loss:.3g}, alone {sum(alone.losses[-8:]) / 8:.3g}")
    return {
        "result": "fails" if found else "trains",
        "why": "; ".join(found),
        "values": sorted(watch.values),
        "copies": sorted(watch.copies),
        "rests": {key: f"{rest:.3g}" for key, rest in sorted(watch.rests.items())},
        "graph": way["graph"],
    }


def optimizers(module: str) -> dict[str, type]:
    """The optimizers that a library publishes."""
    library = importlib.import_module(module)
    names = getattr(library, "__all__", None) or dir(library)
    found = {name: getattr(library, name) for name in names if inspect.isclass(getattr(library, name, None))}
    inside = {name: cls for name, cls in found.items() if issubclass(cls, Optimizer) and cls is not Optimizer}
    if module != "torch.optim":
        inside = {name: cls for name, cls in inside.items() if not cls.__module__.startswith("torch.")}
    return {name: cls for name, cls in inside.items() if not (name.startswith("_") or "Base" in name)}


def in_a_process(cls: type) -> dict[str, Any]:
    """Try an optimizer where it can break nothing: some patch classes, compile, or never come back."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=lambda: queue.put(try_one(cls)))
    process.start()
    try:
        found: dict[str, Any] = queue.get(timeout=PATIENCE)
    except Empty:
        found = {"result": "not tried", "why": f"no end after {PATIENCE} s"}
    process.kill()
    process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(LIBRARIES))
    parser.add_argument("--results", type=Path, default=Path("outputs/optimizers.jsonl"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.compiler.set_stance("force_eager")  # some compile each step for minutes, to the same numbers
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in args.results.read_text().splitlines()] if args.results.exists() else []
    done = {(row["library"], row["optimizer"]) for row in rows}
    for library in args.only.split(","):
        try:
            found = optimizers(LIBRARIES[library])
        except ImportError as error:
            print(f"{library}: not installed ({error})")
            continue
        for name, cls in found.items():
            if (library, name) not in done:
                version, date = importlib.metadata.version(library), datetime.now(UTC).date().isoformat()
                row = {"library": library, "version": version, "optimizer": name, "date": date}
                rows.append(row | in_a_process(cls))
                print(rows[-1], flush=True)
                with args.results.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    DOCUMENT.write_text(summary(rows))
    LIST.write_text(by_name(rows))


HEAD = """# Optimizers

After this page you know whether your optimizer works with N:M training here. Every optimizer of torch and of many libraries
was tried under `BAMECallback("2:4")`: 24 steps of two convolutions and three linear layers, with masks that adapt after
every second step. [The list](../benchmarks/optimizers.md) names each, with the reason if it does not train.

- **Train**: every step was counted, every block obeyed after every step, and state that holds one value per weight was at
  rest where weights are pruned, so a revived weight starts fresh.
- **Refused**: fit ends with a message, in its first step at the latest.
- **Fail**: not solved.
- **Not tried**: these do not train this network without the callback either.

State in another basis or layout is left alone; a matrix factor or a projector beside it shows that. Other unknown state is
named by a warning or refused.

```
python -m benchmarks.optimizers
```
"""
LIST_HEAD = """# Optimizers by name

Tried on {dates} by `python -m benchmarks.optimizers`; [what the outcomes mean](../docs/optimizers.md). Names in code are
copies of the weights in the state of an optimizer: a copy starts anew at a revived weight. `sum` = 0.1 is state that rests at
a constant other than zero. *Graph*: gradients keep their graph.
"""
KINDS = {"trains": "Train", "refused": "Refused", "fails": "Fail", "not tried": "Not tried"}


def summary(rows: list[dict[str, Any]]) -> str:
    """The page: how many optimizers have which outcome, of torch and of the other libraries."""
    lines = [HEAD, f"| | {' | '.join(KINDS.values()).lower()} |", "|---|---:|---:|---:|---:|"]
    for title, own in (
        ("torch", [row for row in rows if row["library"] == "torch"]),
        ("the others", [row for row in rows if row["library"] != "torch"]),
    ):
        count = [sum(row["result"] == kind for row in own) for kind in KINDS]
        lines.append(f"| {title} | {' | '.join(map(str, count))} |")
    return "\n".join(lines) + "\n"


def by_name(rows: list[dict[str, Any]]) -> str:
    """The list: for each library the optimizers of one outcome and reason in a line."""
    lines = [LIST_HEAD.format(dates=", ".join(sorted({row["date"] for row in rows})))]
    for library, own in _by_library(rows):
        lines.append(f"## {library} {own[0]['version']}\n")
        for kind, title in KINDS.items():
            by_reason: dict[str, list[str]] = {}
            for row in own:
                if row["result"] == kind:
                    by_reason.setdefault(_reason(row), []).append(_name(row))
            lines += [
                f"- **{title}**, {len(names)}: {', '.join(names)}{f' ({reason})' if reason else ''}"
                for reason, names in by_reason.items()
            ]
        lines.append("")
    return "\n".join(lines)


def _by_library(rows: list[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    for library in sorted({row["library"] for row in rows}, key=list(LIBRARIES).index):
        yield (
            library,
            sorted((row for row in rows if row["library"] == library), key=lambda row: row["optimizer"].lower()),
        )


def _name(row: dict[str, Any]) -> str:
    """An optimizer with the copies of weights that it keeps, and the constants at which its state rests."""
    remarks = [f"`{key}`" for key in row.get("copies", ())] + ["*graph*"] * bool(row.get("graph"))
    remarks += [f"`{key}` = {rest}" for key, rest in row.get("rests", {}).items()]
    return " ".join([row["optimizer"], *remarks])


def _reason(row: dict[str, Any], words: int = 9) -> str:
    """Why it does not train: our refusals up to the remedy, the start of other messages.

    The name of the optimizer is left out, so that equal reasons are found.
    """
    text = (
        row["why"]
        .replace(row["optimizer"], "it")
        .replace("`optimizer` it ", "it ")
        .replace("`configure_optimizers` returns it, which ", "it ")
    )
    told = text.replace("|", "/").replace("<", "&lt;").split()
    if row["result"] == "refused":
        return " ".join(told).partition(". ")[0].removeprefix("ValueError: ")
    return " ".join(told[:words]) + (" …" if len(told) > words else "")


if __name__ == "__main__":
    main()
