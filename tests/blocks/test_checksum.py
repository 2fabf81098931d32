"""A checksum that notices what can go wrong with one copy of a mask or a weight."""

from __future__ import annotations

import itertools

import pytest
import torch

from bame_lightning.blocks.checksum import checksum


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.int64, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (5,), (8, 16), (3, 4, 3, 3)])
def test_a_copy_has_the_same_checksum_and_a_change_of_any_value_another(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    tensor = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert checksum(tensor) == checksum(tensor.clone())
    for place in range(tensor.numel()):
        changed = tensor.clone()
        changed.view(-1)[place] = not changed.view(-1)[place]
        assert checksum(changed) != checksum(tensor)


def test_all_masks_of_few_blocks_differ() -> None:
    """Swaps leave the number of ones, and pairs of swaps leave sums over rows and columns."""
    rows = [row for row in itertools.product([False, True], repeat=4) if sum(row) == 2]
    masks = [torch.tensor(choice) for choice in itertools.product(rows, repeat=4)]
    assert len({int(checksum(mask)) for mask in masks}) == len(masks) == 6**4


def test_the_smallest_change_of_a_number_counts() -> None:
    one = torch.ones(16)
    other = one.clone()
    other[3] = torch.nextafter(other[3], torch.tensor(2.0))
    assert checksum(one) != checksum(other)
    assert checksum(torch.tensor([0.0])) != checksum(torch.tensor([-0.0]))


def test_how_a_tensor_lies_in_memory_makes_no_difference() -> None:
    tensor = torch.randn(4, 8, 3, 3)
    assert checksum(tensor) == checksum(tensor.to(memory_format=torch.channels_last))


def test_places_count_in_tensors_that_are_taken_in_pieces() -> None:
    sums = set()
    for place in (0, 1, 2**20 - 1, 2**20, 2**20 + 1, 2**21, 2**21 + 4):
        tensor = torch.zeros(2**21 + 5, dtype=torch.int64)
        tensor[place] = 1
        sums.add(int(checksum(tensor)))
    assert len(sums) == 7
