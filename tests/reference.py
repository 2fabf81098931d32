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
    pruned_earlier: set[int] = field(default_factory=set)
    oscillations: int = 0
    designated: bool = False


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
    decay: float
    freeze_after: int
    lr: float
    momentum: float
    weight_decay: float


def split(weight: Tensor, s: Settings) -> list[Block]:
    blocks = []
    for row in range(weight.shape[0]):
        for first in range(0, weight.shape[1], s.m):
            columns = list(range(first, first + s.m))
            strongest = sorted(columns, key=lambda c: -abs(weight[row, c].item()))[: s.n]
            blocks.append(Block(row, columns, [c in strongest for c in columns], [0.0] * s.m))
    return blocks


def train(
    weights: Sequence[Tensor], loss_of: Callable[[int], Tensor], steps: int, s: Settings
) -> tuple[list[list[Block]], int]:
    """Train leaf tensors in place; returns the blocks of each weight, and how many swaps were made."""
    layers = [split(weight, s) for weight in weights]
    momenta = [torch.zeros_like(weight) for weight in weights]
    swaps = 0
    for weight, blocks in zip(weights, layers, strict=True):
        clear(weight.data, blocks)
    eta = s.lr / (1 - s.momentum)
    for t in range(steps):
        for weight in weights:
            weight.grad = None
        loss_of(t).backward()
        dense = [weight.grad.clone() for weight in weights]
        for weight, blocks, momentum in zip(weights, layers, momenta, strict=True):
            clear(weight.grad, blocks)
            momentum.mul_(s.momentum).add_(weight.grad + s.weight_decay * weight.data)
            weight.data -= s.lr * momentum
            clear(weight.data, blocks)
            clear(momentum, blocks)
        if not s.start <= t < s.stop:
            continue
        everywhere = (t - s.start) % s.read_every == 0
        for weight, blocks, gradient in zip(weights, layers, dense, strict=True):
            r = round(math.sqrt(s.read_every)) if everywhere else 1
            for block in blocks:
                if block.oscillations > s.freeze_after or not (everywhere or block.designated):
                    continue
                for i, column in enumerate(block.columns):
                    if not block.kept[i]:
                        rate = r * s.step_size * eta
                        g = gradient[block.row, column].item()
                        block.evidence[i] = (1 - rate * (s.weight_decay + s.decay)) * block.evidence[i] - rate * g
            if everywhere:
                designate(weight, blocks, s)
        if (t - s.start + 1) % s.every == 0:
            for weight, blocks, momentum in zip(weights, layers, momenta, strict=True):
                for block in blocks:
                    swaps += adapt(weight.data, momentum, block, s)
    return layers, swaps


def clear(values: Tensor, blocks: list[Block]) -> None:
    for block in blocks:
        for column, kept in zip(block.columns, block.kept, strict=True):
            if not kept:
                values[block.row, column] = 0


def designate(weight: Tensor, blocks: list[Block], s: Settings) -> None:
    def ratio(block: Block) -> float:
        strongest = max((abs(v) for v, kept in zip(block.evidence, block.kept, strict=True) if not kept), default=0.0)
        weakest = min(
            abs(weight[block.row, c].item()) for c, kept in zip(block.columns, block.kept, strict=True) if kept
        )
        return strongest / weakest

    open_blocks = [block for block in blocks if block.oscillations <= s.freeze_after]
    chosen = sorted(open_blocks, key=ratio, reverse=True)[: math.ceil(s.share * len(open_blocks))]
    for block in blocks:
        block.designated = any(block is c for c in chosen)


def adapt(weight: Tensor, momentum: Tensor, block: Block, s: Settings) -> int:
    if block.oscillations > s.freeze_after:
        return 0
    swaps, returned, pruned_now = 0, False, []
    for _ in range(min(s.n, s.m - s.n)):
        kept = [i for i in range(s.m) if block.kept[i]]
        pruned = [i for i in range(s.m) if not block.kept[i]]
        value = {i: abs(weight[block.row, block.columns[i]].item()) for i in kept}
        weakest = min(kept, key=value.__getitem__)
        strongest = max(pruned, key=lambda i: abs(block.evidence[i]))
        if not abs(block.evidence[strongest]) > value[weakest]:
            break
        out, into = block.columns[weakest], block.columns[strongest]
        block.evidence[weakest] = weight[block.row, out].item()
        weight[block.row, into] = block.evidence[strongest]
        block.evidence[strongest] = 0.0
        weight[block.row, out] = 0
        momentum[block.row, out] = momentum[block.row, into] = 0
        block.kept[weakest], block.kept[strongest] = False, True
        returned |= strongest in block.pruned_earlier
        pruned_now.append(weakest)
        swaps += 1
    block.pruned_earlier.update(pruned_now)
    block.oscillations += returned
    return swaps
