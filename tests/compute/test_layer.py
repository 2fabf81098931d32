"""Sparse layers in autograd: what is computed, and when it is dense."""

from typing import Any

import pytest
import torch
from torch.autograd import forward_ad, gradcheck
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from bame_lightning.blocks.pattern import NMPattern
from bame_lightning.compute.choice import Choice
from bame_lightning.compute.layer import SparseLayer
from bame_lightning.compute.operation import Conv2d, Linear
from tests.compute.layers import close, dense, gradients, random_mask

FOUR = NMPattern(1, 4)
KERNELS = Choice("kernels", "kernels", "kernels")
BAGS = Choice("embedding_bag", "embedding_bag", "dense")
CASES = {
    "linear": (Linear(), (24, 32), (5, 7, 32)),
    "convolution": (Conv2d(padding=(1, 1)), (24, 16, 3, 3), (6, 16, 5, 5)),
}


def make(kind: str, choice: Choice = KERNELS, dtype: torch.dtype = torch.float32) -> tuple[SparseLayer, Any, Any]:
    """A layer, its mask, and leaves: input, weight, bias."""
    operation, shape, source = CASES[kind]
    mask = random_mask(shape, FOUR)
    weight = torch.randn(shape, dtype=dtype) * mask
    leaves = [torch.randn(source, dtype=dtype), weight, torch.randn(shape[0], dtype=dtype)]
    return SparseLayer(operation, mask, FOUR, choice, dtype), mask, [leaf.requires_grad_() for leaf in leaves]


@pytest.mark.parametrize("kind", CASES)
def test_the_gradient_holds_values_where_kept_and_where_asked(kind: str) -> None:
    layer, mask, leaves = make(kind)
    y = layer(*leaves)
    gradient = torch.randn_like(y)
    wanted = gradients(layer.operation, *leaves, gradient)
    contenders = torch.tensor([5, 2, 7 * 16 + 3])
    asked = mask.movedim(1, -1).clone(memory_format=torch.contiguous_format)
    asked.view(-1)[contenders] = True
    for more, whole, at in ((None, False, mask), (contenders, False, asked.movedim(-1, 1)), (None, True, mask | True)):
        layer.contenders, layer.whole_gradient = more, whole
        y = layer(*leaves)
        close(y, dense(layer.operation, *leaves))
        of_x, of_weight, of_bias = torch.autograd.grad(y, leaves, gradient)
        close(of_x, wanted[0])
        close(of_weight, wanted[1] * at)
        close(of_bias, wanted[2])


@pytest.mark.parametrize("choice", [BAGS, Choice(weight_gradient="kernels"), Choice(input_gradient="kernels")])
def test_phases_mix(choice: Choice) -> None:
    layer, mask, leaves = make("linear", choice)
    y = layer(*leaves)
    gradient = torch.randn_like(y)
    wanted = gradients(layer.operation, *leaves, gradient)
    y.backward(gradient)
    close(y, dense(layer.operation, *leaves))
    close(leaves[0].grad, wanted[0])
    close(leaves[1].grad, wanted[1] * (mask | (choice.weight_gradient == "dense")))


@pytest.mark.parametrize("kind", CASES)
def test_gradients_agree_with_differences(kind: str) -> None:
    layer, _, (x, _, bias) = make(kind, dtype=torch.float64)
    weight = torch.randn(CASES[kind][1], dtype=torch.float64) * random_mask(CASES[kind][1], FOUR)
    assert gradcheck(lambda x, bias: layer(x, weight, bias), (x, bias), fast_mode=True)


@pytest.mark.parametrize("kind", CASES)
def test_the_second_derivative_is_that_of_the_dense_product(kind: str) -> None:
    layer, mask, leaves = make(kind, dtype=torch.float64)

    def penalty(call: Any) -> list[torch.Tensor]:
        y = call(*leaves)
        of_x, of_weight = torch.autograd.grad((y**3).sum(), leaves[:2], create_graph=True)
        return list(torch.autograd.grad((of_x**2).sum() + (of_weight**2).sum(), leaves))

    found, wanted = penalty(layer), penalty(lambda *a: dense(layer.operation, *a))
    close(found[0], wanted[0])
    close(found[1][mask], wanted[1][mask])  # elsewhere a sparse gradient is a part of it
    close(found[2], wanted[2])


