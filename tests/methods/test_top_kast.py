"""Top-KAST inside blocks against a literal loop over single weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bame_lightning import NMPattern, TopKAST
from bame_lightning.methods.top_kast import TopKast
from bame_lightning.methods.training import SparseTraining

RATE, MOMENTUM, PENALTY = 0.1, 0.9, 0.05


def largest(values: list[float], count: int) -> set[int]:
    return set(sorted(range(len(values)), key=lambda place: -abs(values[place]))[:count])


def step(latent: list[float], buffer: list[float], gradient: list[float], n: int, c: int) -> None:
    """One update of a block, weight by weight: SGD with momentum for those in B."""
    inside, reached = largest(latent, n), largest(latent, c)
    for place, value in enumerate(latent):
        pulled = 0.0
        if place in reached:
            pulled = gradient[place] + PENALTY * value / (1 if place in inside else n / len(latent))
        buffer[place] = MOMENTUM * buffer[place] + pulled
        if place in reached:
            latent[place] = value - RATE * buffer[place]


@pytest.mark.parametrize(("pattern", "widen", "c"), [("1:4", 2, 2), ("2:4", 1, 2), ("1:8", 4, 4), ("2:4", 9, 4)])
def test_training_is_that_of_a_literal_loop(pattern: str, widen: int, c: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 3, bias=False), nn.Linear(3, 2)).double()
    n, m = NMPattern.parse(pattern).n, NMPattern.parse(pattern).m
    latents = model[0].weight.detach().view(-1, m).tolist()
    buffers = [[0.0] * m for _ in latents]
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)
    training = SparseTraining(TopKast(PENALTY, widen))
    training.begin(model, [optimizer], pattern, steps=30)
    first = [largest(latent, n) for latent in latents]
    for _ in range(30):
        optimizer.zero_grad()
        (
            model(torch.randn(8, 16, dtype=torch.float64)) - torch.randn(8, 2, dtype=torch.float64)
        ).square().mean().backward()
        gradients = model[0].weight.grad.view(-1, m).tolist()
        training.before_step(optimizer)
        optimizer.step()
        for latent, buffer, gradient in zip(latents, buffers, gradients, strict=True):
            step(latent, buffer, gradient, n, c)
        inside = [largest(latent, n) for latent in latents]
        network = [[v if i in kept else 0.0 for i, v in enumerate(x)] for x, kept in zip(latents, inside, strict=True)]
        torch.testing.assert_close(model[0].weight.detach().view(-1, m), torch.tensor(network, dtype=torch.float64))
    assert inside != first


def test_what_is_computed_beside_the_network_is_booked() -> None:
    # Of 16 weights 1 is kept, and 3 of the other 15 get a gradient.
    assert TopKast(0.0, 4).mean_read_share(NMPattern(1, 16), 100) == pytest.approx(3 / 15)
    assert TopKast(0.0, 4).mean_read_share(NMPattern(2, 4), 100) == 1
    assert TopKast(0.0, 4).mean_read_share(NMPattern(4, 4), 100) == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"penalty": -0.1}, "`penalty` must not be negative"), ({"widen": 0}, "`widen` .* at least 1")],
)
def test_wrong_arguments_are_named(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TopKAST("2:4", **wrong)
