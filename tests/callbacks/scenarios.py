"""The ways in which people train, as one table of tasks and Trainer arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping, GradientAccumulationScheduler
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn import functional

from tests.training import Task, tiny_model

LAYERS = ("model.2.weight", "model.4.weight", "model.6.weight")
"""The sparse weights of `tiny_model`."""
HARD = 2.0**40
"""A loss scale that overflows float16 in the first steps."""


@dataclass(frozen=True)
class Scenario:
    """One way to train.

    Args:
        task: Makes the LightningModule.
        trainer: Makes the Trainer's arguments.
        callbacks: Makes callbacks that train along.
        sparse: Names of the weights that must become sparse.
        steps: Optimizer steps that the sparse weights' optimizer takes; None if a loss scaler decides.
        clip: How gradients are clipped: by "norm" or by "value", to 0.05.
        several_evaluations: Whether the optimizer evaluates the loss several times in a step.
        warns: Beginnings of the warnings that others give.
    """

    task: Callable[[], Any] = Task
    trainer: Callable[[], dict[str, Any]] = dict
    callbacks: Callable[[], list[L.Callback]] = list
    sparse: tuple[str, ...] = LAYERS
    steps: int | None = 16
    clip: str | None = None
    several_evaluations: bool = False
    warns: tuple[str, ...] = ()


class Sign(torch.optim.Optimizer):
    """An optimizer that torch does not have: steps by the sign of a running mean, as Lion does."""

    def __init__(self, parameters: Any, lr: float = 1e-2) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure() if closure else None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    mean = self.state[p].setdefault("running_mean", torch.zeros_like(p))
                    mean.lerp_(p.grad, 0.1)
                    p.sub_(mean.sign(), alpha=group["lr"])
        return loss


class SAM(torch.optim.Optimizer):
    """Sharpness-aware: steps along the gradient at weights that a first gradient has moved uphill."""

    def __init__(self, parameters: Any, lr: float = 0.1) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any) -> Any:
        with torch.enable_grad():
            closure()
        held = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in held]).norm() + 1e-12
        uphill = [0.05 * p.grad / norm for p in held]
        for p, by in zip(held, uphill, strict=True):
            p.add_(by)
        with torch.enable_grad():
            loss = closure()
        for p, by in zip(held, uphill, strict=True):
            p.sub_(by).sub_(p.grad, alpha=self.param_groups[0]["lr"])
        return loss


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda p, **k: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2, nesterov=True, **k),
    "Adam": lambda p, **k: torch.optim.Adam(p, lr=1e-2, weight_decay=1e-2, **k),
    "AdamW": lambda p, **k: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, amsgrad=True, **k),
    "RMSprop": lambda p, **k: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True, **k),
    "Adagrad": lambda p, **k: torch.optim.Adagrad(p, lr=3e-2, weight_decay=1e-2, **k),
    "NAdam": lambda p, **k: torch.optim.NAdam(p, lr=1e-2, weight_decay=1e-2, **k),
}
FUSED = ("SGD", "Adam", "AdamW", "Adagrad")


class Manual(Task):
    """Manual optimization; `update` does what a subclass tests."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False

    def loss(self, batch: Sequence[Tensor]) -> Tensor:
        return functional.cross_entropy(self.model(batch[0]), batch[1])

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        self.update(self.optimizers(), batch, batch_idx)

    def update(self, optimizer: Any, batch: Sequence[Tensor], batch_idx: int) -> None:
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


class ManualClipped(Manual):
    def update(self, optimizer: Any, batch: Sequence[Tensor], batch_idx: int) -> None:
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        self.clip_gradients(optimizer, 0.05, "norm")
        optimizer.step()


class ManualHalves(Manual):
    """Two backward passes in a step, each of half the batch."""

    def update(self, optimizer: Any, batch: Sequence[Tensor], batch_idx: int) -> None:
        optimizer.zero_grad()
        for half in zip(*(part.chunk(2) for part in batch), strict=True):
            self.manual_backward(self.loss(half) / 2)
        optimizer.step()


class ManualShared(Manual):
    """Two backward passes through one forward pass."""

    def update(self, optimizer: Any, batch: Sequence[Tensor], batch_idx: int) -> None:
        optimizer.zero_grad()
        logits = self.model(batch[0])
        self.manual_backward(functional.cross_entropy(logits, batch[1]), retain_graph=True)
        self.manual_backward(logits.square().mean())
        optimizer.step()


class ManualAccumulated(Manual):
    def update(self, optimizer: Any, batch: Sequence[Tensor], batch_idx: int) -> None:
        self.manual_backward(self.loss(batch) / 2)
        if batch_idx % 2:
            optimizer.step()
            optimizer.zero_grad()


