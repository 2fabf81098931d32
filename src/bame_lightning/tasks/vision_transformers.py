"""Vision transformers, one with packed attention projections, one with separate layers."""

from __future__ import annotations

import importlib
import math

import torchvision
from torch import nn

from bame_lightning.tasks.models import Shape, is_small


def vit(
    input_shape: Shape = (1, 28, 28), num_classes: int = 10, width: int = 128, depth: int = 4, heads: int = 4
) -> nn.Module:
    """Small vision transformer of torchvision, on patches of 4x4 pixels.

    Its attention is `nn.MultiheadAttention`, which packs the query, key and value projections into `in_proj_weight`.

    Args:
        input_shape: Channels, height and width of an image.
        num_classes: Outputs.
        width: Length of a token; the hidden layer of a block is four times as wide.
        depth: Blocks.
        heads: Attention heads of a block.

    Returns:
        The network; its layers are called `conv_proj`, `encoder.layers.encoder_layer_0.self_attention.in_proj_weight`,
        `...self_attention.out_proj`, `...mlp.0`, `...mlp.3` and `heads.head`.

    Raises:
        ValueError: If patches do not cover the images.
    """
    patch = 4
    _check_patches(input_shape, patch)
    network: nn.Module = torchvision.models.VisionTransformer(
        image_size=input_shape[1],
        patch_size=patch,
        num_layers=depth,
        num_heads=heads,
        hidden_dim=width,
        mlp_dim=4 * width,
        num_classes=num_classes,
    )
    # torchvision's own layer takes three channels; this one is initialised in the same way.
    network.conv_proj = nn.Conv2d(input_shape[0], width, patch, stride=patch)
    nn.init.trunc_normal_(network.conv_proj.weight, std=math.sqrt(1 / (input_shape[0] * patch**2)))
    nn.init.zeros_(network.conv_proj.bias)  # type: ignore[arg-type]
    return network


def deit_small(input_shape: Shape = (3, 224, 224), num_classes: int = 1000) -> nn.Module:
    """DeiT-small of timm (the extra `timm`), without weights.

    Args:
        input_shape: Channels, height and width of an image. Patches are 16x16 pixels, below 64 pixels 4x4.
        num_classes: Outputs.

    Returns:
        The network; its layers are called `patch_embed.proj`, `blocks.0.attn.qkv`, `blocks.0.attn.proj`,
        `blocks.0.mlp.fc1`, `blocks.0.mlp.fc2` and `head`.

    Raises:
        ValueError: If timm is not installed, or patches do not cover the images.
    """
    try:
        timm = importlib.import_module("timm")
    except ModuleNotFoundError as error:
        raise ValueError(
            "`model` deit_small needs timm, which is not installed. Get it by `pip install 'bame-lightning[timm]'`."
        ) from error
    patch = 4 if is_small(input_shape) else 16
    _check_patches(input_shape, patch)
    network: nn.Module = timm.create_model(
        "deit_small_patch16_224",
        img_size=input_shape[1],
        patch_size=patch,
        in_chans=input_shape[0],
        num_classes=num_classes,
    )
    return network


def _check_patches(input_shape: Shape, patch: int) -> None:
    height, width = input_shape[1:]
    if height != width or height % patch:
        raise ValueError(
            f"A vision transformer needs square images whose side is a multiple of its patches' ({patch} pixels); got "
            f"images of {height}x{width}. Choose another `model`, or crop the images."
        )
