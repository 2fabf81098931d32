from __future__ import annotations

from itertools import permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bame_lightning.blocks.transposable import transposable_mask


@given(
    st.integers(1, 6).flatmap(lambda m: st.tuples(st.integers(1, m), st.just(m))),
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from([(), (2,), (3, 2)]),
    st.integers(0, 1000),
)
def test_every_block_along_both_dimensions_keeps_exactly_n(
    pattern: tuple[int, int], out: int, inp: int, kernel: tuple[int, ...], seed: int
) -> None:
    n, m = pattern
    scores = torch.randn(out * m, inp * m, *kernel, generator=torch.Generator().manual_seed(seed))
    mask = transposable_mask(scores, n, m)
    assert mask.shape == scores.shape
    for matrix in mask.flatten(2).unbind(-1) if kernel else [mask]:
        for row in matrix:
            assert [int(row[i : i + m].sum()) for i in range(0, len(row), m)] == [n] * inp
        for column in matrix.T:
            assert [int(column[i : i + m].sum()) for i in range(0, len(column), m)] == [n] * out


@pytest.mark.parametrize("seed", range(20))
def test_the_mask_holds_at_least_half_of_the_best_score(seed: int) -> None:
    scores = torch.rand(4, 4, generator=torch.Generator().manual_seed(seed))
    best = max(sum(scores[i, p[i]].item() for i in range(4)) for p in permutations(range(4)))
    held = scores[transposable_mask(scores, 1, 4)].sum().item()
    assert best / 2 <= held <= best + 1e-6


def test_greedy_takes_the_highest_first() -> None:
    scores = torch.tensor([[9.0, 8, 0, 0], [8, 7, 0, 0], [0, 0, 1, 3], [0, 0, 2, 1]])
    assert transposable_mask(scores, 1, 4).int().tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]]


def test_m_that_does_not_divide_the_output_dimension_is_refused() -> None:
    with pytest.raises(ValueError, match=r"4 must divide the output dimension; got a weight of shape \(6, 8\)"):
        transposable_mask(torch.zeros(6, 8), 2, 4)