class ManualClosure(Manual):
    def update(self, optimizer: Any, batch: Sequence[Tensor], batch_idx: int) -> None:
        def closure() -> None:
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))

        optimizer.step(closure=closure)


class ManualTwice(Manual):
    """Two steps in a batch."""

    def update(self, optimizer: Any, batch: Sequence[Tensor], batch_idx: int) -> None:
        for _ in range(2):
            super().update(optimizer, batch, batch_idx)


class ManualNoisy(Manual):
    """Writes to gradients itself, as private training does."""

    def update(self, optimizer: Any, batch: Sequence[Tensor], batch_idx: int) -> None:
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        generator = torch.Generator().manual_seed(self.global_step)
        for p in self.parameters():
            p.grad.add_(torch.randn(p.shape, generator=generator), alpha=1e-3)
        optimizer.step()


class TwoOptimizers(Manual):
    """One optimizer for the sparse weights, one for all others; the latter's loss has a gradient for all."""

    def configure_optimizers(self) -> Any:
        body = [self.model[i].weight for i in (2, 4, 6)]
        others = [p for p in self.parameters() if not any(p is weight for weight in body)]
        return torch.optim.AdamW(body, lr=1e-2), torch.optim.SGD(others, lr=0.1)

    def update(self, optimizer: Any, batch: Sequence[Tensor], batch_idx: int) -> None:
        body, others = optimizer
        others.zero_grad()
        self.manual_backward(self.loss(batch))
        others.step()
        with body.toggle_model():
            body.zero_grad()
            self.manual_backward(self.loss(batch))
            body.step()


class Groups(Task):
    """Weight decay for weights only, another learning rate for the first layers."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        early, late = self.model[:4], self.model[4:]
        weights = {"params": [p for p in late.parameters() if p.dim() > 1], "weight_decay": 0.1}
        biases = {"params": [p for p in late.parameters() if p.dim() == 1], "weight_decay": 0.0}
        return torch.optim.AdamW([{"params": early.parameters(), "lr": 2e-2}, weights, biases], lr=1e-2)


class Frozen(Task):
    """A frozen layer, which stays dense, and frozen biases."""

    def __init__(self) -> None:
        super().__init__()
        self.model[4].weight.requires_grad_(False)
        self.model[6].bias.requires_grad_(False)


class Skipping(Task):
    """A layer that every other batch leaves out, and batches that are left out altogether."""

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Any:
        if batch_idx == 5:
            return None
        layers = [layer for i, layer in enumerate(self.model) if not (i == 4 and batch_idx % 2)]
        hidden = batch[0]
        for layer in layers:
            hidden = layer(hidden)
        return functional.cross_entropy(hidden, batch[1])


class Scheduled(Task):
    """A learning rate that follows a schedule."""

    kind = "step"

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        schedulers: dict[str, Callable[[], Any]] = {
            "step": lambda: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.3, total_steps=16),
            "epoch": lambda: torch.optim.lr_scheduler.StepLR(optimizer, 1),
            "plateau": lambda: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0),
        }
        interval = "step" if self.kind == "step" else "epoch"
        config = {"scheduler": schedulers[self.kind](), "interval": interval, "monitor": "train/loss"}
        return {"optimizer": optimizer, "lr_scheduler": config}


def scheduled(kind: str) -> Task:
    task = Scheduled()
    task.kind = kind
    return task


class Attention(nn.Module):
    """nn.MultiheadAttention, whose packed projections are no module's `weight`."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.hidden, self.head = nn.Linear(48, 16), nn.Linear(16, 5)

    def forward(self, images: Tensor) -> Tensor:
        tokens = images.reshape(-1, 6, 8)
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return self.head(self.hidden(tokens.flatten(1)).relu())


class Tied(nn.Module):
    """Two layers with one weight, and one of them used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(48, 48), nn.Linear(48, 48), nn.Linear(48, 5)
        self.two.weight = self.one.weight

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.one(images.flatten(1)).relu()
        return self.head(self.one(self.two(hidden).relu()))


class MyConv(nn.Conv2d):
    """A user's own convolution."""


class MyLinear(nn.Linear):
    """A user's own linear layer, which computes in its own way."""

    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight.T + self.bias


class Configured(Task):
    """Makes its model in `configure_model`."""

    def __init__(self) -> None:
        super().__init__(nn.Identity())
        self.model = None

    def configure_model(self) -> None:
        if self.model is None:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                self.model = tiny_model()


def scaled(**kwargs: Any) -> dict[str, Any]:
    """A real float16 run: the first steps overflow, and the scaler skips them."""
    scaler = GradScaler("cpu", init_scale=HARD, growth_interval=1000)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=scaler)], "max_epochs": 6, **kwargs}


