"""The index follows a mask as it changes."""

import pytest
import torch

from bame_lightning.blocks.pattern import NMPattern
from bame_lightning.compute.kept import KeptIndex
from bame_lightning.compute.native.build import kernels
from bame_lightning.compute.native.products import KernelProducts
from bame_lightning.compute.operation import Conv2d, Linear
from tests.compute.layers import PATTERNS, random_mask


@pytest.mark.parametrize("native", [False, True])
def test_columns_count_kernel_positions_then_inputs(native: bool) -> None:
    mask = torch.zeros(2, 4, 1, 2, dtype=torch.bool)
    for out, inp, x in [(0, 1, 0), (0, 2, 0), (0, 0, 1), (0, 3, 1), (1, 0, 0), (1, 1, 0), (1, 2, 1), (1, 3, 1)]:
        mask[out, inp, 0, x] = True
    for stored in (mask, mask.to(memory_format=torch.channels_last)):
        index = KeptIndex(stored, NMPattern(2, 4), library=kernels() if native else None)
        assert index.columns.tolist() == [[1, 2, 4, 7], [0, 1, 6, 7]]


def lists(products: KernelProducts) -> list[list[tuple[int, int]]]:
    """The transposed lists as they stand."""
    made = products.index.lists
    return [
        list(zip(made.slot[a:b].tolist(), made.where[a:b].tolist(), strict=True))
        for a, b in zip(made.begin[:-1].tolist(), made.end.tolist(), strict=True)
    ]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize(
    ("operation", "shape"),
    [(Linear(), (30, 48)), (Conv2d((2, 1), (1, 1), groups=2), (12, 32, 3, 3))],
    ids=["linear", "conv"],
)
def test_an_index_that_was_updated_is_that_of_the_new_mask(operation, shape, pattern) -> None:
    products = KernelProducts(operation, random_mask(shape, pattern), pattern, torch.float32)
    _ = products.index.lists
    for seed in range(1, 12):  # lists fill up on the way, and are made anew
        mask = random_mask(shape, pattern, seed)
        if seed % 2:  # rows that did not change stay as they are
            rows = torch.randperm(shape[0])[:3]
            old = random_mask(shape, pattern, seed - 1)
            old[rows] = mask[rows]
            products.update(old, rows)
            fresh = KernelProducts(operation, old, pattern, torch.float32)
            assert torch.equal(products.index.columns, fresh.index.columns)
            assert lists(products) == lists(fresh)
        products.update(mask)
        fresh = KernelProducts(operation, mask, pattern, torch.float32)
        assert torch.equal(products.index.columns, fresh.index.columns)
        assert lists(products) == lists(fresh)


def test_an_update_tells_how_many_blocks_changed() -> None:
    mask = random_mask((8, 16), NMPattern(1, 4))
    index = KeptIndex(mask, NMPattern(1, 4), library=kernels())
    assert (index.update(mask), index.version) == (0, 0)
    mask[3, 4:8] = mask[3, 4:8].roll(1)
    mask[5, 0:4] = mask[5, 0:4].roll(1)
    assert (index.update(mask), index.version) == (2, 1)


@pytest.mark.parametrize("native", [False, True])
def test_a_mask_that_keeps_another_number_is_refused(native: bool) -> None:
    library = kernels() if native else None
    mask = random_mask((8, 16), NMPattern(1, 4))
    index = KeptIndex(mask, NMPattern(1, 4), library=library)
    mask[6] = False
    for refused in (lambda: KeptIndex(mask, NMPattern(1, 4), library=library), lambda: index.update(mask)):
        with pytest.raises(ValueError, match="exactly 1 of every 4 weights; in output row 6"):
            refused()
    with pytest.raises(ValueError, match="16 inputs, which 3 does not divide"):
        KeptIndex(mask, NMPattern(1, 3), library=library)
