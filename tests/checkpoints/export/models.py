"""Sparse weights and checkpoints, made with plain loops."""

import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bame_lightning.weights.saved_state import STATE_VERSION, VERSION_KEY


def mask(shape: tuple[int, ...], n: int, m: int, seed: int = 0) -> Tensor:
    """Exactly `n` of every `m` inputs, another choice in every block."""
    choice = random.Random(seed)
    kept = torch.zeros(shape, dtype=torch.bool)
    for out, *kernel in itertools.product(range(shape[0]), *map(range, shape[2:])):
        for block in range(shape[1] // m):
            for k in choice.sample(range(m), n):
                kept[out, block * m + k, *kernel] = True
    return kept


def weight(kept: Tensor, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Random values where kept, zeros elsewhere."""
    values = torch.randn(kept.shape, generator=torch.Generator().manual_seed(seed)) + 0.001
    return torch.where(kept, values, 0.0).to(dtype)


def entry(kept: Tensor, pattern: str, transposed: bool = False) -> dict[str, Any]:
    """What a callback saves of a layer."""
    packed = torch.from_numpy(np.packbits(kept.numpy().reshape(-1), bitorder="little"))
    return {"pattern": pattern, "shape": list(kept.shape), "transposed": transposed, "mask": packed}


def save(path: Path, state: dict[str, Tensor], layers: dict[str, Any]) -> Path:
    """A Lightning checkpoint with the state of a sparsity callback."""
    callbacks = {"Any": {VERSION_KEY: STATE_VERSION, "layers": layers}}
    torch.save({"pytorch-lightning_version": "2.6", "state_dict": state, "callbacks": callbacks}, path)
    return path