SCENARIOS: dict[str, Scenario] = {
    "float32": Scenario(trainer=lambda: {"precision": "32-true"}),
    "bf16-mixed": Scenario(trainer=lambda: {"precision": "bf16-mixed"}),
    "bf16-true": Scenario(trainer=lambda: {"precision": "bf16-true"}),
    "64-true": Scenario(trainer=lambda: {"precision": "64-true"}),
    "float16 with a scaler": Scenario(trainer=scaled, steps=None),
    "float16, clipped": Scenario(trainer=lambda: scaled(gradient_clip_val=0.05), steps=None, clip="norm"),
    "float16, accumulated": Scenario(trainer=lambda: scaled(accumulate_grad_batches=2, max_epochs=10), steps=None),
    "accumulated": Scenario(trainer=lambda: {"accumulate_grad_batches": 4, "max_epochs": 8}),
    "accumulation changes": Scenario(
        trainer=lambda: {"max_epochs": 4}, callbacks=lambda: [GradientAccumulationScheduler({0: 1, 2: 4})], steps=20
    ),
    "clipped by norm": Scenario(trainer=lambda: {"gradient_clip_val": 0.05}, clip="norm"),
    "clipped by value": Scenario(
        trainer=lambda: {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"}, clip="value"
    ),
    "clipped, accumulated": Scenario(
        trainer=lambda: {"gradient_clip_val": 0.05, "accumulate_grad_batches": 2, "max_epochs": 4}, clip="norm"
    ),
    "manual": Scenario(Manual),
    "manual, clipped": Scenario(ManualClipped, clip="norm"),
    "manual, two backward passes": Scenario(ManualHalves),
    "manual, one forward pass": Scenario(ManualShared),
    "manual, accumulated": Scenario(ManualAccumulated, lambda: {"max_epochs": 4}),
    "manual, closure": Scenario(ManualClosure),
    "manual, two steps": Scenario(ManualTwice, steps=32),
    "manual, noisy": Scenario(ManualNoisy),
    "manual, bf16-mixed": Scenario(ManualHalves, lambda: {"precision": "bf16-mixed"}),
    "two optimizers": Scenario(TwoOptimizers),
    "parameter groups": Scenario(Groups),
    "frozen parameters": Scenario(Frozen, sparse=("model.2.weight", "model.6.weight")),
    "gradients missing": Scenario(
        Skipping, lambda: {"max_epochs": 3}, steps=24, warns=("`training_step` returned `None`",)
    ),
    "own optimizer": Scenario(
        lambda: Task(optimizer=Sign), warns=("Optimizer Sign is unknown", "How far Sign moves a weight is not known")
    ),
    "sharpness-aware": Scenario(
        lambda: Task(optimizer=SAM), several_evaluations=True, warns=("How far SAM moves a weight is not known",)
    ),
    "schedule of steps": Scenario(lambda: scheduled("step")),
    "schedule of epochs": Scenario(lambda: scheduled("epoch")),
    "schedule of plateaus": Scenario(lambda: scheduled("plateau")),
    "model compiled": Scenario(lambda: Task(torch.compile(tiny_model(), backend="eager"))),
    "module compiled": Scenario(
        lambda: torch.compile(Task(), backend="eager"), warns=("The .grad attribute of a Tensor that is not a leaf",)
    ),
    "early stopping": Scenario(
        trainer=lambda: {"max_epochs": 9},
        callbacks=lambda: [EarlyStopping("train/loss", patience=1, stopping_threshold=100.0)],
        steps=8,
    ),
    "fast_dev_run": Scenario(trainer=lambda: {"fast_dev_run": 12}, steps=8),
    "limit_train_batches": Scenario(trainer=lambda: {"limit_train_batches": 0.5, "max_epochs": 4}),
    "max_steps": Scenario(trainer=lambda: {"max_steps": 12, "max_epochs": -1}, steps=12),
    "attention": Scenario(
        lambda: Task(Attention()),
        sparse=("model.attention.in_proj_weight", "model.attention.out_proj.weight", "model.hidden.weight"),
    ),
    "tied weights, used twice": Scenario(lambda: Task(Tied()), sparse=("model.one.weight",)),
    "subclassed layers": Scenario(
        lambda: Task(nn.Sequential(MyConv(3, 8, 1), MyConv(8, 8, 1), nn.Flatten(), MyLinear(128, 16), MyLinear(16, 5))),
        sparse=("model.1.weight", "model.3.weight"),
    ),
    "configure_model": Scenario(Configured),
}
for _name, _make in OPTIMIZERS.items():
    for _kind in ("for-loop", "foreach", *(["fused"] if _name in FUSED else [])):
        _how = {"foreach": _kind == "foreach"} | ({"fused": True} if _kind == "fused" else {})
        SCENARIOS[f"{_name}, {_kind}"] = Scenario(
            lambda make=_make, how=_how: Task(optimizer=lambda p: make(p, **how)), lambda: {"max_epochs": 3}, steps=24
        )
