from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bame_lightning.blocks.statistics import flipped_positions, nonzero_share, percentiles, pooled_mean, survival


def test_a_swap_flips_two_positions() -> None:
    old = torch.tensor([[True, False, False], [True, False, True]])
    assert flipped_positions(old, old) == 0
    assert flipped_positions(old, torch.tensor([[False, True, False], [True, False, True]])) == 2
    assert flipped_positions(old, ~old) == 6


def test_the_share_of_nonzeros_is_pooled_over_weights_of_different_size() -> None:
    # 1 of 2 and 2 of 6: 3 of 8, not the mean of 1/2 and 1/3. A tiny weight counts.
    weights = [torch.tensor([0.0, -1.0]), torch.tensor([[1e-30, 0.0, 0.0], [0.0, 5.0, 0.0]])]
    assert nonzero_share(iter(weights)) == 0.375


def test_survival_is_the_share_of_the_first_mask_that_is_kept_now() -> None:
    first = torch.tensor([[True, True, False, False]])
    assert survival([(first, first)]) == 1
    assert survival([(~first, first)]) == 0
    assert survival([(torch.tensor([[True, False, True, False]]), first)]) == 0.5
    # 1 of 2 and 3 of 3: 4 of 5, not the mean of 1/2 and 1.
    three = torch.tensor([True, True, True])
    assert survival(iter([(torch.tensor([[True, False, True, False]]), first), (three, three)])) == pytest.approx(0.8)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.integers(1, 100))
def test_a_percentile_is_the_least_element_that_so_many_do_not_exceed(values: list[int], percent: int) -> None:
    enough = [v for v in values if sum(other <= v for other in values) >= percent * len(values) / 100 - 1e-9]
    half = len(values) // 2
    parts = [torch.tensor(values[:half], dtype=torch.int32), torch.tensor([values[half:]], dtype=torch.int32)]
    assert percentiles(iter(parts), [percent, 100]).tolist() == [min(enough), max(values)]


def test_a_percentile_may_be_infinite() -> None:
    assert percentiles([torch.tensor([math.inf, 1.0, 2.0])], [50, 90]).tolist() == [2.0, math.inf]


def test_the_pooled_mean_counts_every_element_the_same() -> None:
    values = [torch.tensor([1.0]), torch.tensor([[2.0, 3.0], [4.0, 5.0]])]
    assert pooled_mean(iter(values)) == 3.0
    assert pooled_mean([torch.tensor([True, False, False, False]), torch.zeros(0)]) == pytest.approx(0.25)
