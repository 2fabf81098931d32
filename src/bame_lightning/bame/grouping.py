"""Which weights evolve together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from bame_lightning.bame.evolving import EvolvingBlocks
from bame_lightning.weights.layers import SparseWeight


def regrouped(
    groups: Sequence[EvolvingBlocks],
    weights: Sequence[SparseWeight],
    held: Sequence[Sequence[SparseWeight]],
    begin: Callable[[Sequence[SparseWeight]], EvolvingBlocks],
) -> list[EvolvingBlocks]:
    """Group the weights that evolve together: those of one optimizer, pattern, type and device.

    Args:
        groups: The groups so far; a weight keeps its evolving state.
        weights: The weights; new ones are still dense.
        held: The weights of each optimizer.
        begin: Makes the evolving blocks of weights that were not together before.
    """
    wanted: dict[Any, list[SparseWeight]] = {}
    holder = {id(sparse): place for place, each in enumerate(held) for sparse in each}
    for sparse in weights:
        kind = (holder.get(id(sparse)), sparse.pattern, sparse.weight.dtype, sparse.kept.device)
        wanted.setdefault(kind, []).append(sparse)
    before = {id(sparse): (group, layer) for group in groups for layer, sparse in enumerate(group.weights)}
    kept = {tuple(map(id, group.weights)): group for group in groups}
    found = []
    for together in wanted.values():
        # Rows of one length side by side, so that they are handled in one go.
        together.sort(key=lambda sparse: sparse.kept.shape[1:].numel())
        group = kept.get(tuple(map(id, together)))
        if group is None:
            known = [before.get(id(sparse)) for sparse in together]
            states = [(each[0].state(each[1]) if each else None) for each in known]
            group = begin(together)
            for layer, state in enumerate(states):
                if state is not None:
                    group.load_state(layer, state)
        found.append(group)
    return found
