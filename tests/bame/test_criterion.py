from __future__ import annotations

import itertools
import math
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bame_lightning.bame.criterion import first_order_worth, select_mask
from bame_lightning.blocks.pattern import NMPattern
from tests.helpers import patterns, random_kept

T, F = True, False


def swaps_one_by_one(worth: list[float], kept: list[bool]) -> list[bool]:
    """Pair the cheapest kept with the best pruned weights, the lower index first, as long as it is worth more."""
    cheapest = sorted((w, i) for i, w in enumerate(worth) if kept[i])
    best = sorted((-w, i) for i, w in enumerate(worth) if not kept[i])
    result = list(kept)
    for (cost, out), (minus_gain, into) in zip(cheapest, best, strict=False):
        if -minus_gain > cost:
            result[out], result[into] = False, True
    return result


@given(patterns(), st.integers(0, 10**6), st.integers(1, 6))
def test_the_new_mask_is_that_of_swaps_made_one_by_one(pattern: NMPattern, seed: int, top: int) -> None:
    worth = torch.randint(0, top + 1, (6, pattern.m), generator=torch.Generator().manual_seed(seed)).float()
    mask = random_kept(6, pattern, seed)
    new = select_mask(worth, mask.clone(), pattern.n)
    expected = [swaps_one_by_one(w, k) for w, k in zip(worth.tolist(), mask.tolist(), strict=True)]
    assert new.tolist() == expected


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 4), (2, 4), (3, 4), (4, 4), (3, 7), (4, 8)])
def test_no_other_mask_is_worth_more_and_none_as_good_is_closer(n: int, m: int) -> None:
    worth = torch.randint(0, 6, (60, m), generator=torch.Generator().manual_seed(n * m)).float()
    mask = random_kept(60, NMPattern(n, m), seed=m)
    for row, old, new in zip(worth.tolist(), mask.tolist(), select_mask(worth, mask, n).tolist(), strict=True):
        chosen = {i for i in range(m) if new[i]}
        before = {i for i in range(m) if old[i]}
        choices = [set(kept) for kept in itertools.combinations(range(m), n)]
        values = [sum(row[i] for i in kept) for kept in choices]
        best = [kept for kept, value in zip(choices, values, strict=True) if value == max(values)]
        assert chosen in best
        swaps = len(before - chosen)
        assert swaps == min(len(before - kept) for kept in best)
        assert swaps <= min(n, m - n)


@pytest.mark.parametrize(
    ("worth", "old", "new"),
    [
        ([1, 2, 3, 4], [T, T, F, F], [F, F, T, T]),  # two swaps, the most that 2:4 can make
        ([2, 2, 2, 2], [F, T, F, T], [F, T, F, T]),  # ties change nothing
        ([1, 3, 3, 0], [F, F, T, T], [F, T, T, F]),
        ([0, 0, 5, 5], [T, T, F, F], [F, F, T, T]),
        ([1, 1, 2, 0], [T, T, F, F], [F, T, T, F]),  # of two equal kept ones the lower index goes
        ([2, 2, 1, 3], [F, F, T, T], [T, F, F, T]),  # of two equal pruned ones the lower index comes
        ([0, 0, 0, 1e-30], [T, T, F, F], [F, T, F, T]),  # any gain will do
    ],
)
def test_swaps_by_hand(worth: list[float], old: list[bool], new: list[bool]) -> None:
    assert select_mask(torch.tensor([worth], dtype=torch.float32), torch.tensor([old]), 2).tolist() == [new]


def test_the_old_mask_is_left_alone() -> None:
    mask = torch.tensor([[T, F]])
    select_mask(torch.tensor([[0.0, 1.0]]), mask, 1)
    assert mask.tolist() == [[T, F]]


def test_large_blocks_are_no_trouble() -> None:
    # C(1024, 512) has 307 digits. The worth rises with the position and the lower half is kept: all 512 swap.
    mask = (torch.arange(1024) < 512).expand(2, 1024)
    began = time.perf_counter()
    new = select_mask(torch.arange(1024.0).expand(2, 1024), mask, 512)
    assert torch.equal(new, ~mask)
    assert time.perf_counter() - began < 5


def test_first_order_worth_is_the_magnitude_of_gradient_times_weight() -> None:
    worth = first_order_worth(torch.tensor([[2.0, -3.0, 0.5]]), torch.tensor([[-4.0, 0.5, 0.0]]))
    assert worth.tolist() == [[8.0, 1.5, 0.0]]


def test_first_order_worth_of_one_step_of_evidence_is_eta_times_the_squared_gradient() -> None:
    eta, gradient = 0.5, torch.tensor([[3.0, -2.0]])
    assert first_order_worth(-eta * gradient, gradient).tolist() == [[0.5 * 9, 0.5 * 4]]


@pytest.mark.parametrize("worst", [math.inf, math.nan])
def test_values_that_overflowed_leave_the_number_of_kept_weights_alone(worst: float) -> None:
    worth = torch.tensor([[1.0, worst, worst, 2.0], [worst, worst, 1.0, 2.0], [worst] * 4])
    mask = torch.tensor([[False, True, True, False], [False, False, True, True], [True, False, False, True]])
    assert select_mask(worth, mask, 2).sum(-1).tolist() == [2, 2, 2]
