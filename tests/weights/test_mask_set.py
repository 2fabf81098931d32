from __future__ import annotations

import torch
from torch import nn

from bame_lightning.blocks.pattern import NMPattern
from bame_lightning.weights.layers import SparseWeight
from bame_lightning.weights.mask_set import MaskSet, flip_rates


def two() -> list[SparseWeight]:
    first = SparseWeight(
        "a.weight", nn.Parameter(torch.zeros(2, 4)), NMPattern(1, 2), torch.tensor([[1, 0, 1, 0], [0, 1, 0, 1]]) > 0
    )
    images = torch.zeros(1, 2, 1, 2).to(memory_format=torch.channels_last)
    second = SparseWeight("b.weight", nn.Parameter(images), NMPattern(1, 2), torch.tensor([[[[1, 0]], [[0, 1]]]]) > 0)
    return [first, second]


def test_masks_stay_what_they_are_and_lie_as_their_weights() -> None:
    weights = two()
    before = [sparse.kept.clone() for sparse in weights]
    MaskSet(weights)
    for sparse, kept in zip(weights, before, strict=True):
        assert torch.equal(sparse.kept, kept)
        assert sparse.kept.stride() == sparse.weight.stride()


def test_swaps_change_masks_of_several_weights_and_are_counted() -> None:
    weights = two()
    masks = MaskSet(weights)
    # In memory: row 0 of the first weight revives its place 1 for 0; row 1 does not swap; the second weight revives its first
    # input at kernel position 1, place 2 in channels-last memory, for the second input, place 3.
    masks.swap(
        torch.tensor([1, 4, 2]), torch.tensor([0, 5, 3]), torch.tensor([True, False, True]), torch.tensor([0, 0, 1])
    )
    assert weights[0].kept.int().tolist() == [[0, 1, 1, 0], [0, 1, 0, 1]]
    assert weights[1].kept.int().tolist() == [[[[1, 1]], [[0, 0]]]]
    assert (masks.last_flips.tolist(), masks.flips.tolist(), masks.total()) == ([2, 2], [2, 2], 4)
    masks.unchanged()
    assert (masks.last_flips.tolist(), masks.flips.tolist()) == ([0, 0], [2, 2])


def test_a_mask_is_changed_as_a_whole() -> None:
    weights = two()
    masks = MaskSet(weights)
    masks.change(0, torch.tensor([[0, 1, 0, 1], [0, 1, 0, 1]]) > 0)
    assert weights[0].kept.int().tolist() == [[0, 1, 0, 1], [0, 1, 0, 1]]
    rates = flip_rates([masks])
    assert {name: round(float(rate), 4) for name, rate in rates.items()} == {
        "bame/flip_rate": round(4 / 12, 4),
        "bame/layer/a/flip_rate": 0.5,
        "bame/layer/b/flip_rate": 0.0,
    }
    again = MaskSet(two())
    again.load_state(0, masks.state(0))
    assert again.flips.tolist() == [4, 0]
