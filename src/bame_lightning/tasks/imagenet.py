"""ImageNet through torchvision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from typing_extensions import override

from bame_lightning.tasks.splits import Splits

# Mean and deviation of the training images' channels, for values in [0, 1], as published networks use them.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ImageNet(Splits):
    """ImageNet-1k (ILSVRC 2012): 1.28 million training and 50,000 validation images, 224x224 pixels of them.

    Training images are cropped and resized at random and flipped; others are resized to 256 pixels and cropped in the
    middle. As in the literature, the validation images serve for testing, too.

    Args:
        root: Folder that holds `train` and `val`, each with one folder of images per class: what
            `torchvision.datasets.ImageNet` unpacks the archives to. Fewer classes will do.
        batch_size: Images per batch. An incomplete last batch is left out of training.
        num_workers: Processes that read images.

    Raises:
        ValueError: If a size is out of range.
    """

    input_shape = (3, 224, 224)
    """Channels, height and width of an image."""
    num_classes = 1000

    def __init__(self, root: str = "data/imagenet", batch_size: int = 256, num_workers: int = 8) -> None:
        super().__init__(batch_size, num_workers, pin_memory=torch.cuda.is_available())
        self.root = Path(root).expanduser()

    @override
    def split(self) -> tuple[Any, Any, Any]:
        change = [v2.RandomResizedCrop(224), v2.RandomHorizontalFlip()]
        train, val = self._folder("train", change), self._folder("val", [v2.Resize(256), v2.CenterCrop(224)])
        if train.classes != val.classes or len(train.classes) > self.num_classes:
            raise ValueError(
                f"`root` {self.root} must hold the same classes, at most {self.num_classes}, in train and in val; got "
                f"{len(train.classes)} and {len(val.classes)} folders."
            )
        if len(train) < self.batch_size:
            raise ValueError(
                f"`batch_size` {self.batch_size} is more than the {len(train)} training images of `root` {self.root}."
            )
        return train, val, val

    def _folder(self, split: str, change: list[Any]) -> Any:
        tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(_MEAN, _STD)]
        try:
            return ImageFolder(self.root / split, v2.Compose([*change, *tensor]))
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"`root` {self.root} does not hold ImageNet: train and val with a folder of images for each class "
                f"({error}). Either name the folder that does (data.root=...), or get the archives "
                "ILSVRC2012_devkit_t12.tar.gz, ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar from image-net.org "
                "(free, with an account), put them there, and unpack them by torchvision.datasets.ImageNet(root, "
                "'train') and torchvision.datasets.ImageNet(root, 'val')."
            ) from error
