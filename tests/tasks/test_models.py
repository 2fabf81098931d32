import inspect
from typing import Any

import pytest
import torch
from torch import nn

from bame_lightning.tasks import models, small_resnets, vision_transformers
from bame_lightning.tasks.models import Shape, cnn, mlp, mobilenet_v2, resnet18, resnet50


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("make", [mlp, cnn, resnet18, resnet50, mobilenet_v2])
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 64, 64)])
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
    assert isinstance(resnet18((1, 8, 8), 10).get_submodule("layer4.1.conv2"), nn.Conv2d)


def test_sizes_are_the_published_ones() -> None:
    assert parameters(mlp((1, 28, 28), 10)) == 784 * 512 + 512 + 512 * 512 + 512 + 512 * 10 + 10
    assert parameters(cnn((1, 28, 28), 10)) == 9 * (32 + 32 * 64 + 64 * 128) + 2 * (32 + 64 + 128) + 128 * 10 + 10
    # torchvision's documentation.
    assert parameters(resnet18()) == 11_689_512
    assert parameters(resnet50()) == 25_557_032
    assert parameters(mobilenet_v2()) == 3_504_872


def test_widths_are_chosen() -> None:
    hidden = [layer.out_features for layer in mlp((1, 8, 8), 10, hidden=[5, 6]) if isinstance(layer, nn.Linear)]
    assert hidden == [5, 6, 10]


@pytest.mark.parametrize("wrong", [512, "512", None, [64, "a"], [64, 0], [64.0]])
@pytest.mark.usefixtures("unchecked_types")
def test_widths_that_are_none_are_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match="`hidden` must be a list of whole numbers of at least 1"):
        mlp(hidden=wrong)
    with pytest.raises(ValueError, match="`widths` must be a list of whole numbers of at least 1"):
        cnn(widths=wrong)


@pytest.mark.parametrize(
    ("make", "name", "sides"), [(resnet50, "layer4", {32: 4, 64: 2}), (mobilenet_v2, "features", {32: 4, 64: 2})]
)
def test_small_images_are_shrunk_less(make: object, name: str, sides: dict[int, int]) -> None:
    for image, expected in sides.items():
        model, shapes = make((3, image, image), 10).eval(), []  # type: ignore[operator]
        model.get_submodule(name).register_forward_hook(lambda *args, shapes=shapes: shapes.append(args[2].shape))
        model(torch.randn(1, 3, image, image))
        assert shapes[0][2:] == (expected, expected)


def test_defaults_are_the_native_images_and_classes() -> None:
    imagenet, cifar10, mnist = ((3, 224, 224), 1000), ((3, 32, 32), 10), ((1, 28, 28), 10)
    natives = {
        models: {"mlp": mnist, "cnn": mnist, "resnet18": imagenet, "resnet50": imagenet, "mobilenet_v2": imagenet},
        small_resnets: {"resnet20": cifar10, "resnet32": cifar10},
        vision_transformers: {"vit": mnist, "deit_small": imagenet},
    }
    for module, functions in natives.items():
        for name, native in functions.items():
            arguments = inspect.signature(getattr(module, name)).parameters
            assert (arguments["input_shape"].default, arguments["num_classes"].default) == native