@pytest.mark.parametrize("where", range(3))
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("kind", "choice"), [("linear", KERNELS), ("linear", BAGS), ("convolution", KERNELS)])
def test_what_is_not_finite_spreads_as_in_dense_products(kind: str, choice: Choice, bad: float, where: int) -> None:
    layer, mask, leaves = make(kind, choice)
    x, weight, bias = (leaf.detach().clone() for leaf in leaves)
    gradient = torch.randn_like(dense(layer.operation, x, weight, bias))
    at = (x, weight, gradient)[where]
    at[tuple(mask.nonzero()[9].tolist()) if where == 1 else (0,) * at.dim()] = bad
    wanted = [dense(layer.operation, x, weight, bias), *gradients(layer.operation, x, weight, bias, gradient)]
    sparse = [leaf.requires_grad_() for leaf in (x, weight, bias)]
    y = layer(*sparse)
    y.backward(gradient)
    found = [y, *(leaf.grad for leaf in sparse)]
    for place, (one, other) in enumerate(zip(found, wanted, strict=True)):
        here = mask if place == 2 else torch.ones_like(other, dtype=torch.bool)
        torch.testing.assert_close(one.detach()[here], other.detach()[here], equal_nan=True, rtol=1e-4, atol=1e-4)


def test_other_weights_than_the_masks_are_multiplied_whole() -> None:
    layer, _, (x, weight, bias) = make("linear")
    average = torch.rand_like(weight).detach().requires_grad_()
    y = layer(x, average, bias)
    torch.testing.assert_close(y, dense(layer.operation, x, average, bias))
    gradient = torch.randn_like(y)
    wanted = gradients(layer.operation, x, average, bias, gradient)
    for found, one in zip(torch.autograd.grad(y, (x, average, bias), gradient), wanted, strict=True):
        close(found, one)


def test_a_mask_that_changes_before_the_backward_pass_is_not_used_for_it() -> None:
    layer, _, leaves = make("linear")
    y = layer(*leaves)
    gradient = torch.randn_like(y)
    wanted = gradients(layer.operation, *leaves, gradient)
    layer.update(random_mask((24, 32), FOUR, seed=1))
    for found, one in zip(torch.autograd.grad(y, leaves, gradient), wanted, strict=True):
        close(found, one)


def test_accumulation_and_checkpointing() -> None:
    layer, mask, leaves = make("linear")
    gradient = torch.randn(5, 7, 24)
    wanted = gradients(layer.operation, *leaves, gradient)
    for reentrant in (True, False):
        checkpoint(layer, *leaves, use_reentrant=reentrant).backward(gradient)
    close(leaves[0].grad, 2 * wanted[0])
    close(leaves[1].grad, 2 * wanted[1] * mask)


def test_frozen_inputs_weights_and_no_bias() -> None:
    layer, mask, (x, weight, _) = make("convolution")
    gradient = torch.randn(6, 24, 5, 5)
    wanted = gradients(layer.operation, x, weight, None, gradient)
    layer(x.detach(), weight, None).backward(gradient)
    assert x.grad is None
    close(weight.grad, wanted[1] * mask)
    weight.grad = None
    layer(x, weight.detach(), None).backward(gradient)
    assert weight.grad is None
    close(x.grad, wanted[0])
    with torch.inference_mode():
        close(layer(x, weight, None), dense(layer.operation, x, weight, None))


def is_dense(layer: SparseLayer, *leaves: Any) -> bool:
    """Whether a call has the dense product's node in its graph."""
    return "Multiply" not in layer(*leaves).grad_fn.name()


def test_what_cannot_be_sparse_is_dense_and_says_why() -> None:
    layer, _, (x, weight, bias) = make("linear")
    assert not is_dense(layer, x, weight, bias)
    assert layer.why_dense(x, weight) == ""
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.why_dense(x, weight) == "autocast computes in another type"
        assert layer(x, weight, bias).dtype == torch.bfloat16
    with FlopCounterMode(display=False) as counter:
        assert layer.why_dense(x, weight) == "a dispatch mode watches the operations"
        assert is_dense(layer, x, weight, bias)
    assert counter.get_total_flops() == 2 * 5 * 7 * 24 * 32
    with forward_ad.dual_level():
        assert layer.why_dense(x, weight) == "forward-mode differentiation"
    torch.func.vmap(lambda one: layer(one, weight, bias))(x)
    torch.func.grad(lambda w: layer(x, w, bias).sum())(weight)
    assert "bfloat16" in layer.why_dense(x.bfloat16(), weight.bfloat16())
    assert "no samples" in layer.why_dense(x[:0], weight)
    assert layer(x[:0], weight, bias).shape == (0, 7, 24)
    torch.testing.assert_close(layer(x[0, 0], weight, bias), dense(layer.operation, x[0, 0], weight, bias))
    layer.suspended = True
    assert layer.why_dense(x, weight) == "suspended"
