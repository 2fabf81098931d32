import pytest
import torch
from torch import nn

from bame_lightning.tasks.models import BasicBlock, Shape, cnn, mlp, resnet18, resnet20


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("make", [mlp, cnn, resnet20, resnet18])
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 64, 64)])
def test_every_model_fits_every_image(make: object, shape: Shape) -> None:
    model = make(shape, 7)  # type: ignore[operator]
    assert model(torch.randn(2, *shape)).shape == (2, 7)


def test_names_of_layers() -> None:
    assert [name for name, _ in mlp((1, 8, 8), 10).named_parameters()][::2] == [
        "hidden1.weight",
        "hidden2.weight",
        "fc.weight",
    ]
    convolutions = [name for name, module in cnn((1, 8, 8), 10).named_modules() if isinstance(module, nn.Conv2d)]
    assert convolutions == ["conv1", "conv2", "conv3"]
    assert isinstance(resnet20((1, 8, 8), 10).get_submodule("layer3.2.conv2"), nn.Conv2d)
    assert isinstance(resnet18((1, 8, 8), 10).get_submodule("layer4.1.conv2"), nn.Conv2d)


def test_sizes_are_the_published_ones() -> None:
    assert parameters(mlp((1, 28, 28), 10)) == 784 * 512 + 512 + 512 * 512 + 512 + 512 * 10 + 10
    assert parameters(cnn((1, 28, 28), 10)) == 9 * (32 + 32 * 64 + 64 * 128) + 2 * (32 + 64 + 128) + 128 * 10 + 10
    # He et al. (2016), table 6: 0.27 and 0.46 million on CIFAR-10.
    assert parameters(resnet20((3, 32, 32), 10)) == 269_722
    assert parameters(resnet20((3, 32, 32), 10, blocks_per_stage=5)) == 464_154
    # torchvision's documentation of resnet18.
    assert parameters(resnet18((3, 224, 224), 1000)) == 11_689_512


def test_widths_are_chosen() -> None:
    hidden = [layer.out_features for layer in mlp((1, 8, 8), 10, hidden=[5, 6]) if isinstance(layer, nn.Linear)]
    assert hidden == [5, 6, 10]
    wide = resnet20((3, 32, 32), 10, width=32, blocks_per_stage=5)
    assert wide.get_submodule("layer3.4.conv2").weight.shape == (128, 128, 3, 3)


def test_a_block_that_adds_nothing_passes_its_input_on() -> None:
    block = BasicBlock(2, 4, stride=2).eval()
    nn.init.zeros_(block.bn2.weight)
    x = torch.arange(32.0).reshape(1, 2, 4, 4)
    expected = torch.zeros(1, 4, 2, 2)
    expected[0, 0] = torch.tensor([[0.0, 2.0], [8.0, 10.0]])
    expected[0, 1] = torch.tensor([[16.0, 18.0], [24.0, 26.0]])
    torch.testing.assert_close(block(x), expected)
