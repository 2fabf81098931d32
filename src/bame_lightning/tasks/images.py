"""Images held in memory, and the LightningDataModule that serves them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int, Num
from sklearn.model_selection import train_test_split
from torch import Tensor
from typing_extensions import override

from bame_lightning.tasks.splits import Splits


class Images(NamedTuple):
    """Images of shape (images, channels, height, width) and the class of each."""

    pixels: Num[Tensor, "images channels height width"]
    labels: Int[Tensor, " images"]

    def split(self, size: int) -> tuple[Images, Images]:
        """Put `size` images aside: always the same ones, with classes in equal proportion.

        Args:
            size: How many images.

        Returns:
            The images that stay, and those put aside.
        """
        if size == 0:
            return self, Images(self.pixels[:0], self.labels[:0])
        everything = torch.arange(len(self.labels))
        stay, aside = train_test_split(everything, test_size=size, stratify=self.labels, random_state=0)
        return Images(self.pixels[stay], self.labels[stay]), Images(self.pixels[aside], self.labels[aside])


class StandardisedImages:
    """Images as batches of floating-point numbers.

    Args:
        images: The images, values as they come.
        mean: What to subtract, per channel.
        std: What to divide by then, per channel.
        augmentation: Changes a batch of images before that; None leaves them.
    """

    def __init__(
        self,
        images: Images,
        mean: Float[Tensor, "1 channels 1 1"],
        std: Float[Tensor, "1 channels 1 1"],
        augmentation: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.images, self.mean, self.std, self.augmentation = images, mean, std, augmentation

    def __len__(self) -> int:
        return len(self.images.labels)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        pixels = self.images.pixels[indices]
        if self.augmentation is not None:
            pixels = self.augmentation(pixels)
        return (pixels.float() - self.mean) / self.std, self.images.labels[indices]


class InMemoryImages(Splits):
    """A data set held in memory, each channel standardised by the training images' mean and standard deviation.

    For another data set write a subclass that names its shape and its classes and implements `load`. Values stay as they
    are read until a batch is served, because bytes take a quarter of the memory.

    Args:
        batch_size: Images per batch. An incomplete last batch is left out of training.
        val_size: Training images put aside for validation; 0 trains on all of them and validates on none.
        num_workers: Processes that load batches; 0 is the fastest for images that are in memory already.
        augmentation: Changes a batch of training images, values as they come; None leaves them.

    Raises:
        ValueError: If a size is out of range.
    """

    input_shape: ClassVar[tuple[int, int, int]]
    """Channels, height and width of an image."""
    num_classes: ClassVar[int]

    def __init__(
        self,
        batch_size: int,
        val_size: int,
        num_workers: int,
        augmentation: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, evaluation_batch_size=1000, collate_fn=tuple)
        if val_size != 0 and val_size < self.num_classes:
            raise ValueError(
                f"`val_size` must be 0 (no validation) or at least one image for each of the {self.num_classes} "
                f"classes; got {val_size}."
            )
        self.val_size, self._augmentation = val_size, augmentation

    @abstractmethod
    def load(self) -> tuple[Images, Images]:
        """Read the training and the test images, values as they come."""

    @override
    def split(self) -> tuple[StandardisedImages, StandardisedImages, StandardisedImages]:
        train, test = self.load()
        if max(self.batch_size, self.num_classes) + self.val_size > len(train.labels):
            raise ValueError(
                f"`val_size` {self.val_size} leaves less than one batch (`batch_size` {self.batch_size}) of the "
                f"{len(train.labels)} training images."
            )
        train, val = train.split(self.val_size)
        pixels = train.pixels.float()
        mean, std = pixels.mean((0, 2, 3), keepdim=True), pixels.std((0, 2, 3), keepdim=True)
        return (
            StandardisedImages(train, mean, std, self._augmentation),
            StandardisedImages(val, mean, std),
            StandardisedImages(test, mean, std),
        )
