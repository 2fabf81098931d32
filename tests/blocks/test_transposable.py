from __future__ import annotations

from itertools import combinations, permutations, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bame_lightning.blocks.masks import top_n_mask
from bame_lightning.blocks.pattern import NMPattern
from bame_lightning.blocks.transposable import (
    both_ways_mask,
    column_counts,
    fits_both_ways,
    fits_forward,
    transposable_mask,
)


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


@pytest.mark.parametrize(("n", "m"), [(n, m) for m in range(1, 13) for n in range(1, m + 1)])
def test_patterns_that_fit_forward_are_those_of_which_every_mask_does(n: int, m: int) -> None:
    block = [tuple(int(i in kept) for i in range(m)) for kept in combinations(range(m), n)]
    # Four inputs lie in as many blocks as they must: the fullest neighbours tell.
    first, last = (max(block, key=key) for key in (lambda b: b[::-1], lambda b: b))
    rows = [a + b + c for a, b, c in product({first, last, *block[:1]}, repeat=3)] if m > 1 else [(1, 1, 1, 1)]
    most = max(sum(row[start : start + 4]) for row in rows for start in range(0, len(row), 4))
    assert fits_forward(NMPattern(n, m)) == (most <= 2)


def counted(mask: torch.Tensor) -> list[int]:
    """What every four consecutive rows of a column keep, one by one."""
    rows, columns = mask.shape
    return [int(mask[row : row + 4, column].sum()) for row in range(0, rows, 4) for column in range(columns)]


BOTH_WAYS = [(1, 2), (1, 3), (1, 4), (1, 8), (1, 16), (2, 4)]


@pytest.mark.parametrize(("n", "m"), BOTH_WAYS)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 11])
def test_a_repaired_mask_fits_both_ways_and_whatever_did_is_left_alone(n: int, m: int, rows: int) -> None:
    repaired = 0
    for seed in range(30):
        weight = torch.randn(rows, 3 * m, generator=torch.Generator().manual_seed(seed))
        weight[:, 0] *= 3  # a column that many rows want
        mask = top_n_mask(weight.abs().view(-1, m), n)
        new = both_ways_mask(mask, weight.view(-1, m), rows)
        assert (new.sum(1) == n).all()
        found = counted(new.view(rows, -1))
        assert max(found) <= 2
        assert fits_both_ways(new, rows)
        assert column_counts(mask, rows).flatten().tolist() == counted(mask.view(rows, -1))
        for row in range(0, rows, 4):
            for block in range(3):
                place = slice(row, row + 4), slice(block * m, block * m + m)
                if max(counted(mask.view(rows, -1)[place])) <= 2:
                    assert torch.equal(new.view(rows, -1)[place], mask.view(rows, -1)[place])
        repaired += not torch.equal(new, mask)
    assert (repaired > 0) == (rows > 2)


@pytest.mark.parametrize(("n", "m"), BOTH_WAYS)
@pytest.mark.parametrize("rows", [3, 4])
def test_no_mask_that_fits_both_ways_keeps_more_of_the_first_one(n: int, m: int, rows: int) -> None:
    choices = torch.tensor([[i in kept for i in range(m)] for kept in combinations(range(m), n)])
    every = torch.tensor(list(product(range(len(choices)), repeat=rows)))
    masks = choices[every]
    masks = masks[masks.sum(1).amax(-1) <= 2]
    for seed in range(10):
        weight = torch.randn(rows, m, generator=torch.Generator().manual_seed(seed))
        weight[:, 0] *= 3
        first = top_n_mask(weight.abs(), n)
        repaired = both_ways_mask(first, weight, rows)
        retained = (masks & first).sum((1, 2))
        most = retained.max()
        assert (repaired & first).sum() == most
        if n > 1:
            continue  # what completes short rows moves weights, for as many
        # Of the masks that keep as many, it keeps the largest of them.
        sizes = (weight.abs() * (masks & first)).sum((1, 2))[retained == most]
        assert (weight.abs() * (repaired & first)).sum() == pytest.approx(float(sizes.max()), abs=1e-5)
