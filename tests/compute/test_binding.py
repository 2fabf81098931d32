"""Modules compute sparsely for a while, and are what they were afterwards."""

import copy
import pickle
import subprocess
import sys
from collections import OrderedDict

import pytest
import torch
from torch import nn

from bame_lightning.blocks.pattern import NMPattern
from bame_lightning.compute.binding import BYPASSED, BoundForward, bind, operation_of, why_not
from bame_lightning.compute.choice import Choice
from bame_lightning.compute.operation import Conv2d, Linear
from tests.compute.layers import close, random_mask

FOUR = NMPattern(1, 4)
KERNELS = Choice("kernels", "kernels", "kernels")
CONVOLUTIONS = [
    nn.Conv2d(16, 8, 3),
    nn.Conv2d(16, 8, 3, padding="same", bias=False),
    nn.Conv2d(16, 8, (2, 4), padding="same", dilation=(1, 3)),
    nn.Conv2d(16, 8, 3, padding="valid"),
    nn.Conv2d(16, 8, 3, stride=2, padding=1, padding_mode="circular"),
    nn.Conv2d(16, 8, 3, padding=(1, 2), padding_mode="reflect", groups=2),
]


def masked(module: nn.Module, seed: int = 0) -> torch.Tensor:
    """Prune a module; its mask."""
    mask = random_mask(tuple(module.weight.shape), FOUR, seed)
    with torch.no_grad():
        module.weight.mul_(mask)
    return mask


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("module", [nn.Linear(16, 8), nn.Linear(16, 8, bias=False), *CONVOLUTIONS], ids=str)
def test_a_bound_module_computes_what_it_did(module: nn.Module) -> None:
    module = copy.deepcopy(module)
    mask = masked(module)
    x = torch.randn(5, 16, *[9, 10][: module.weight.dim() - 2]).requires_grad_()
    wanted = module(x)
    gradient = torch.randn_like(wanted)
    of_x, of_weight = torch.autograd.grad(wanted, (x, module.weight), gradient)
    attributes = set(vars(module))
    names = [name for name, _ in (*module.named_parameters(), *module.named_buffers(), *module.named_modules())]
    bound = bind(module, mask, FOUR, KERNELS)
    found = module(x)
    assert "Multiply" in found.grad_fn.name()
    close(found, wanted)
    mine = torch.autograd.grad(found, (x, module.weight), gradient)
    close(mine[0], of_x)
    close(mine[1], of_weight * mask)
    assert names == [n for n, _ in (*module.named_parameters(), *module.named_buffers(), *module.named_modules())]
    bound.unbind()
    assert set(vars(module)) == attributes
    assert torch.equal(module(x), wanted)
    bound.unbind()


def test_copies_compute_densely_by_themselves() -> None:
    model = nn.Sequential(OrderedDict(first=nn.Linear(16, 16), second=nn.Linear(16, 4)))
    mask = masked(model.first)
    bind(model.first, mask, FOUR, KERNELS)
    x = torch.randn(3, 16)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(copy.deepcopy(model))):
        assert copied.first.weight is not model.first.weight
        close(copied(x), model(x))
        with torch.no_grad():
            copied.first.weight.fill_(1.0)  # no mask any more
            wanted = copied.second(nn.functional.linear(x, copied.first.weight, copied.first.bias))
            torch.testing.assert_close(copied(x), wanted)
        copied(x).sum().backward()
        assert copied.first.weight.grad.count_nonzero() == 256
        assert model.first.weight.grad is None
    assert isinstance(vars(model.first)["forward"], BoundForward)


def test_hooks_scripts_of_the_module_and_functional_calls() -> None:
    module = nn.Linear(16, 8)
    mask = masked(module)
    bind(module, mask, FOUR, KERNELS)
    seen = []
    module.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    x = torch.randn(3, 16)
    module(x)
    assert seen == [(3, 8)]
    other = {"weight": torch.randn(8, 16), "bias": torch.randn(8)}
    wanted = nn.functional.linear(x, other["weight"], other["bias"])
    torch.testing.assert_close(torch.func.functional_call(module, other, (x,)), wanted)
    torch.testing.assert_close(module(input=x), nn.functional.linear(x, module.weight, module.bias))


