"""Models built for a data set: functions of its input shape and its number of classes.

The defaults are those with which a model was published or first used.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torchvision
from torch import nn

Shape = tuple[int, int, int]


def mlp(input_shape: Shape = (1, 28, 28), num_classes: int = 10, hidden: Sequence[int] = (512, 512)) -> nn.Sequential:
    """Fully connected network with ReLU.

    Args:
        input_shape: Channels, height and width of an image.
        num_classes: Outputs.
        hidden: Width of each hidden layer.

    Returns:
        The network; its layers are called `hidden1`, `hidden2`, ... and `fc`.

    Raises:
        ValueError: If `hidden` is not a list of widths.
    """
    _check_widths("hidden", hidden)
    layers = OrderedDict[str, nn.Module](flatten=nn.Flatten())
    width = input_shape[0] * input_shape[1] * input_shape[2]
    for index, next_width in enumerate(hidden, 1):
        layers[f"hidden{index}"] = nn.Linear(width, next_width)
        layers[f"relu{index}"] = nn.ReLU()
        width = next_width
    layers["fc"] = nn.Linear(width, num_classes)
    return nn.Sequential(layers)


def cnn(
    input_shape: Shape = (1, 28, 28), num_classes: int = 10, widths: Sequence[int] = (32, 64, 128)
) -> nn.Sequential:
    """Plain convolutional network: 3x3 convolutions of stride 2, batch norm, ReLU, average pooling, linear.

    Args:
        input_shape: Channels, height and width of an image.
        num_classes: Outputs.
        widths: Channels of each convolution.

    Returns:
        The network; its layers are called `conv1`, `conv2`, ... and `fc`.

    Raises:
        ValueError: If `widths` is not a list of widths.
    """
    _check_widths("widths", widths)
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


def _check_widths(argument: str, widths: object) -> None:
    listed = isinstance(widths, Sequence) and not isinstance(widths, str)
    if not listed or not all(isinstance(width, int) and width > 0 for width in widths):  # type: ignore[attr-defined]
        raise ValueError(f"`{argument}` must be a list of whole numbers of at least 1, such as [64, 64]; got {widths}.")


def resnet18(input_shape: Shape = (3, 224, 224), num_classes: int = 1000) -> nn.Module:
    """ResNet-18 of torchvision, with its stem fitted to the images.

    Args:
        input_shape: Channels, height and width of an image. Below 64 pixels the stem becomes a 3x3 convolution of
            stride 1 without pooling, as is usual for small images.
        num_classes: Outputs.

    Returns:
        The network, with torchvision's names of layers.
    """
    return _resnet(torchvision.models.resnet18, input_shape, num_classes)


def resnet50(input_shape: Shape = (3, 224, 224), num_classes: int = 1000) -> nn.Module:
    """ResNet-50 of torchvision, with its stem fitted to the images as in `resnet18`.

    Args:
        input_shape: Channels, height and width of an image.
        num_classes: Outputs.

    Returns:
        The network, with torchvision's names of layers.
    """
    return _resnet(torchvision.models.resnet50, input_shape, num_classes)


def _resnet(make: Callable[..., nn.Module], input_shape: Shape, num_classes: int) -> nn.Module:
    network = make(num_classes=num_classes)
    small = is_small(input_shape)
    kernel, stride, padding = (3, 1, 1) if small else (7, 2, 3)
    network.conv1 = nn.Conv2d(input_shape[0], 64, kernel, stride, padding, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    if small:
        network.maxpool = nn.Identity()
    return network


def mobilenet_v2(input_shape: Shape = (3, 224, 224), num_classes: int = 1000) -> nn.Module:
    """MobileNet-V2 of torchvision, with its stem fitted to the images.

    Args:
        input_shape: Channels, height and width of an image. Below 64 pixels the stem and the first stage of stride 2
            get stride 1, as is usual on CIFAR.
        num_classes: Outputs.

    Returns:
        The network, with torchvision's names of layers; the classifier is `classifier.1`.
    """
    small = is_small(input_shape)
    # Expansion, channels, blocks and stride of each stage; only the stride of the second differs from torchvision's.
    stages = [
        [1, 16, 1, 1],
        [6, 24, 2, 1 if small else 2],
        [6, 32, 3, 2],
        [6, 64, 4, 2],
        [6, 96, 3, 1],
        [6, 160, 3, 2],
        [6, 320, 1, 1],
    ]
    network: nn.Module = torchvision.models.mobilenet_v2(num_classes=num_classes, inverted_residual_setting=stages)
    stem = nn.Conv2d(input_shape[0], 32, 3, stride=1 if small else 2, padding=1, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out")
    network.get_submodule("features.0")[0] = stem  # type: ignore[operator]
    return network


def is_small(input_shape: Shape) -> bool:
    """Whether images are so small that a network made for ImageNet would shrink them to nothing: below 64 pixels.

    Args:
        input_shape: Channels, height and width of an image.

    Returns:
        True for images like those of CIFAR and MNIST.
    """
    return min(input_shape[1:]) < 64
