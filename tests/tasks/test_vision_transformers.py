import importlib

import pytest
import torch
import torchvision
from torch import nn

from bame_lightning.tasks.models import Shape
from bame_lightning.tasks.vision_transformers import deit_small, vit


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("make", [vit, deit_small])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 64, 64)])
def test_every_model_fits_every_image(make: object, shape: Shape) -> None:
    model = make(shape, 7)  # type: ignore[operator]
    assert model(torch.randn(2, *shape)).shape == (2, 7)


def test_sizes() -> None:
    # 49 patches of 16 pixels and the class token; biases of 3 + 1 + 4 + 1 widths and two layer norms in a block.
    block = 12 * 128**2 + 9 * 128 + 2 * 2 * 128
    assert parameters(vit()) == 16 * 128 + 128 + 128 + 50 * 128 + 4 * block + 2 * 128 + 128 * 10 + 10
    # Touvron et al. (2021), table 1: 22 million.
    assert parameters(deit_small()) == 22_050_664


def test_names_of_layers() -> None:
    network = dict(vit().named_parameters())
    assert network["encoder.layers.encoder_layer_0.self_attention.in_proj_weight"].shape == (384, 128)
    assert network["encoder.layers.encoder_layer_3.mlp.3.weight"].shape == (128, 512)
    names = dict(deit_small((3, 32, 32), 10).named_modules())
    assert {f"blocks.11.{name}" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")} < set(names)
    assert names["patch_embed.proj"].kernel_size == (4, 4)


def test_vit_of_colour_images_starts_as_torchvisions_own() -> None:
    """The patch embedding is replaced, so its initial distribution is compared with the original's."""
    own = vit((3, 32, 32), width=512, depth=1).get_parameter("conv_proj.weight")
    theirs = torchvision.models.VisionTransformer(32, 4, 1, 4, 512, 512).get_parameter("conv_proj.weight")
    assert own.shape == theirs.shape
    assert own.std().item() == pytest.approx(theirs.std().item(), rel=0.05)


@pytest.mark.parametrize("make", [vit, deit_small])
@pytest.mark.parametrize("shape", [(3, 32, 28), (3, 30, 30)])
def test_images_that_patches_do_not_cover_are_refused(make: object, shape: Shape) -> None:
    with pytest.raises(ValueError, match=rf"\(4 pixels\); got images of {shape[1]}x{shape[2]}"):
        make(shape, 10)  # type: ignore[operator]


def test_without_timm_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ValueError, match=r"needs timm, which is not installed.*bame-lightning\[timm\]"):
        deit_small()
