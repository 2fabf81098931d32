from __future__ import annotations

import pytest
import torch

from bame_lightning.statistics import flipped_positions, nonzero_share, pooled_mean


def test_a_swap_flips_two_positions() -> None:
    old = torch.tensor([[True, False, False], [True, False, True]])
    assert flipped_positions(old, old) == 0
    assert flipped_positions(old, torch.tensor([[False, True, False], [True, False, True]])) == 2
    assert flipped_positions(old, ~old) == 6


def test_the_share_of_nonzeros_is_pooled_over_weights_of_different_size() -> None:
    # 1 of 2 and 2 of 6: 3 of 8, not the mean of 1/2 and 1/3. A tiny weight counts.
    weights = [torch.tensor([0.0, -1.0]), torch.tensor([[1e-30, 0.0, 0.0], [0.0, 5.0, 0.0]])]
    assert nonzero_share(iter(weights)) == 0.375


def test_the_pooled_mean_counts_every_element_the_same() -> None:
    values = [torch.tensor([1.0]), torch.tensor([[2.0, 3.0], [4.0, 5.0]])]
    assert pooled_mean(iter(values)) == 3.0
    assert pooled_mean([torch.tensor([True, False, False, False]), torch.zeros(0)]) == pytest.approx(0.25)
