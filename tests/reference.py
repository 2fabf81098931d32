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
    designated: bool = False


@dataclass
class Layer:
    """The blocks of a weight, and what is measured in all of them together."""

    blocks: list[Block]
    noise: float | None = None
    unit: float = 0.0
    all_read: bool = False


@dataclass
class Settings:
    """The constants of the method."""

    n: int
    m: int
    start: int
    stop: int
    every: int
    read_every: int
    share: float
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
            read = [b for b in layer.blocks if not frozen(b, s) and (everywhere or b.designated)]
            if everywhere:
                layer.all_read = True
                measure(weight, layer, gradient, read)
            for block in read:
                for i, column in enumerate(block.columns):
                    if not block.kept[i]:
                        fresh = gradient[block.row, column].item()
                        mean = s.averaging * block.mean_gradient[i] + (1 - s.averaging) * fresh
                        block.mean_gradient[i] = mean
                        step = length * layer.unit * mean
                        block.evidence[i] = (1 - forgotten) * block.evidence[i] - step
            if everywhere:
                designate(weight, layer.blocks, s)
        if (t - s.start + 1) % s.every == 0:
            for weight, layer, momentum in zip(weights, layers, momenta, strict=True):
                chosen = [b for b in layer.blocks if not frozen(b, s) and (layer.all_read or b.designated)]
                if s.one_per_row:
                    rows = {b.row: [other for other in chosen if other.row == b.row] for b in chosen}
                    chosen = [max(row, key=lambda b, w=weight: urgency(w, b)) for row in rows.values()]
                for block in chosen:
                    swaps += adapt(weight.data, momentum, block, s)
                layer.all_read = False
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


def urgency(weight: Tensor, block: Block) -> float:
    strongest = max((abs(v) for v, kept in zip(block.evidence, block.kept, strict=True) if not kept), default=0.0)
    weakest = min(abs(weight[block.row, c].item()) for c, kept in zip(block.columns, block.kept, strict=True) if kept)
    return strongest / weakest


def designate(weight: Tensor, blocks: list[Block], s: Settings) -> None:
    open_blocks = [block for block in blocks if not frozen(block, s)]
    chosen = sorted(open_blocks, key=lambda b: urgency(weight, b), reverse=True)[
        : math.ceil(s.share * len(open_blocks))
    ]
    for block in blocks:
        block.designated = any(block is c for c in chosen)


def adapt(weight: Tensor, momentum: Tensor, block: Block, s: Settings) -> int:
    def size(i: int) -> float:
        return abs(weight[block.row, block.columns[i]].item())

    kept = sorted((i for i in range(s.m) if block.kept[i]), key=size)
    pruned = sorted((i for i in range(s.m) if not block.kept[i]), key=lambda i: -abs(block.evidence[i]))
    pairs = []
    for weakest, strongest in zip(kept, pruned, strict=False):
        if not abs(block.evidence[strongest]) > (1 + s.margin) * size(weakest):
            break
        pairs.append((weakest, strongest))
    if not pairs:
        return 0
    largest = (1 + s.margin) * max(size(weakest) for weakest, _ in pairs)
    for weakest, strongest in pairs:
        out, into = block.columns[weakest], block.columns[strongest]
        revived = block.evidence[strongest]
        block.evidence[weakest], block.evidence[strongest] = weight[block.row, out].item(), 0.0
        weight[block.row, into] = max(-largest, min(largest, revived))
        weight[block.row, out] = 0
        momentum[block.row, out] = momentum[block.row, into] = 0
        block.mean_gradient[weakest] = block.mean_gradient[strongest] = 0.0
        block.kept[weakest], block.kept[strongest] = False, True
    block.oscillations += any(strongest in block.pruned_earlier for _, strongest in pairs)
    block.pruned_earlier.update(weakest for weakest, _ in pairs)
    return len(pairs)
