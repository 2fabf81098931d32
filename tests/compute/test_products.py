"""Sparse products equal dense ones of the same weights."""

import pytest
import torch

from bame_lightning.blocks.pattern import NMPattern
from bame_lightning.compute.bags import BagProducts
from bame_lightning.compute.native.products import KernelProducts
from bame_lightning.compute.operation import Conv2d, Linear
from tests.compute.layers import CONVOLUTIONS, DTYPES, LINEAR, PATTERNS, close, dense, gradients, random_mask

FOUR = NMPattern(1, 4)


def positions(mask: torch.Tensor, also: torch.Tensor) -> torch.Tensor:
    """The mask, and the numbered positions beside it: by filter, kernel position, input."""
    inputs_last = mask.movedim(1, -1).clone(memory_format=torch.contiguous_format)
    inputs_last.view(-1)[also] = True
    return inputs_last.movedim(-1, 1)


def compare(operation, products, mask, x, weight, bias) -> None:
    """All three products, with and without further positions of the weight gradient."""
    values = products.values(weight)
    wanted = dense(operation, x, weight, bias)
    found = products.forward(x, values, bias)
    close(found, wanted)
    gradient = torch.randn(wanted.shape, dtype=wanted.dtype, generator=torch.Generator().manual_seed(3))
    of_input, of_weight = gradients(operation, x, weight, bias, gradient)[:2]
    close(products.input_gradient(gradient, values, x), of_input)
    if isinstance(products, BagProducts):
        return
    also = torch.randperm(mask.numel(), generator=torch.Generator().manual_seed(4))[: mask.numel() // 7].sort().values
    kept = products.weight_gradient(gradient, x, weight)
    close(kept, of_weight * mask)
    assert kept.stride() == weight.stride()
    close(products.weight_gradient(gradient, x, weight, also), of_weight * positions(mask, also))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize(("out", "inp", "batch"), LINEAR)
@pytest.mark.parametrize("kind", [KernelProducts, BagProducts])
def test_linear(kind, out, inp, batch, pattern, dtype) -> None:
    mask = random_mask((out, inp), pattern)
    weight = torch.randn(out, inp, dtype=dtype) * mask
    x, bias = torch.randn(*batch, inp, dtype=dtype), torch.randn(out, dtype=dtype)
    compare(Linear(), kind(Linear(), mask, pattern, dtype), mask, x, weight, bias)


@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_convolution(case, pattern, dtype, last) -> None:
    operation, kernel, out, inp, batch, height, width = case
    shape = (out, inp // operation.groups, *kernel)
    mask = random_mask(shape, pattern)
    weight, x = torch.randn(shape, dtype=dtype) * mask, torch.randn(batch, inp, height, width, dtype=dtype)
    if last:
        weight, x = (t.to(memory_format=torch.channels_last) for t in (weight, x))
    compare(operation, KernelProducts(operation, mask, pattern, dtype), mask, x, weight, torch.randn(out, dtype=dtype))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads_gives_the_same_bits(threads) -> None:
    before = torch.get_num_threads()
    mask = random_mask((70, 64, 3, 3), FOUR)
    weight, x = torch.randn(mask.shape) * mask, torch.randn(20, 64, 6, 6)
    operation = Conv2d(padding=(1, 1))
    made = []
    for count in (1, threads):
        torch.set_num_threads(count)
        products = KernelProducts(operation, mask, FOUR, torch.float32)
        values = products.values(weight)
        y = products.forward(x, values, None)
        made.append((y, products.input_gradient(y, values, x), products.weight_gradient(y, x, weight)))
    torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*made, strict=True))


@pytest.mark.parametrize("kind", [KernelProducts, BagProducts])
def test_memory_in_any_order(kind) -> None:
    mask = random_mask((24, 32), FOUR)
    stored = (torch.randn(24, 32) * mask).t().contiguous()  # as GPT-2 stores it
    x = torch.randn(40, 2, 64)[::2, :, ::2]
    compare(Linear(), kind(Linear(), mask.t().contiguous().t(), FOUR, torch.float32), mask, x, stored.t(), None)


def test_images_in_any_order() -> None:
    operation, mask = Conv2d(padding=(1, 1)), random_mask((8, 16, 3, 3), FOUR)
    weight = torch.randn(mask.shape) * mask
    x = torch.randn(7, 6, 5, 32)[..., ::2].permute(0, 3, 2, 1)
    compare(operation, KernelProducts(operation, mask, FOUR, torch.float32), mask, x, weight, None)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", [KernelProducts, BagProducts])
def test_what_is_not_finite_is_left_to_dense_products(kind, bad) -> None:
    mask = random_mask((24, 32), FOUR)
    weight, x, gradient = torch.randn(24, 32) * mask, torch.randn(40, 32), torch.randn(40, 24)
    products = kind(Linear(), mask, FOUR, torch.float32)
    values = products.values(weight)
    bad_x, bad_gradient, bad_weight = x.clone(), gradient.clone(), weight.clone()
    bad_x[39, 31] = bad_gradient[0, 0] = bad
    bad_weight[mask.nonzero()[5].tolist()[0], mask.nonzero()[5].tolist()[1]] = bad
    assert products.values(bad_weight) is None
    assert products.forward(bad_x, values, None) is None
    assert products.input_gradient(bad_gradient, values, x) is None
    assert products.weight_gradient(bad_gradient, x, weight) is None
    assert products.weight_gradient(gradient, bad_x, weight) is None


@pytest.mark.parametrize("kind", [KernelProducts, BagProducts])
def test_weights_beside_the_mask_are_noticed(kind) -> None:
    mask = random_mask((24, 32), FOUR)
    weight = torch.randn(24, 32) * mask
    products = kind(Linear(), mask, FOUR, torch.float32)
    for stored in (weight, weight.t().contiguous().t()):
        assert products.values(stored) is not None
        other = stored.clone()
        other[tuple((~mask).nonzero()[7].tolist())] = 1e-30
        assert products.values(other) is None


@pytest.mark.parametrize(
    ("operation", "shape", "source"), [(Linear(), (24, 32), (40, 32)), (Conv2d(), (6, 16, 3, 3), (5, 16, 7, 7))]
)
def test_positions_in_any_order_within_a_row(operation, shape, source) -> None:
    mask = random_mask(shape, FOUR)
    weight, x = torch.randn(shape) * mask, torch.randn(source)
    gradient = torch.randn_like(operation.forward(x, weight, None))
    products = KernelProducts(operation, mask, FOUR, torch.float32)
    row = weight[0].numel()
    also = torch.cat([row * place + torch.randperm(row)[: 7 * (place % 3)] for place in range(shape[0])])
    ordered = products.weight_gradient(gradient, x, weight, also.sort().values)
    assert torch.equal(products.weight_gradient(gradient, x, weight, also), ordered)
    assert torch.equal(products.weight_gradient(gradient, x, weight, also.view(-1, 7)), ordered)


@pytest.mark.parametrize("wrong", [[5, -1], [5, 24 * 32], [24 * 32, 5], [40, 5], [5, 70, 6], [-3, 5]])
def test_positions_of_no_weight_or_of_mixed_rows_are_refused(wrong) -> None:
    mask = random_mask((24, 32), FOUR)
    weight, x, gradient = torch.randn(24, 32) * mask, torch.randn(40, 32), torch.randn(40, 24)
    products = KernelProducts(Linear(), mask, FOUR, torch.float32)
    with pytest.raises(ValueError, match="positions from 0 to 767, all of a row before those of the next"):
        products.weight_gradient(gradient, x, weight, torch.tensor(wrong))
