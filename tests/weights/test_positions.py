from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bame_lightning.blocks.pattern import NMPattern
from bame_lightning.weights.layers import SparseWeight
from bame_lightning.weights.positions import Positions, flat_memory, take
from tests.helpers import Case, block_positions, cases


def sparse(name: str, weight: torch.Tensor, m: int, transposed: bool = False) -> SparseWeight:
    parameter = nn.Parameter(weight)
    seen = weight.t() if transposed else weight
    return SparseWeight(
        name, parameter, NMPattern(m, m), torch.ones_like(seen, dtype=torch.bool), transposed=transposed
    )


def find(positions: Positions, numbers: torch.Tensor, counts: list[int]) -> torch.Tensor:
    return positions.offsets(numbers, torch.tensor(counts))


@given(st.data(), st.integers(0, 10**6))
def test_values_of_several_weights_are_found_wherever_they_lie(data: st.DataObject, seed: int) -> None:
    one: Case = data.draw(cases())
    other: Case = data.draw(cases(one.pattern))
    weights = [sparse("a", one.weight, one.pattern.m), sparse("b", other.weight, other.pattern.m)]
    places = [
        [place for block in block_positions(case.weight.shape, case.pattern.m) for place in block]
        for case in (one, other)
    ]
    generator = torch.Generator().manual_seed(seed)
    chosen = [torch.randperm(len(own), generator=generator)[: 1 + len(own) // 2].sort().values for own in places]
    positions = Positions(weights)
    assert positions.starts == [0, len(places[0]), len(places[0]) + len(places[1])]
    numbers = torch.cat([chosen[0], chosen[1] + len(places[0])])
    counts = [len(own) for own in chosen]
    offsets = torch.split(find(positions, numbers, counts), counts)
    found = take([case.weight for case in (one, other)], offsets)
    wanted = [
        case.weight[own[i]].item()
        for case, own, picks in zip((one, other), places, chosen, strict=True)
        for i in picks.tolist()
    ]
    assert found.tolist() == wanted
    # What is written there is found again.
    for layer, where in enumerate(offsets):
        positions.weight(layer).index_fill_(0, where, 99.0)
    changed = [
        [case.weight[own[i]].item() for i in picks.tolist()]
        for case, own, picks in zip((one, other), places, chosen, strict=True)
    ]
    assert all(value == 99 for values in changed for value in values)


def test_positions_of_a_weight_that_is_stored_transposed() -> None:
    stored = torch.arange(12.0).reshape(4, 3)  # (in, out)
    positions = Positions([sparse("conv1d", stored, 2, transposed=True)])
    # The second output's inputs: 1, 4, 7, 10.
    offsets = find(positions, torch.arange(4, 8), [4])
    assert take([stored], [offsets]).tolist() == [1, 4, 7, 10]


def test_a_view_follows_a_weight_that_has_moved() -> None:
    weight = sparse("layer.weight", torch.zeros(2, 4), 2)
    positions = Positions([weight])
    positions.weight(0).fill_(1)
    weight.weight.data = torch.zeros(2, 4)  # as `.to()` does
    positions.weight(0).fill_(2)
    assert weight.weight.tolist() == [[2.0] * 4] * 2


def test_memory_that_is_not_dense() -> None:
    wide = torch.arange(12.0).reshape(2, 6)
    part = wide[:, :4]
    assert flat_memory(part).tolist() == list(range(10))
    positions = Positions([sparse("part", part, 2)])
    offsets = find(positions, torch.tensor([3, 4]), [2])
    assert take([part], [offsets]).tolist() == [3, 6]


def test_kernels_that_are_scattered_in_memory_are_refused() -> None:
    odd = torch.zeros(2, 3, 4, 5).permute(0, 3, 2, 1)  # kernel positions the other way round
    with pytest.raises(ValueError, match=r"`odd` has strides .*contiguous"):
        Positions([sparse("odd", odd, 5)])


@pytest.mark.parametrize(
    ("weight", "straight"),
    [
        (torch.zeros(4, 8), True),
        (torch.zeros(8, 4).t(), False),
        (torch.zeros(4, 8, 1, 1), True),
        (torch.zeros(4, 8, 1, 1).to(memory_format=torch.channels_last), True),
        (torch.zeros(4, 8, 3, 3), False),
        (torch.zeros(4, 8, 3, 3).to(memory_format=torch.channels_last), True),
    ],
)
def test_what_lies_in_memory_as_it_is_numbered_is_known(weight: torch.Tensor, straight: bool) -> None:
    positions = Positions([sparse("a", weight, 4)])
    assert positions.straight == [straight]
    everything = torch.arange(weight.numel())
    same = torch.equal(find(positions, everything, [weight.numel()]), everything)
    assert same == straight
