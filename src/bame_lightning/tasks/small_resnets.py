"""Residual networks for small images, as He et al. (2016) train them on CIFAR-10."""

from __future__ import annotations

from collections import OrderedDict

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from bame_lightning.tasks.models import Shape


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut without parameters (option A of He et al. 2016).

    Args:
        channels: Input channels.
        width: Output channels, at least as many.
        stride: Stride of the first convolution.
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


def resnet20(
    input_shape: Shape = (3, 32, 32), num_classes: int = 10, width: int = 16, blocks_per_stage: int = 3
) -> nn.Sequential:
    """Residual network for small images (He et al. 2016, section 4.2): 6 `blocks_per_stage` + 2 layers.

    Args:
        input_shape: Channels, height and width of an image.
        num_classes: Outputs.
        width: Channels of the first stage; the second has twice, the third four times as many.
        blocks_per_stage: 3 makes ResNet-20.

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


def resnet32(input_shape: Shape = (3, 32, 32), num_classes: int = 10, width: int = 32) -> nn.Sequential:
    """ResNet-32 with twice the width of He et al. (32, 64 and 128 channels), which N:M papers train on CIFAR-10.

    Args:
        input_shape: Channels, height and width of an image.
        num_classes: Outputs.
        width: Channels of the first stage.

    Returns:
        The network, with the names of layers of `resnet20`.
    """
    return resnet20(input_shape, num_classes, width, blocks_per_stage=5)
