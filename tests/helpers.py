"""Weights, patterns and masks for the tests of the core, and one reading of a gradient; expected values are not made here."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from bame_lightning.bame.evidence import Evidence, OneBatch
from bame_lightning.bame.evolving import EvolvingBlocks
from bame_lightning.bame.one_batch import OneBatchBlocks
from bame_lightning.bame.reading import Reading
from bame_lightning.blocks.pattern import NMPattern
from bame_lightning.weights.layers import SparseWeight

WINDOW = 50
"""Steps of the window of mask evolution."""


class Case(NamedTuple):
    """A weight of some layer, and a pattern that fits it."""

    pattern: NMPattern
    weight: Tensor


@st.composite
def patterns(draw: st.DrawFn) -> NMPattern:
    """Any 1 <= N <= M <= 16, the usual ones more often."""
    if draw(st.booleans()):
        return NMPattern(*draw(st.sampled_from([(1, 1), (1, 4), (2, 4), (4, 4), (3, 7), (8, 16), (1, 16)])))
    m = draw(st.integers(1, 16))
    return NMPattern(draw(st.integers(1, m)), m)


@st.composite
def cases(draw: st.DrawFn, pattern: NMPattern | None = None) -> Case:
    """A weight laid out by its own torch module; its values are small integers, so that ties happen and sums are exact."""
    pattern = pattern or draw(patterns())
    inputs, outputs = pattern.m * draw(st.integers(1, 3)), draw(st.integers(1, 4))
    kernel = draw(st.lists(st.integers(1, 3), min_size=3, max_size=3))
    groups = draw(st.integers(1, 3))
    shapes = {
        "linear": nn.Linear(inputs, outputs).weight.shape,
        "in_proj": nn.MultiheadAttention(inputs, 1).in_proj_weight.shape,
        "conv1d": nn.Conv1d(inputs, outputs, kernel[0]).weight.shape,
        "conv2d": nn.Conv2d(inputs, outputs, kernel[:2]).weight.shape,
        "conv3d": nn.Conv3d(inputs, outputs, kernel).weight.shape,
        "grouped": nn.Conv2d(inputs * groups, outputs * groups, kernel[:2], groups=groups).weight.shape,
    }
    kind = draw(st.sampled_from(sorted(shapes)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    weight = torch.randint(-9, 10, shapes[kind], generator=generator).float()
    if weight.dim() == 4 and draw(st.booleans()):
        weight = weight.to(memory_format=torch.channels_last)
    return Case(pattern, weight)


def block_positions(shape: tuple[int, ...], m: int) -> list[list[tuple[int, ...]]]:
    """Indices of the weights of every block: one filter, one kernel position, m consecutive inputs."""
    blocks = []
    for out in range(shape[0]):
        for place in itertools.product(*map(range, shape[2:])):
            blocks.extend([(out, first + i, *place) for i in range(m)] for first in range(0, shape[1], m))
    return blocks


def random_kept(blocks: int, pattern: NMPattern, seed: int = 0) -> Tensor:
    """A mask with exactly N per block, drawn by shuffling; shape (blocks, m)."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(blocks, pattern.m, dtype=torch.bool)
    for row in mask:
        row[torch.randperm(pattern.m, generator=generator)[: pattern.n]] = True
    return mask


def sparse_linear(rows: list[list[float]], kept: list[list[int]], pattern: str) -> SparseWeight:
    """A sparse weight from its rows, and from its mask written as ones and zeros, row by row."""
    weight = nn.Parameter(torch.tensor(rows))
    n, m = map(int, pattern.split(":"))
    return SparseWeight("layer.weight", weight, NMPattern(n, m), torch.tensor(kept) != 0)


def evolving(sparse: SparseWeight, rule: Evidence | OneBatch, freeze_after: int | None) -> Any:
    """The blocks of a single weight."""
    return rule.begin([sparse], freeze_after)


def contend_at(blocks: Any, positions: list[list[int]]) -> None:
    """Let positions of a single weight contend, numbered within it, as many in each row."""
    kept = blocks.weights[0].kept
    chosen = torch.tensor(positions, dtype=torch.int64).view(len(kept), -1)
    blocks.contenders.choose(chosen.flatten() % (kept.numel() // len(kept)), [chosen.shape[1]])


def sgd(blocks: EvolvingBlocks, **kwargs: Any) -> torch.optim.SGD:
    return torch.optim.SGD([blocks.weights[0].weight], **({"lr": 1.0} | kwargs))


def read(blocks: EvolvingBlocks, gradient: Tensor | list[Any], everywhere: bool = True) -> None:
    """Read a gradient of a single weight, and zero it where the weight is pruned."""
    (sparse,) = blocks.weights
    dense = torch.as_tensor(gradient, dtype=sparse.weight.dtype)
    sparse.weight.grad = torch.empty_like(sparse.weight).copy_(dense)
    blocks.read([sparse.weight.grad], everywhere=everywhere, adapts=True)
    sparse.weight.grad.masked_fill_(sparse.pruned, 0)


def reading(blocks: EvolvingBlocks, distance: float = 1.0, everywhere: bool = True) -> Reading:
    """A reading by which evidence moves `distance` of the layer's units along the gradient, in a window of `WINDOW` steps."""
    if isinstance(blocks, OneBatchBlocks):
        return Reading(everywhere, distance)
    # Its steps are in units of 1 / sqrt(2 n ln M).
    return Reading(everywhere, distance * math.sqrt(2 * WINDOW * math.log(max(2, blocks.pattern.m))))


def learn(
    blocks: EvolvingBlocks,
    optimizer: torch.optim.Optimizer,
    gradient: Any,
    distance: float = 1.0,
    everywhere: bool = True,
) -> None:
    read(blocks, gradient, everywhere)
    blocks.accumulate(optimizer, reading(blocks, distance, everywhere), torch.tensor(True), WINDOW)
