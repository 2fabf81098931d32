from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bame_lightning.bame.contenders import choose, closeness, count_in_share, first
from bame_lightning.bame.evidence import Evidence
from bame_lightning.blocks.pattern import NMPattern
from bame_lightning.weights.layers import SparseWeight
from tests.helpers import evolving, patterns, random_kept


def test_closeness_compares_each_pruned_with_the_weakest_kept_weight() -> None:
    evidence = torch.tensor([[0.0, 0.0, 0.25, -1.0], [-1.0, 0.0, 0.5, 0.0]])
    weakest, kept = torch.tensor([[0.5], [4.0]]), torch.tensor([[0, 1], [1, 3]], dtype=torch.int16)
    # Kept ones are no pruned ones.
    assert closeness(evidence, weakest, kept).tolist() == [[-1, -1, 0.5, 2.0], [0.25, -1, 0.125, -1]]


def test_a_block_whose_kept_weight_is_zero_comes_first_and_stays_finite() -> None:
    evidence = torch.tensor([[0.0, 0.5], [0.0, 100.0], [0.0, 0.0]])
    weakest, kept = torch.tensor([[0.0], [1.0], [0.0]]), torch.zeros(3, 1, dtype=torch.int16)
    some, large, none = closeness(evidence, weakest, kept)[:, 1].tolist()
    assert math.isfinite(some)
    assert some > large == 100
    assert none == 0


def test_nothing_of_a_block_that_keeps_everything_is_close_to_a_swap() -> None:
    everything = torch.arange(3, dtype=torch.int16).repeat(2, 1)
    assert (closeness(torch.zeros(2, 3), torch.ones(2, 1), everything) == -1).all()


@given(patterns(), st.integers(0, 10**6), st.sampled_from([torch.float32, torch.float64]))
def test_how_close_the_blocks_of_a_weight_are_against_loops(pattern: NMPattern, seed: int, dtype: torch.dtype) -> None:
    # Weights that the optimizer has moved although they are pruned make no difference.
    generator = torch.Generator().manual_seed(seed)
    weight, evidence = torch.randn(2, 6, pattern.m, generator=generator, dtype=dtype)
    mask = random_kept(6, pattern, seed)
    evidence[mask] = 0
    smallest = [
        min(abs(w) for w, k in zip(ws, ks, strict=True) if k)
        for ws, ks in zip(weight.tolist(), mask.tolist(), strict=True)
    ]
    expected = [
        [-1.0 if k else abs(v) / least for v, k in zip(vs, ks, strict=True)]
        for least, vs, ks in zip(smallest, evidence.tolist(), mask.tolist(), strict=True)
    ]
    rows = (2, 3 * pattern.m)
    sparse = SparseWeight("layer.weight", nn.Parameter(weight.view(rows)), pattern, mask.view(rows))
    blocks = evolving(sparse, Evidence(), freeze_after=None)
    blocks.table.evidence.copy_(evidence)
    ratios = blocks.layer(0).closeness()
    assert ratios.dtype == dtype
    torch.testing.assert_close(ratios, torch.tensor(expected, dtype=dtype))


@given(st.data(), st.sampled_from([1, 2, 4]))
def test_contenders_are_the_closest_positions_of_each_row_ascending(data: st.DataObject, apart: int) -> None:
    rows, positions = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 16))
    # Kept positions and frozen blocks are at -1; many are equal.
    ratios = [data.draw(st.lists(st.integers(-1, 3), min_size=positions, max_size=positions)) for _ in range(rows)]
    count = data.draw(st.integers(0, positions))
    expected = [
        sorted(i for i in sorted(range(positions), key=lambda i, r=ratios[row]: (-r[i], i))[:count])
        for row in range(rows)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bame_lightning.bame.contenders.APART", apart)
        assert choose(torch.tensor(ratios).float(), count).tolist() == expected


def test_an_infinitely_close_position_is_chosen_before_all_others() -> None:
    assert choose(torch.tensor([[1.0, 3e38, math.inf, -1.0]]), 1).tolist() == [[2]]


@given(st.data())
def test_first_against_loops(data: st.DataObject) -> None:
    groups = data.draw(st.integers(1, 4))
    contenders = data.draw(st.lists(st.tuples(st.integers(-1, 3), st.integers(0, groups - 1)), min_size=1, max_size=12))
    ratios, group = (torch.tensor(values) for values in zip(*contenders, strict=True))
    slot, may_swap = first(ratios.float(), group, groups)
    for wanted in range(groups):
        rivals = [(-ratio, place) for place, (ratio, where) in enumerate(contenders) if where == wanted]
        # A group without a contender has none that may swap, and names the first of all.
        ratio, place = min(rivals) if rivals else (1, 0)
        assert (slot[wanted], may_swap[wanted]) == (place, -ratio >= 0)


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.01, 1), (0.25, 1), (0.26, 2), (1.0, 4)])
def test_the_share_is_rounded_up(share: float, count: int) -> None:
    assert count_in_share(share, 4) == count
