from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bame_lightning.blocks.masks import nonzero_mask, pack_mask, random_mask, top_n_mask, unpack_mask, zero_pruned_
from bame_lightning.blocks.pattern import NMPattern
from tests.helpers import patterns, random_kept


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 4), (2, 4), (4, 4), (3, 7), (4, 8)])
def test_top_n_keeps_the_best_sum_of_all_choices_and_the_lowest_indices_on_a_tie(n: int, m: int) -> None:
    # Integers from a small range, so that most blocks hold ties.
    scores = torch.randint(-3, 4, (40, m), generator=torch.Generator().manual_seed(0)).float()
    choices = list(itertools.combinations(range(m), n))  # in ascending order of their indices
    for row, mask in zip(scores.tolist(), top_n_mask(scores, n), strict=True):
        best = max(choices, key=lambda kept: sum(row[i] for i in kept))  # the first of the best
        assert mask.nonzero().flatten().tolist() == list(best)


@given(patterns(), st.integers(1, 5), st.integers(0, 1000))
def test_every_mask_keeps_exactly_n_per_block(pattern: NMPattern, blocks: int, seed: int) -> None:
    weight = torch.randint(-2, 3, (blocks, pattern.m), generator=torch.Generator().manual_seed(seed)).float()
    weight_sparse = weight * random_kept(blocks, pattern, seed)
    masks = [top_n_mask(weight, pattern.n), random_mask(weight, pattern.n), nonzero_mask(weight_sparse, pattern.n)]
    for mask in masks:
        assert mask.dtype == torch.bool
        assert mask.shape == weight.shape
        assert mask.sum(-1).tolist() == [pattern.n] * blocks


@pytest.mark.parametrize("n", [0, 5, -1])
def test_n_outside_the_block_is_refused(n: int) -> None:
    with pytest.raises(ValueError, match=rf"`n` must lie in \[1, 4\].*got n={n}"):
        top_n_mask(torch.zeros(2, 4), n)


def test_large_blocks_are_no_trouble() -> None:
    assert top_n_mask(torch.arange(2048.0).reshape(2, 1024), 512).sum(-1).tolist() == [512, 512]


def test_a_random_mask_depends_on_the_weights_alone() -> None:
    weight = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = random_mask(weight, 3)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(6)
    assert torch.equal(random_mask(weight.clone(), 3), first)
    assert not torch.equal(random_mask(weight + 1, 3), first)


def test_a_random_mask_is_random_in_every_position_and_ignores_magnitude() -> None:
    weight = torch.arange(4000.0).reshape(1000, 4)
    share = random_mask(weight, 1).float().mean(0)
    assert ((share > 0.2) & (share < 0.3)).all()  # 0.25 each; four standard deviations are 0.055


def test_half_precision_weights_get_a_random_mask_too() -> None:
    assert random_mask(torch.ones(3, 4, dtype=torch.bfloat16), 2).sum(-1).tolist() == [2, 2, 2]


def test_nonzero_mask_keeps_all_nonzeros_and_fills_up_with_the_first_zeros() -> None:
    blocks = torch.tensor([[0.0, -1.0, 0.0, 2.0], [0.0, 0.0, 0.0, 1e-30], [0.0, 0.0, 0.0, 0.0]])
    expected = [[False, True, False, True], [True, False, False, True], [True, True, False, False]]
    assert nonzero_mask(blocks, 2).tolist() == expected


def test_nonzero_mask_names_the_first_block_with_too_many() -> None:
    blocks = torch.tensor([[0.0, 1.0, 0.0, 1.0], [1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    says = r"`init='nonzero'`.*at most 2 non-zeros per block of 4; 2 of 3 blocks.*block 1\. Use `init='magnitude'`"
    with pytest.raises(ValueError, match=says):
        nonzero_mask(blocks, 2)


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_packing_is_numpys_little_endian_packing(bits: list[bool]) -> None:
    mask = torch.tensor(bits)
    packed = pack_mask(mask)
    assert packed.numpy().tolist() == np.packbits(bits, bitorder="little").tolist()
    assert unpack_mask(packed, mask.shape).tolist() == bits


def test_packing_follows_row_major_order_whatever_the_layout() -> None:
    mask = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)) > 0.5
    packed = pack_mask(mask.to(memory_format=torch.channels_last))
    assert packed.tolist() == np.packbits(mask.numpy().ravel(), bitorder="little").tolist()
    assert torch.equal(unpack_mask(packed, mask.shape), mask)


@pytest.mark.parametrize("shape", [(8,), (17,), (4, 6)])
def test_unpacking_into_another_size_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"takes \d bytes; got 2"):
        unpack_mask(torch.zeros(2, dtype=torch.uint8), torch.Size(shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 4), (700, 500), (1, 300_000), (24, 64, 16, 16)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_zeroing_leaves_what_is_kept_alone_and_nothing_of_the_rest(
    dtype: torch.dtype, shape: tuple[int, ...], channels_last: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(shape, generator=generator).to(dtype)
    kept = torch.rand(shape, generator=generator) < 0.4
    if channels_last and len(shape) == 4:
        values, kept = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (values, kept))
    for index, worst in enumerate((math.inf, -math.inf, math.nan, torch.finfo(dtype).tiny)):
        values[kept.logical_not().nonzero()[index].unbind()] = worst
        values[kept.nonzero()[index].unbind()] = worst
    expected = [v if k else 0.0 for v, k in zip(values.flatten().tolist(), kept.flatten().tolist(), strict=True)]
    storage = values.data_ptr()
    zero_pruned_(values, kept)
    assert values.data_ptr() == storage
    assert all(a == b or (a != a and b != b) for a, b in zip(values.flatten().tolist(), expected, strict=True))


def test_zeroing_by_one_condition() -> None:
    values = torch.tensor([[1.0, math.nan], [math.inf, -2.0]])
    copy = values.clone()
    zero_pruned_(values, torch.tensor(True))
    torch.testing.assert_close(values, copy, equal_nan=True)
    zero_pruned_(values, torch.tensor(False))
    assert values.tolist() == [[0, 0], [0, 0]]
