"""Models built for a data set: functions of its input shape and its number of classes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torchvision
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

Shape = tuple[int, int, int]


def mlp(input_shape: Shape, num_classes: int, hidden: Sequence[int] = (512, 512)) -> nn.Sequential:
    """Fully connected network with ReLU.

    Args:
        input_shape: Channels, height and width of an image.
        num_classes: Outputs.
        hidden: Width of each hidden layer.

    Returns:
        The network; its layers are called `hidden1`, `hidden2`, ... and `fc`.
    """
    layers = OrderedDict[str, nn.Module](flatten=nn.Flatten())
    width = input_shape[0] * input_shape[1] * input_shape[2]
    for index, next_width in enumerate(hidden, 1):
        layers[f"hidden{index}"] = nn.Linear(width, next_width)
        layers[f"relu{index}"] = nn.ReLU()
        width = next_width
    layers["fc"] = nn.Linear(width, num_classes)
    return nn.Sequential(layers)


def cnn(input_shape: Shape, num_classes: int, widths: Sequence[int] = (32, 64, 128)) -> nn.Sequential:
    """Plain convolutional network: 3x3 convolutions of stride 2, batch norm, ReLU, average pooling, linear.

    Args:
        input_shape: Channels, height and width of an image.
        num_classes: Outputs.
        widths: Channels of each convolution.

    Returns:
        The network; its layers are called `conv1`, `conv2`, ... and `fc`.
    """
    layers = OrderedDict[str, nn.Module]()
    channels = input_shape[0]
    for index, width in enumerate(widths, 1):
        layers[f"conv{index}"] = nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=False)
        layers[f"bn{index}"] = nn.BatchNorm2d(width)
        layers[f"relu{index}"] = nn.ReLU()
        channels = width
    layers["pool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["fc"] = nn.Linear(channels, num_classes)
    return nn.Sequential(layers)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut without parameters (option A of He et al. 2016).

    Args:
        channels: Input channels.
        width: Output channels, at least as many.
        stride: Of the first convolution.
    """

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride, self.new_channels = stride, width - channels

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch out newheight newwidth"]:
        """Add the branch to its input, subsampled and padded with zero channels where the shape changes."""
        out = functional.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        shortcut = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))
        return functional.relu(out + shortcut)


def resnet20(input_shape: Shape, num_classes: int, width: int = 16, blocks_per_stage: int = 3) -> nn.Sequential:
    """Residual network for small images (He et al. 2016, section 4.2): 6 `blocks_per_stage` + 2 layers.

    Args:
        input_shape: Channels, height and width of an image.
        num_classes: Outputs.
        width: Channels of the first stage; the second has twice, the third four times as many.
        blocks_per_stage: 3 makes ResNet-20; 5 makes ResNet-32, which N:M papers train with `width` 32.

    Returns:
        The network; its layers are called `conv1`, `layer1.0.conv1`, ... and `fc`.
    """
    layers = OrderedDict[str, nn.Module](
        conv1=nn.Conv2d(input_shape[0], width, 3, padding=1, bias=False), bn1=nn.BatchNorm2d(width), relu=nn.ReLU()
    )
    channels = width
    for stage in range(3):
        blocks = []
        for index in range(blocks_per_stage):
            stride = 2 if stage > 0 and index == 0 else 1
            blocks.append(BasicBlock(channels, width * 2**stage, stride))
            channels = width * 2**stage
        layers[f"layer{stage + 1}"] = nn.Sequential(*blocks)
    layers["pool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["fc"] = nn.Linear(channels, num_classes)
    network = nn.Sequential(layers)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network


def resnet18(input_shape: Shape, num_classes: int) -> nn.Module:
    """ResNet-18 of torchvision, its stem fitted to the images.

    Args:
        input_shape: Channels, height and width of an image. Below 64 pixels the stem becomes a 3x3 convolution of
            stride 1 without pooling, as is usual for small images.
        num_classes: Outputs.

    Returns:
        The network, with torchvision's names of layers.
    """
    network: nn.Module = torchvision.models.resnet18(num_classes=num_classes)
    small = min(input_shape[1:]) < 64
    kernel, stride, padding = (3, 1, 1) if small else (7, 2, 3)
    stem = nn.Conv2d(input_shape[0], 64, kernel, stride, padding, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    network.conv1 = stem
    if small:
        network.maxpool = nn.Identity()
    return network
