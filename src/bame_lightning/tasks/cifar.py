"""CIFAR-10 and CIFAR-100 through torchvision."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
import torchvision
from typing_extensions import override

from bame_lightning.tasks.augmentation import crop_and_flip
from bame_lightning.tasks.images import Images, InMemoryImages


class CIFAR10(InMemoryImages):
    """CIFAR-10: 50,000 training and 10,000 test images, in colour, 32x32 pixels, 10 classes.

    Training images are shifted by up to four pixels and flipped at random.

    Args:
        root: Folder that holds `cifar-10-batches-py`, as torchvision arranges it. If that is missing, it is downloaded to
            `root`.
        batch_size: Images per batch.
        val_size: Training images put aside for validation.
        num_workers: Processes that load batches.
    """

    input_shape = (3, 32, 32)
    num_classes = 10
    source: ClassVar[Any] = torchvision.datasets.CIFAR10
    """torchvision's class."""

    def __init__(self, root: str = "data", batch_size: int = 128, val_size: int = 5000, num_workers: int = 0) -> None:
        super().__init__(batch_size, val_size, num_workers, crop_and_flip)
        self.root = Path(root).expanduser()

    @override
    def prepare_data(self) -> None:
        source = self.source
        try:
            source(self.root, download=True)
        except (OSError, RuntimeError) as error:
            raise FileNotFoundError(
                f"`root` {self.root} does not hold {source.__name__} (the folder {source.base_folder}, undamaged), and "
                f"downloading failed ({type(error).__name__}: {error}). Either name the folder that holds it "
                f"(data.root=...), or try again with a network, or unpack {source.filename} from {source.url} there."
            ) from error

    @override
    def load(self) -> tuple[Images, Images]:
        return self._read(train=True), self._read(train=False)

    def _read(self, *, train: bool) -> Images:
        data = self.source(self.root, train=train)
        pixels = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
        return Images(pixels, torch.tensor(data.targets))


class CIFAR100(CIFAR10):
    """CIFAR-100: like CIFAR-10, but with 100 classes, and in the folder `cifar-100-python`."""

    num_classes = 100
    source = torchvision.datasets.CIFAR100
