"""The core in a training loop of your own, without Lightning: what `BAMECallback` does at each step, in the open.

Run: `python examples/without_lightning.py` (seconds). One process, one optimizer, full precision; the callback also
takes care of accumulation, mixed precision, several processes, resuming, averaging and the ledger.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

from bame_lightning import Evidence, NMPattern, Schedule
from bame_lightning.bame.evolution import EvolvingWeight
from bame_lightning.blocks.layout import to_blocks
from bame_lightning.blocks.masks import top_n_mask, zero_pruned_
from bame_lightning.weights.layers import SparseWeight, plan_layers
from bame_lightning.weights.optimizer_step import elementwise_state

STEPS = 100


def sparse_weights(model, pattern):
    """Put every eligible weight under the mask of its largest values; the weights themselves are still dense."""
    plans = [plan for plan in plan_layers(model, NMPattern.parse(pattern)) if plan.pattern]
    return [
        SparseWeight.of(plan, top_n_mask(to_blocks(plan.values, plan.pattern.m).abs(), plan.pattern.n))
        for plan in plans
    ]


@torch.no_grad()
def enforce(weights, optimizer):
    """Zero what is pruned, in weights and in optimizer state."""
    for sparse in weights:
        zero_pruned_(sparse.values, sparse.kept)
        for _, state in elementwise_state(optimizer, sparse.weight, sparse.name):
            zero_pruned_(sparse.oriented(state), sparse.kept)


def train(model, batches, optimizer, pattern, evidence=Evidence(), schedule=Schedule()):  # noqa: B008 frozen
    """Train under masks that evolve; returns the weights with their masks."""
    window = schedule.window(len(batches))
    weights = sparse_weights(model, pattern)
    evolving = [EvolvingWeight(sparse, evidence, freeze_after=None) for sparse in weights]
    enforce(weights, optimizer)
    for step, (inputs, labels) in enumerate(batches):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        reading = evidence.reading(step, window)
        with torch.no_grad():
            for weight in evolving:
                if reading is not None:
                    weight.read(reading.everywhere)
                zero_pruned_(weight.sparse.gradient, weight.sparse.kept)
            optimizer.step()
            for weight in evolving:
                if reading is not None:
                    finite = torch.stack(weight.extremes()).isfinite().all()
                    weight.accumulate(optimizer, reading, finite, len(window))
                    if reading.everywhere:
                        weight.contend(evidence.contenders)
                if window.adapts(step):
                    weight.adapt(evidence.adaptable_share(step, window))
                weight.reading = None
        enforce(weights, optimizer)
    return weights


def main():
    """Train a network on digits, and count the non-zeros of its blocks."""
    torch.manual_seed(0)
    digits = load_digits()
    pixels, labels = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    chosen = [torch.randint(1437, (64,)) for _ in range(STEPS)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    weights = train(model, [(pixels[rows], labels[rows]) for rows in chosen], optimizer, "1:16")
    for sparse in weights:
        counts = (to_blocks(sparse.values, 16) != 0).sum(-1)
        print(f"{sparse.name}: at most {int(counts.max())} non-zero in each of {len(counts)} blocks")
    accuracy = (model(pixels[1437:]).argmax(-1) == labels[1437:]).float().mean()
    print(f"test accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()
