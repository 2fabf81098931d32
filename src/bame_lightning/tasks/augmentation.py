"""Random changes of whole batches of training images."""

from __future__ import annotations

import torch
from jaxtyping import Num
from torch import Tensor
from torch.nn import functional


def crop_and_flip(
    pixels: Num[Tensor, "images channels height width"], padding: int = 4
) -> Num[Tensor, "images channels height width"]:
    """Shift each image at random, black moving in, and mirror half of them: the usual augmentation for CIFAR.

    The same as a `RandomCrop` of padded images and a `RandomHorizontalFlip` for each image, but all at once.

    Args:
        pixels: The images, black being 0.
        padding: The most pixels by which an image moves in each direction.

    Returns:
        The changed images.
    """
    images, _, height, width = pixels.shape
    top, left = torch.randint(2 * padding + 1, (2, images, 1))
    flipped = torch.rand(images, 1) < 0.5
    rows = top + torch.arange(height)
    columns = left + torch.arange(width)
    columns = torch.where(flipped, columns.flip(1), columns)
    padded = functional.pad(pixels, (padding,) * 4)
    # With index tensors on both sides of it, the dimension of channels comes last.
    crops = padded[torch.arange(images)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return crops.permute(0, 3, 1, 2).contiguous()
