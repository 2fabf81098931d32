"""Sparse training without Lightning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from benchmarks.operations import Operations
from torch import Tensor, nn

from bame_lightning import Evidence, OneBatch, Schedule
from bame_lightning.methods.bame import BAME
from bame_lightning.methods.masked import Masked
from bame_lightning.methods.method import Method
from bame_lightning.methods.rigl import DropAndGrow
from bame_lightning.methods.straight_through import StraightThrough, Transposable
from bame_lightning.methods.top_kast import TopKast
from bame_lightning.methods.training import SparseTraining

METHODS: dict[str, Callable[[], Method]] = {
    "static": lambda: Masked(rescale=True),
    "bame": lambda: BAME(Evidence(read_every=4, contenders=0.5, step_size=4.0), Schedule(every=2)),
    "one_batch": lambda: BAME(OneBatch(), Schedule(every=2)),
    "rigl": lambda: DropAndGrow(Schedule(every=3), 0.3),
    "sr_ste": lambda: StraightThrough(2e-4),
    "transposable": lambda: Transposable(2e-4, 3),
    "top_kast": lambda: TopKast(1e-4, 2),
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 4))


def train(model: nn.Module, training: SparseTraining, optimizers: list[Any], steps: int = 24) -> None:
    training.begin(model, optimizers, "2:4", steps=steps)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        inputs, labels = torch.randn(8, 16, generator=generator), torch.randint(4, (8,), generator=generator)
        model.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        for optimizer in optimizers:
            training.before_step(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()


def most_in_a_block(weight: Tensor) -> int:
    return int(weight.detach().reshape(-1, 4).ne(0).sum(-1).max())


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("several", [False, True])
def test_weights_are_sparse_after_every_step(name: str, several: bool) -> None:
    model, training = network(), SparseTraining(METHODS[name]())
    layers = [model[0], model[2]]
    groups = [model[:2].parameters(), model[2:].parameters()] if several else [model.parameters()]
    seen: list[int] = []
    training.on_step = lambda holder: seen.append(max(most_in_a_block(layer.weight) for layer in layers))
    training.run.verify = True
    train(model, training, [torch.optim.AdamW(group, lr=1e-2) for group in groups])
    assert seen == [2] * 24 * len(groups)
    assert training.run.steps == 24 * len(groups)
    assert [sparse.name for sparse in training.run.weights] == ["0.weight", "2.weight"]
    assert most_in_a_block(model[4].weight) == 4
    flips = training.method.summary(dict).get("flips", 0)
    assert (flips > 0) == (name != "static")


def test_a_wrapper_of_an_optimizer_that_is_followed_is_refused_and_one_without_sparse_weights_is_passed_over() -> None:
    class Wrapper:
        def __init__(self, inner: Any) -> None:
            self.param_groups = inner.param_groups

    model, training = network(), SparseTraining(Masked())
    optimizer, head = (torch.optim.SGD(part.parameters(), lr=0.1) for part in (model[:4], model[4]))
    training.begin(model, [optimizer, head], "2:4", steps=2)
    with pytest.raises(ValueError, match=r"Wrapper holds sparse weights.*of SGD are followed.*what `begin` was given"):
        training.before_step(Wrapper(optimizer))
    training.before_step(head)


def test_an_optimizer_that_steps_unannounced_leaves_the_weights_sparse() -> None:
    model, training = network(), SparseTraining(Masked())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    training.begin(model, [optimizer], "2:4", steps=2)
    model(torch.ones(3, 16)).sum().backward()
    optimizer.step()
    assert training.stray
    assert training.run.steps == 0
    assert most_in_a_block(model[0].weight) == 2


def test_it_ends_and_leaves_the_optimizer_as_it_was() -> None:
    model, training = network(), SparseTraining(Masked())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, training, [optimizer], steps=2)
    training.detach()
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_step_pre_hooks


def operations(method: Method, layers: int) -> list[int]:
    """Operations that a method starts in each of 40 steps of a network of linear layers."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(layers)), nn.Linear(32, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    training = SparseTraining(method)
    training.begin(model, [optimizer], "1:16", steps=10**6)
    counts = []
    for _ in range(40):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        with Operations() as alone:
            holder = training.run.holders[0]
            training.method.before_update(holder, whole=True)
            training.method.after_update(holder)
        holder.steps += 1
        training.run.steps += 1
        counts.append(alone.count)
    return counts


def test_a_static_mask_takes_one_pass_over_the_gradients() -> None:
    # A view of each gradient's bits, and one fused product.
    counts = operations(Masked(), layers=3)
    assert counts[1] == counts[17] == 3 + 1
    assert operations(Masked(), layers=4)[1] == 4 + 1


def test_one_more_layer_adds_few_operations_to_a_step_of_bame() -> None:
    def mean(layers: int) -> float:
        counts = operations(BAME(Evidence(), Schedule(0, 10**6, 2)), layers)
        # A whole cycle without the passes that look for weights written by others.
        return sum(counts[20:40]) / 20

    assert mean(4) - mean(3) <= 8


def test_operations_of_a_small_network_are_what_they_are() -> None:
    # Whoever makes them more should know: reading everything, reading contenders, adapting after that.
    counts = operations(BAME(Evidence(), Schedule(0, 10**6, 2)), layers=3)[20:31]
    assert counts == [128, 169, *[34, 160] * 4, 34]
