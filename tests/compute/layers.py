"""Sparse layers for tests, and what a dense product makes of them."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from bame_lightning.blocks.pattern import NMPattern
from bame_lightning.compute.operation import Conv2d, Linear, Operation

PATTERNS = [NMPattern.parse(text) for text in ("1:16", "1:8", "1:4", "2:4")]
DTYPES = [torch.float32, torch.float64]


def random_mask(shape: tuple[int, ...], pattern: NMPattern, seed: int = 0) -> Tensor:
    """N of each M inputs, chosen block by block."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(shape, dtype=torch.bool)
    for place in product(range(shape[0]), *(range(size) for size in shape[2:])):
        for first in range(0, shape[1], pattern.m):
            for kept in torch.randperm(pattern.m, generator=generator)[: pattern.n]:
                mask[(place[0], first + int(kept), *place[1:])] = True
    return mask


def dense(operation: Operation, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product by torch's own functions."""
    if isinstance(operation, Linear):
        return torch.nn.functional.linear(x, weight, bias)
    o = operation
    return torch.nn.functional.conv2d(x, weight, bias, o.stride, o.padding, o.dilation, o.groups)


def gradients(operation: Operation, x: Tensor, weight: Tensor, bias: Tensor | None, gradient: Tensor) -> list[Tensor]:
    """Gradients by autograd of the dense product."""
    leaves = [value.detach().requires_grad_() for value in (x, weight, bias) if value is not None]
    dense(operation, *leaves[:2], leaves[2] if bias is not None else None).backward(gradient)
    return [leaf.grad for leaf in leaves]


def close(found: Tensor, wanted: Tensor) -> None:
    """Equal but for the order of sums."""
    scale = max(1.0, wanted.abs().max().item()) if wanted.numel() else 1.0
    share = 2e-5 if wanted.dtype == torch.float32 else 1e-12
    torch.testing.assert_close(found, wanted, rtol=0, atol=share * scale)


LINEAR = [
    # out, in, batch: less than a vector, odd, several groups of vectors, several sections.
    (7, 16, (3,)),
    (33, 48, (130,)),
    (20, 32, (2, 3, 5)),
    (16, 16, (17,)),
    (530, 1040, (140,)),
]
CONVOLUTIONS = [
    # operation, kernel, out, in, batch, height, width
    (Conv2d(padding=(1, 1)), (3, 3), 20, 32, 33, 8, 8),
    (Conv2d((2, 2), (1, 1)), (3, 3), 17, 16, 5, 9, 11),
    (Conv2d(), (1, 1), 33, 16, 18, 5, 7),
    (Conv2d((2, 2)), (1, 1), 8, 16, 3, 8, 9),
    (Conv2d((2, 1), (2, 0), (1, 2), groups=2), (3, 3), 6, 32, 4, 7, 9),
    (Conv2d((3, 2), (3, 1), (2, 1)), (2, 5), 9, 16, 2, 8, 9),
    (Conv2d(padding=(4, 4)), (3, 3), 5, 16, 2, 4, 5),
    (Conv2d(padding=(1, 1)), (3, 3), 40, 32, 150, 1, 1),
    (Conv2d((2, 2), (3, 3)), (7, 7), 5, 16, 2, 14, 14),
]
