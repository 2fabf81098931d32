"""Optimizers that keep state in other places, in other forms, or that differentiate gradients, in real training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim import Optimizer

from bame_lightning import SRSTE, BAMECallback, Evidence, RigL, Schedule, StaticMask
from tests.callbacks.registry import METHODS
from tests.training import Spy, Task, blocks_over, trainer

EVERY = Schedule(every=2)


class Chained(Optimizer):
    """Several optimizers as one, as people write it to use Muon and AdamW under automatic optimization."""

    def __init__(self, *links: Optimizer) -> None:
        super().__init__([group for link in links for group in link.param_groups], {})
        self.links = links
        self.param_groups = [group for link in links for group in link.param_groups]

    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure()
        for link in self.links:
            link.step()
        return loss


def hybrid(parameters: Any) -> Chained:
    parameters = list(parameters)
    matrices = [p for p in parameters if p.dim() == 2]
    rest = [p for p in parameters if p.dim() != 2]
    return Chained(torch.optim.SGD(matrices, lr=0.05, momentum=0.9), torch.optim.AdamW(rest, lr=1e-2))


@pytest.mark.parametrize("name", ["bame", "rigl", "static"])
def test_state_in_chained_optimizers_is_zero_where_weights_are_pruned_and_fresh_where_revived(name: str) -> None:
    callback, task = METHODS[name](), Task(optimizer=hybrid)
    seen = {"moments": 0, "stale": 0, "revived": 0, "old": 0}
    before: dict[str, torch.Tensor] = {}

    def look(*_: Any) -> None:
        for sparse in callback.weights:
            for link in task.trainer.optimizers[0].links:
                for value in link.state.get(sparse.weight, {}).values():
                    if value.shape == sparse.weight.shape:
                        seen["moments"] += int(value.count_nonzero())
                        seen["stale"] += int(value[~sparse.kept].count_nonzero())
                        if sparse.name in before:
                            revived = sparse.kept & ~before[sparse.name]
                            seen["revived"] += int(revived.sum())
                            seen["old"] += int(value[revived].count_nonzero())
            before[sparse.name] = sparse.kept.clone()

    trainer(callback, Spy(look), max_epochs=3).fit(task)
    assert callback.steps == 24
    assert seen["moments"] > 0
    assert (seen["revived"] > 0) == (name != "static")
    assert seen["stale"] == seen["old"] == 0


class Slow(torch.optim.SGD):
    """Every five steps the weights go half the way back to a copy of them, as Lookahead's do."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=1e-9)
        self.done = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        self.done += 1
        for group in self.param_groups:
            for p in group["params"]:
                anchor = self.state[p].setdefault("anchor", p.detach().clone())
                if self.done % 5 == 0:
                    anchor.add_(p - anchor, alpha=0.5)
                    p.copy_(anchor)
        return loss


def test_a_copy_of_the_weights_starts_anew_at_a_revived_weight() -> None:
    # Nothing moves at this learning rate, so a revived weight keeps its size until it is pruned again.
    callback = BAMECallback("2:4", schedule=Schedule(0, 1000, every=7), rescale=False, evidence=Evidence(read_every=1))
    before: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    moved = []

    def look(*_: Any) -> None:
        for sparse in callback.weights:
            if sparse.name in before:
                kept, values = before[sparse.name]
                moved.append(float((sparse.values - values)[kept & sparse.kept].abs().max()))
            before[sparse.name] = sparse.kept.clone(), sparse.values.clone()

    trainer(callback, Spy(look), max_epochs=4).fit(Task(optimizer=Slow))
    assert callback.summary()["flips"] > 0
    assert max(moved) < 1e-6


