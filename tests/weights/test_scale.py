from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from bame_lightning.weights.scale import CHANCE, alignment


def test_alignment_by_hand() -> None:
    # Filter 0: w = (3, 4), g = (4, 3): cos = 24 / 25, two kept weights. Filter 1: one kept weight, opposite: cos = -1.
    # Filter 2: orthogonal. Filter 3 has no gradient and does not count.
    weight = torch.tensor([[3.0, 0.0, 4.0], [0.0, 2.0, 0.0], [1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    gradient = torch.tensor([[4.0, 0.0, 3.0], [0.0, -5.0, 0.0], [1.0, -1.0, 0.0], [0.0, 0.0, 0.0]])
    expected = (24 / 25 * math.sqrt(2) + 1 + 0) / 3
    torch.testing.assert_close(alignment(weight, gradient), torch.tensor(expected))


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_nothing_is_known_without_a_finite_gradient(bad: float) -> None:
    gradient = torch.ones(2, 4) * (bad if math.isfinite(bad) else 1.0)
    gradient[0, 0] = bad
    assert not alignment(torch.ones(2, 4), gradient).isfinite()


@given(st.floats(0.01, 100), st.floats(1e-6, 1e6), st.integers(0, 100))
def test_neither_scale_matters_to_it(a: float, b: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight, gradient = torch.randn(2, 5, 7, generator=generator)
    torch.testing.assert_close(alignment(a * weight, b * gradient), alignment(weight, gradient), rtol=1e-3, atol=1e-5)


def normed(norm: Callable[[int], nn.Module]) -> Tensor:
    torch.manual_seed(0)
    layer, images = nn.Conv2d(16, 32, 3), torch.randn(32, 16, 9, 9)
    out = functional.relu(norm(32)(layer(images))).mean((2, 3))
    functional.cross_entropy(nn.Linear(32, 10)(out), torch.arange(32) % 10).backward()
    assert layer.weight.grad is not None
    return alignment(layer.weight.detach(), layer.weight.grad)


def test_a_batch_norm_is_told_from_none() -> None:
    assert normed(nn.BatchNorm2d) < CHANCE / 10
    assert normed(lambda _: nn.Identity()) > 3 * CHANCE
    # In evaluation mode it is an affine map like any other.
    assert normed(lambda channels: nn.BatchNorm2d(channels).eval()) > 3 * CHANCE
