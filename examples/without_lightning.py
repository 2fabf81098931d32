"""Sparse training in a loop of your own, without Lightning: the object that the callbacks drive, step by step.

Run: `python examples/without_lightning.py` (seconds). One process in full precision; the callbacks also take care of
accumulation, mixed precision, several processes, resuming, averaging and the ledger.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

from bame_lightning import Evidence, Schedule
from bame_lightning.blocks.layout import to_blocks
from bame_lightning.methods.bame import BAME
from bame_lightning.methods.training import SparseTraining


def train(model, batches, optimizer, pattern):
    """Train under masks that evolve; returns the weights with their masks."""
    training = SparseTraining(BAME(Evidence(), Schedule()))
    training.begin(model, [optimizer], pattern, steps=len(batches))
    for inputs, labels in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        training.before_step(optimizer)  # reads gradients, then zeroes them where weights are pruned
        optimizer.step()  # a hook of the optimizer adapts the masks
    return training.run.weights


def main():
    """Train a network on digits, and count the non-zeros of its blocks."""
    torch.manual_seed(0)
    digits = load_digits()
    pixels, labels = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    chosen = [torch.randint(1437, (64,)) for _ in range(100)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for sparse in train(model, [(pixels[rows], labels[rows]) for rows in chosen], optimizer, "1:16"):
        counts = (to_blocks(sparse.values, 16) != 0).sum(-1)
        print(f"{sparse.name}: at most {int(counts.max())} non-zero in each of {len(counts)} blocks")
    accuracy = (model(pixels[1437:]).argmax(-1) == labels[1437:]).float().mean()
    print(f"test accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()