class Summing(Optimizer):
    """Divides by the root of a sum of squares that starts at a constant, as DAdaptAdaGrad and VSGD do: 0 / 0 without it."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.01})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = closure()
        for p in self.param_groups[0]["params"]:
            total = self.state[p].setdefault("total", torch.full_like(p, 1e-6))
            total.addcmul_(p.grad, p.grad)
            p.addcdiv_(p.grad, total.sqrt(), value=-self.param_groups[0]["lr"])
        return loss


@pytest.mark.filterwarnings(
    "ignore:Optimizer Summing is unknown", "ignore:How far Summing moves", "ignore:Checkpoint dir"
)
@pytest.mark.parametrize("name", ["bame", "rigl"])
def test_state_that_starts_at_a_constant_starts_there_again_at_revival_and_after_resuming(
    name: str, tmp_path: Path
) -> None:
    revived = 0

    def run(resumed: Path | None = None) -> dict[str, torch.Tensor]:
        callback, task = METHODS[name](), Task(optimizer=Summing)
        saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        before: dict[str, torch.Tensor] = {}

        def look(*_: Any) -> None:
            nonlocal revived
            for sparse in callback.weights:
                total = task.trainer.optimizers[0].state[sparse.weight]["total"]
                new = sparse.kept & ~before.get(sparse.name, sparse.kept)
                revived += int(new.sum())
                assert (total[new | ~sparse.kept] == torch.tensor(1e-6)).all()
                before[sparse.name] = sparse.kept.clone()

        fit = trainer(callback, Spy(look), saving, max_epochs=4, enable_checkpointing=True).fit
        fit(task, ckpt_path=resumed)
        return task.state_dict()

    whole = run()
    resumed = run(tmp_path / "epoch=1.ckpt")
    assert revived > 0
    for key, value in whole.items():
        assert value.isfinite().all()
        assert torch.equal(value, resumed[key])


class Curved(Optimizer):
    """Differentiates the gradients, as AdaHessian and SophiaH do, to divide by the curvature."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 1e-2})

    def step(self, closure: Any = None) -> Any:
        loss = closure()
        held = [p for p in self.param_groups[0]["params"] if p.grad is not None]
        signs = [torch.where(torch.arange(p.numel()).view_as(p) % 2 == 0, 1.0, -1.0) for p in held]
        products = torch.autograd.grad([p.grad for p in held], held, signs)
        with torch.no_grad():
            for p, sign, product in zip(held, signs, products, strict=True):
                curvature = self.state[p].setdefault("exp_avg_sq", torch.zeros_like(p))
                curvature.lerp_((sign * product).square(), 0.1)
                p.sub_(p.grad / (curvature.sqrt() + 1), alpha=self.param_groups[0]["lr"])
        return loss


class Graph(Task):
    def backward(self, loss: Any, *args: Any, **kwargs: Any) -> None:
        loss.backward(*args, **kwargs, create_graph=True)


class ManualGraph(Task):
    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.optimizers().zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx), create_graph=True)
        self.optimizers().step()


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize("kind", [Graph, ManualGraph])
@pytest.mark.parametrize(
    "make",
    [
        lambda: StaticMask("2:4", verify=True),
        lambda: RigL("2:4", schedule=EVERY, verify=True),
        lambda: BAMECallback("2:4", schedule=EVERY, evidence=Evidence(read_every=2), verify=True),
    ],
)
def test_gradients_that_the_optimizer_differentiates(make: Any, kind: type[Task]) -> None:
    callback, task, over = make(), kind(optimizer=Curved), []
    before = [task.model[i].weight.detach().clone() for i in (2, 4, 6)]
    trainer(callback, Spy(lambda *_: over.extend(blocks_over(task.model[i].weight, 2, 4) for i in (2, 4, 6)))).fit(task)
    assert callback.steps == 16
    assert not any(over)
    for index, old in zip((2, 4, 6), before, strict=True):
        assert not torch.equal(task.model[index].weight[old != 0], old[old != 0])


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize("kind", [Graph, ManualGraph])
def test_straight_through_methods_refuse_them_by_name(kind: type[Task]) -> None:
    with pytest.raises(ValueError, match=r"SRSTE puts dense weights.*Curved.*`create_graph=True`.*BAME"):
        trainer(SRSTE("2:4")).fit(kind(optimizer=Curved))
