"""Training runs with random settings, every promise checked at every step by plain loops over blocks."""

from __future__ import annotations

import tempfile
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from hypothesis import strategies as st
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.amp import GradScaler

from bame_lightning import SRSTE, BAMECallback, Evidence, OneBatch, RigL, Schedule, StaticMask
from tests.training import Task, trainer

METHODS = ("bame", "bame_one_batch", "rigl", "static", "sr_ste")
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=1e-2),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-1),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-2),
}
PRECISIONS = ("32-true", "64-true", "bf16-true", "bf16-mixed", "fp16 with a scaler")
EPOCHS, BATCHES = 5, 8


@dataclass(frozen=True)
class Setting:
    """What a run is made of."""

    method: str
    n: int
    m: int
    network: str
    optimizer: str
    precision: str
    accumulate: int
    clip: tuple[str, float] | None
    schedule: Schedule
    evidence: Evidence
    share: float
    freeze_after: int | None
    init: str
    rescale: bool
    poisoned: int | None
    cut: int | None

    def callback(self) -> Any:
        pattern = f"{self.n}:{self.m}"
        start: dict[str, Any] = {"init": self.init, "rescale": self.rescale}
        if self.method == "sr_ste":
            return SRSTE(pattern, decay=self.share)
        if self.method == "static":
            return StaticMask(pattern, **start)
        if self.method == "rigl":
            return RigL(pattern, schedule=self.schedule, share=self.share, **start)
        evidence = self.evidence if self.method == "bame" else OneBatch(self.share)
        return BAMECallback(pattern, schedule=self.schedule, evidence=evidence, freeze_after=self.freeze_after, **start)

    def model(self) -> nn.Module:
        m = self.m
        if self.network == "linear":
            layers = [nn.Flatten(), nn.Linear(48, 2 * m), nn.ReLU(), nn.Linear(2 * m, 3 * m), nn.ReLU()]
            return nn.Sequential(*layers, nn.Linear(3 * m, m), nn.Linear(m, 5))
        norm = nn.BatchNorm2d(2 * m) if self.network == "batch norm" else nn.Identity()
        stem = [nn.Conv2d(3, 2 * m, 3, padding=1), nn.ReLU(), nn.Conv2d(2 * m, 2 * m, 3, groups=2), norm, nn.ReLU()]
        if self.network == "channels last":
            stem = [module.to(memory_format=torch.channels_last) for module in stem]
        return nn.Sequential(*stem, nn.Flatten(), nn.Linear(8 * m, m), nn.ReLU(), nn.Linear(m, 5))


@st.composite
def all_settings(draw: st.DrawFn) -> Setting:
    n, m = draw(st.sampled_from([(1, 2), (1, 4), (2, 4), (3, 4), (1, 8), (3, 8), (4, 8), (1, 16), (4, 4)]))
    start = draw(st.integers(0, 6))
    accumulate = draw(st.sampled_from([1, 1, 3, 4]))
    return Setting(
        method=draw(st.sampled_from([*METHODS, "bame", "bame"])),
        n=n,
        m=m,
        network=draw(st.sampled_from(["linear", "convolutions", "batch norm", "channels last"])),
        optimizer=draw(st.sampled_from(sorted(OPTIMIZERS))),
        precision=draw(st.sampled_from(PRECISIONS)),
        accumulate=accumulate,
        clip=draw(st.sampled_from([None, None, ("norm", 0.05), ("value", 0.01)])),
        schedule=Schedule(start, start + draw(st.integers(1, 30)), draw(st.integers(1, 4))),
        evidence=Evidence(
            read_every=draw(st.integers(1, 9)),
            contenders=draw(st.sampled_from([0.01, 0.1, 0.5, 1.0])),
            step_size=draw(st.sampled_from([0.5, 1.0, 5.0])),
            momentum=draw(st.sampled_from([0.0, 0.9])),
            init=draw(st.sampled_from(["zero", "weights"])),
            margin=draw(st.sampled_from([0.0, 0.2, 1.0])),
            one_per_row=draw(st.booleans()),
        ),
        share=draw(st.sampled_from([0.05, 0.3, 1.0])),
        freeze_after=draw(st.sampled_from([None, None, 0, 2])),
        init=draw(st.sampled_from(["magnitude", "random"])),
        rescale=draw(st.booleans()),
        poisoned=draw(st.none() | st.integers(0, 12)),
        cut=draw(st.none() | st.integers(1, EPOCHS - 1)),
    )


def crowded(values: Tensor, n: int, m: int) -> int:
    """Blocks with more than n values that are not zero: one filter, one kernel position, m consecutive inputs."""
    rows = values.detach().double().movedim(1, -1).reshape(-1, values.shape[1]).numpy()
    return sum(int(np.count_nonzero(row[i : i + m])) > n for row in rows for i in range(0, len(row), m))


