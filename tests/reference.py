"""BAME written out as its specification reads, in plain loops over blocks: the second derivation that tests compare with.

SGD with momentum and weight decay on linear layers only. Nothing of the package is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Block:
    """A block of M consecutive weights of one row: slots of the weight matrix, and what is known of them."""

    row: int
    columns: list[int]
    kept: list[bool]
    evidence: list[float]
    mean_gradient: list[float]
    pruned_earlier: set[int] = field(default_factory=set)
    oscillations: int = 0


@dataclass
class Layer:
    """The blocks of a weight, and what is measured in all of them together."""

    blocks: list[Block]
    noise: float | None = None
    unit: float = 0.0
    # Of every row the pruned slots that are read in each step: a block and a slot of it.
    contenders: dict[int, list[tuple[Block, int]]] = field(default_factory=dict)


@dataclass
class Settings:
    """The constants of the method."""

    n: int
    m: int
    start: int
    stop: int
    every: int
    read_every: int
    contenders: float
    step_size: float
    averaging: float
    margin: float
    one_per_row: bool
    freeze_after: int | None
    lr: float
    momentum: float
    weight_decay: float


def split(weight: Tensor, s: Settings) -> list[Block]:
    blocks = []
    for row in range(weight.shape[0]):
        for first in range(0, weight.shape[1], s.m):
            columns = list(range(first, first + s.m))
            strongest = sorted(columns, key=lambda c: -abs(weight[row, c].item()))[: s.n]
            evidence = [0.0 if c in strongest else weight[row, c].item() for c in columns]
            blocks.append(Block(row, columns, [c in strongest for c in columns], evidence, [0.0] * s.m))
    return blocks


def train(
    weights: Sequence[Tensor], loss_of: Callable[[int], Tensor], steps: int, s: Settings
) -> tuple[list[Layer], int]:
    """Train leaf tensors in place; returns what evolved of each weight, and how many swaps were made."""
    layers = [Layer(split(weight, s)) for weight in weights]
    momenta = [torch.zeros_like(weight) for weight in weights]
    swaps = 0
    for weight, layer in zip(weights, layers, strict=True):
        clear(weight.data, layer.blocks)
    for t in range(steps):
        for weight in weights:
            weight.grad = None
        loss_of(t).backward()
        dense = [weight.grad.clone() for weight in weights]
        for weight, layer, momentum in zip(weights, layers, momenta, strict=True):
            clear(weight.grad, layer.blocks)
            momentum.mul_(s.momentum).add_(weight.grad + s.weight_decay * weight.data)
            weight.data -= s.lr * momentum
            clear(weight.data, layer.blocks)
            clear(momentum, layer.blocks)
        if not s.start <= t < s.stop:
            continue
        everywhere = (t - s.start) % s.read_every == 0
        anneal = (1 + math.cos(math.pi * (t - s.start) / (s.stop - s.start))) / 2
        forgotten, length = anneal / (s.stop - s.start), s.step_size * anneal
        if everywhere:
            length *= round(math.sqrt(s.read_every))
        length /= math.sqrt(2 * (s.stop - s.start) * math.log(s.m))
        for weight, layer, gradient in zip(weights, layers, dense, strict=True):
            open_blocks = [block for block in layer.blocks if not frozen(block, s)]
            if everywhere:
                measure(weight, layer, gradient, open_blocks)
                read = [(b, i) for b in open_blocks for i in range(s.m) if not b.kept[i]]
            else:
                read = [(b, i) for row in layer.contenders.values() for b, i in row if not frozen(b, s)]
            for block, i in read:
                fresh = gradient[block.row, block.columns[i]].item()
                mean = s.averaging * block.mean_gradient[i] + (1 - s.averaging) * fresh
                block.mean_gradient[i] = mean
                block.evidence[i] = (1 - forgotten) * block.evidence[i] - length * layer.unit * mean
            if everywhere:
                contend(weight, layer, s)
        if (t - s.start + 1) % s.every == 0:
            for weight, layer, momentum in zip(weights, layers, momenta, strict=True):
                swaps += adapt(weight.data, momentum, layer, s)
    return layers, swaps


def frozen(block: Block, s: Settings) -> bool:
    return s.freeze_after is not None and block.oscillations > s.freeze_after


def clear(values: Tensor, blocks: list[Block]) -> None:
    for block in blocks:
        for column, kept in zip(block.columns, block.kept, strict=True):
            if not kept:
                values[block.row, column] = 0


def measure(weight: Tensor, layer: Layer, gradient: Tensor, read: list[Block]) -> None:
    squares = [
        gradient[b.row, c].item() ** 2 for b in read for c, kept in zip(b.columns, b.kept, strict=True) if not kept
    ]
    mean = sum(squares) / len(squares)
    layer.noise = mean if layer.noise is None else 0.9 * layer.noise + 0.1 * mean
    kept = [weight[b.row, c].item() for b in layer.blocks for c, k in zip(b.columns, b.kept, strict=True) if k]
    layer.unit = math.sqrt(sum(w * w for w in kept) / len(kept)) / math.sqrt(layer.noise)


def closeness(weight: Tensor, block: Block, i: int) -> float:
    weakest = min(abs(weight[block.row, c].item()) for c, kept in zip(block.columns, block.kept, strict=True) if kept)
    return abs(block.evidence[i]) / weakest


def contend(weight: Tensor, layer: Layer, s: Settings) -> None:
    layer.contenders = {}
    for row in range(weight.shape[0]):
        pruned = [(b, i) for b in layer.blocks if b.row == row for i in range(s.m) if not b.kept[i]]
        count = math.ceil(s.contenders * len(pruned))
        open_slots = [(b, i) for b, i in pruned if not frozen(b, s)]
        ranked = sorted(open_slots, key=lambda slot: closeness(weight, *slot), reverse=True)
        chosen = ranked[:count]
        layer.contenders[row] = [slot for slot in pruned if any(slot[0] is b and slot[1] == i for b, i in chosen)]


def adapt(weight: Tensor, momentum: Tensor, layer: Layer, s: Settings) -> int:
    swaps = 0
    for row in layer.contenders.values():
        open_slots = [(b, i) for b, i in row if not frozen(b, s)]
        groups = [open_slots]
        if not s.one_per_row:
            groups = [[slot for slot in open_slots if slot[0] is block] for block in layer.blocks]
        for group in groups:
            if group:
                challenger = max(group, key=lambda slot: closeness(weight, *slot))
                swaps += swap(weight, momentum, row, *challenger, s)
    return swaps


def swap(
    weight: Tensor, momentum: Tensor, contenders: list[tuple[Block, int]], block: Block, into: int, s: Settings
) -> bool:
    """Let a contender take the place of the weakest kept weight of its block if it exceeds that by the margin."""

    def size(i: int) -> float:
        return abs(weight[block.row, block.columns[i]].item())

    out = min((i for i in range(s.m) if block.kept[i]), key=size)
    if not abs(block.evidence[into]) > (1 + s.margin) * size(out):
        return False
    largest = (1 + s.margin) * size(out)
    dropped, revived = weight[block.row, block.columns[out]].item(), block.evidence[into]
    block.evidence[out], block.evidence[into] = dropped, 0.0
    weight[block.row, block.columns[into]] = max(-largest, min(largest, revived))
    weight[block.row, block.columns[out]] = 0
    momentum[block.row, block.columns[out]] = momentum[block.row, block.columns[into]] = 0
    block.mean_gradient[out] = block.mean_gradient[into] = 0.0
    block.kept[out], block.kept[into] = False, True
    block.oscillations += into in block.pruned_earlier
    block.pruned_earlier.add(out)
    place = next(place for place, slot in enumerate(contenders) if slot[0] is block and slot[1] == into)
    contenders[place] = (block, out)
    return True
