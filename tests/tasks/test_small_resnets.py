import pytest
import torch
from torch import nn

from bame_lightning.tasks.small_resnets import BasicBlock, resnet20, resnet32


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("make", [resnet20, resnet32])
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32)])
def test_every_model_fits_every_image(make: object, shape: tuple[int, int, int]) -> None:
    assert make(shape, 7)(torch.randn(2, *shape)).shape == (2, 7)  # type: ignore[operator]


def test_sizes_are_the_published_ones() -> None:
    # He et al. (2016), table 6: 0.27 and 0.46 million on CIFAR-10.
    assert parameters(resnet20()) == 269_722
    assert parameters(resnet32(width=16)) == 464_154
    assert sum(isinstance(module, nn.Conv2d) for module in resnet32().modules()) == 31
    assert resnet32().get_submodule("layer3.4.conv2").weight.shape == (128, 128, 3, 3)


def test_names_of_layers() -> None:
    assert isinstance(resnet20((1, 8, 8), 10).get_submodule("layer3.2.conv2"), nn.Conv2d)


def test_a_block_that_adds_nothing_passes_its_input_on() -> None:
    block = BasicBlock(2, 4, stride=2).eval()
    nn.init.zeros_(block.bn2.weight)
    x = torch.arange(32.0).reshape(1, 2, 4, 4)
    expected = torch.zeros(1, 4, 2, 2)
    expected[0, 0] = torch.tensor([[0.0, 2.0], [8.0, 10.0]])
    expected[0, 1] = torch.tensor([[16.0, 18.0], [24.0, 26.0]])
    torch.testing.assert_close(block(x), expected)