@dataclass
class Witness(L.Callback):
    """Looks at a run from outside, and remembers what masks did."""

    setting: Setting
    callback: Any
    steps: int = 0
    flips: int = 0
    batches: int = 0
    before: list[Tensor] = field(default_factory=list)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.before = [sparse.kept.clone() for sparse in self.callback.weights]

    def see_clipped(self, optimizer: torch.optim.Optimizer) -> None:
        """What clipping has left and the optimizer is about to see."""
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not all(g.isfinite().all() for g in gradients):
            # The scaler skips this step. Clipping has multiplied all gradients, zeros too, by a norm that is not a number.
            assert self.setting.precision == "fp16 with a scaler"
            return
        if self.setting.clip:
            kind, most = self.setting.clip
            seen = torch.cat([g.flatten().double() for g in gradients])
            assert (seen.norm() if kind == "norm" else seen.abs().max()) <= most * 1.05
        if self.setting.method != "sr_ste":
            for sparse in self.callback.weights:
                assert sparse.weight.grad is None or not crowded(sparse.weight.grad, self.setting.n, self.setting.m)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        n, m = self.setting.n, self.setting.m
        for sparse, before in zip(self.callback.weights, self.before, strict=True):
            assert not crowded(sparse.weight, n, m)
            kept = sparse.kept.movedim(1, -1).reshape(-1, m).sum(-1)
            assert (kept == n).all()
            assert not sparse.weight.detach()[~sparse.kept].count_nonzero()
            if self.setting.method != "sr_ste":
                for state in trainer.optimizers[0].state.get(sparse.weight, {}).values():
                    if isinstance(state, Tensor) and state.shape == sparse.weight.shape:
                        assert not crowded(state, n, m)
            self.flips += int((sparse.kept != before).sum())
            before.copy_(sparse.kept)
        self.steps, self.batches = self.callback.steps, self.batches + 1


class Poisoned(Task):
    """One gradient of a pruned weight is not a number: what the optimizer sees stays finite."""

    at: int | None = None
    witness: Witness

    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any, gradient_clip_algorithm: Any) -> None:
        # A hook before the optimizer's step would come too early: Lightning computes gradients inside it.
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        self.witness.see_clipped(optimizer)

    def on_after_backward(self) -> None:
        if self.at is not None and self.trainer.global_step == self.at:
            weight = next(m.weight for m in self.model if isinstance(m, nn.Linear))
            pruned = (weight == 0).nonzero()
            if len(pruned):
                weight.grad[tuple(pruned[0])] = float("nan")


def fit(setting: Setting, folder: Path, *, stop: int | None, resume: Path | None) -> tuple[Poisoned, Any, Witness]:
    torch.manual_seed(0)
    # Lightning restores weights before it makes them double, and would round them to single precision on the way.
    model = setting.model().double() if setting.precision == "64-true" else setting.model()
    task = Poisoned(model, OPTIMIZERS[setting.optimizer])
    if setting.method in ("bame", "rigl", "static") and setting.precision != "fp16 with a scaler":
        task.at = setting.poisoned
    callback = setting.callback()
    witness = task.witness = Witness(setting, callback)
    options: dict[str, Any] = {"max_epochs": EPOCHS, "accumulate_grad_batches": setting.accumulate}
    if setting.precision == "fp16 with a scaler":
        scaler = GradScaler("cpu", init_scale=2.0**24, growth_interval=5)
        options["plugins"] = [MixedPrecision("16-mixed", "cpu", scaler=scaler)]
    else:
        options["precision"] = setting.precision
    if setting.clip:
        options |= {"gradient_clip_val": setting.clip[1], "gradient_clip_algorithm": setting.clip[0]}

    class Stop(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
            trainer.should_stop = stop == trainer.current_epoch + 1

    fitted = trainer(callback, witness, Stop(), **options)
    fitted.fit(task, ckpt_path=resume, weights_only=False)
    if stop:
        fitted.save_checkpoint(folder / "cut.ckpt")
    return task, callback, witness


def run(setting: Setting) -> Counter[str]:
    """Train as a setting says; interrupted and resumed it must end in the same bits.

    Returns:
        Steps, batches, mask positions flipped, runs that were interrupted.
    """
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(name)
        task, callback, witness = fit(setting, folder, stop=None, resume=None)
        counted = callback.summary().get("flips", 0)
        assert counted == witness.flips, "flips are counted wrongly"
        if setting.cut:
            fit(setting, folder, stop=setting.cut, resume=None)
            again, other, _ = fit(setting, folder, stop=None, resume=folder / "cut.ckpt")
            ours, theirs = ([*t.parameters(), *t.buffers()] for t in (task, again))
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), "resuming changed the weights"
            masks = zip(callback.weights, other.weights, strict=True)
            assert all(torch.equal(a.kept, b.kept) for a, b in masks), "resuming changed the masks"
        return Counter(
            cases=1, steps=witness.steps, batches=witness.batches, flips=witness.flips, resumed=bool(setting.cut)
        )