COMPILED = """
import torch
from bame_lightning.blocks.pattern import NMPattern
from bame_lightning.compute.binding import bind
from bame_lightning.compute.choice import Choice
mask = (torch.arange(16) % 4 == 1).expand(8, 16).contiguous()
module, x = torch.nn.Linear(16, 8), torch.randn(3, 16)
with torch.no_grad():
    module.weight.mul_(mask)
wanted = module(x)
bind(module, mask, NMPattern(1, 4), Choice("kernels", "kernels", "kernels"))
assert "Multiply" in module(x).grad_fn.name()
for found in (
    torch.compile(module, backend="eager", fullgraph=True)(x),
    torch.jit.trace(module, x, check_trace=False)(x),
    torch.export.export(module, (x,)).module()(x),
):
    torch.testing.assert_close(found, wanted)
    assert "Multiply" not in found.grad_fn.name()
"""


def test_a_compiled_module_is_dense() -> None:
    # In a process of its own, without the checks of types, which a compiler cannot look through.
    ended = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


def test_what_cannot_be_bound_says_why() -> None:
    class Own(nn.Linear):
        def forward(self, x):
            return x

    attention = nn.MultiheadAttention(16, 2)
    assert why_not(attention.out_proj) == BYPASSED
    inside = nn.MultiheadAttention(16, 2)
    inside.extra = nn.Linear(16, 16)
    assert why_not(inside.extra, nn.Sequential(inside)) == BYPASSED
    assert why_not(Own(4, 4)) == "its class has a forward pass of its own"
    assert why_not(nn.Conv1d(4, 4, 3)) == "no product for Conv1d"
    assert why_not(nn.Linear(4, 4).bfloat16()) == "its weight is bfloat16 on cpu"
    assert why_not(nn.Linear(4, 4, device="meta")) == "its weight is float32 on meta"
    assert "computed from other" in why_not(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    replaced = nn.Linear(16, 4)
    mask = masked(replaced)
    bind(replaced, mask, FOUR, KERNELS)
    assert why_not(replaced) == "somebody has replaced its forward pass"
    with pytest.raises(ValueError, match="`module` Linear can only be computed densely: somebody has replaced"):
        bind(replaced, mask, FOUR, KERNELS)
    assert operation_of(nn.Conv2d(4, 4, 3, 2, 1)) == Conv2d((2, 2), (1, 1))
    assert operation_of(nn.Linear(4, 4)) == Linear()


def test_conv1d_of_gpt2() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    module = conv1d(8, 16)  # out, in; stored (in, out)
    mask = random_mask((8, 16), FOUR)
    with torch.no_grad():
        module.weight.mul_(mask.t())
    x = torch.randn(3, 5, 16)
    wanted = module(x)
    gradient = torch.randn_like(wanted)
    (of_weight,) = torch.autograd.grad(wanted, module.weight, gradient)
    bind(module, mask, FOUR, KERNELS)
    found = module(x)
    assert "Multiply" in found.grad_fn.name()
    close(found, wanted)
    found.backward(gradient)
    close(module.weight.grad, of_weight * mask.t())
    assert module.weight.grad.shape == (16, 8)


def test_a_module_that_trains_bound_ends_as_one_that_trains_densely() -> None:
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Conv2d(16, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 9, 4)).double()]
    masks = [masked(models[0][place], place) for place in (0, 3)]
    models.append(copy.deepcopy(models[0]))
    for place, mask in zip((0, 3), masks, strict=True):
        bind(models[1][place], mask, FOUR, KERNELS)
    optimizers = [torch.optim.SGD(model.parameters(), 0.01, momentum=0.9) for model in models]
    for _ in range(5):
        x = torch.randn(6, 16, 5, 5, dtype=torch.float64)
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            for place, mask in zip((0, 3), masks, strict=True):
                model[place].weight.grad.mul_(mask)
            optimizer.step()
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        close(one.detach(), other.detach())
