"""Zero stays zero under every optimizer that is said to leave it so, and it is not said of others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from bame_lightning.weights.fixed_point import KNOWN, keeps_zeros

Make = Callable[[Any], torch.optim.Optimizer]
SETTINGS: dict[str, Make] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, dampening=0.5),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, fused=True),
    "foreach": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, foreach=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.1, weight_decay=0.1, decoupled_weight_decay=True),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.1, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9, weight_decay=0.1, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, weight_decay=0.1, lr_decay=0.1),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=0.1, weight_decay=0.1),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SETTINGS)
def test_zero_is_a_fixed_point(name: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(6, 8, generator=generator) > 0.5
    weight = nn.Parameter(torch.where(kept, torch.randn(6, 8, generator=generator), 0).to(dtype))
    before = weight.detach().clone()
    optimizer = SETTINGS[name]([weight])
    assert keeps_zeros(optimizer)
    for _ in range(40):
        weight.grad = torch.where(kept, torch.randn(6, 8, generator=generator), 0).to(dtype)
        optimizer.step()
        assert not weight[~kept].any()
        for key, value in optimizer.state[weight].items():
            if isinstance(value, torch.Tensor) and value.shape == weight.shape and key != "step_size":
                assert not value[~kept].any(), key
    assert (weight[kept] != before[kept]).any()


def test_every_known_optimizer_is_tried() -> None:
    weight = nn.Parameter(torch.ones(2))
    assert {type(make([weight])) for make in SETTINGS.values()} == KNOWN


def test_it_is_not_assumed_of_optimizers_that_nobody_knows() -> None:
    weight = nn.Parameter(torch.ones(2, 2))

    class Own(torch.optim.SGD):
        pass

    class Wrapper:
        def __init__(self) -> None:
            self.inside = torch.optim.SGD([weight], lr=0.1)
            self.param_groups = self.inside.param_groups

        def step(self) -> None:
            self.inside.step()

    patched = torch.optim.SGD([weight], lr=0.1)
    patched.step = lambda closure=None: weight.detach().add_(1)  # type: ignore[method-assign,assignment]
    for optimizer in (
        Own([weight], lr=0.1),
        torch.optim.ASGD([weight]),
        torch.optim.Adamax([weight]),
        Wrapper(),
        patched,
    ):
        assert not keeps_zeros(optimizer)
    # 0 / (0 + 0)
    assert not keeps_zeros(torch.optim.Adam([weight], eps=0.0))


def test_a_learning_rate_scheduler_makes_no_difference() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    torch.optim.lr_scheduler.StepLR(optimizer, 3)
    assert keeps_zeros(optimizer)
