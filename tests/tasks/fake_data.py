"""Made images in the files and folders of real data sets."""

import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision
from PIL import Image


def write_cifar(root: Path, classes: int, patch: pytest.MonkeyPatch, images: int = 20) -> None:
    """Write CIFAR-10 (five batches) or CIFAR-100 (one) and let torchvision expect their checksums.

    Every batch holds `images` images. Each is of one shade of red, green and blue; see `shade`.
    """
    source = {10: torchvision.datasets.CIFAR10, 100: torchvision.datasets.CIFAR100}[classes]
    folder, key = root / source.base_folder, "labels" if classes == 10 else "fine_labels"
    folder.mkdir(parents=True)
    sums: dict[str, str] = {}

    def write(name: str, content: dict[str, Any]) -> None:
        (folder / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((folder / name).read_bytes(), usedforsecurity=False).hexdigest()

    for number, (name, _) in enumerate([*source.test_list, *source.train_list]):
        indices = range(number * images, (number + 1) * images)
        pixels = np.stack([np.repeat(shade(index), 32 * 32) for index in indices])
        write(name, {"data": pixels, key: [index % classes for index in indices]})
    write(source.meta["filename"], {source.meta["key"]: [f"class {index}" for index in range(classes)]})
    for part in ("train_list", "test_list"):
        patch.setattr(source, part, [[name, sums[name]] for name, _ in getattr(source, part)])
    patch.setattr(source, "meta", source.meta | {"md5": sums[source.meta["filename"]]})


def shade(index: int) -> np.ndarray[Any, Any]:
    """Red, green and blue of an image; none of them black."""
    return np.array([index % 200 + 1, 100 + index % 3, 255 - index % 100], dtype=np.uint8)


def write_imagenet(root: Path, classes: int = 3, images: int = 2, size: tuple[int, int] = (300, 280)) -> None:
    """Write `images` JPEGs of `size` (width, height) for each class into `train` and `val`; class i is of grey 50 i."""
    for split in ("train", "val"):
        for index in range(classes):
            folder = root / split / f"n{index:08d}"
            folder.mkdir(parents=True)
            for number in range(images):
                Image.new("RGB", size, (50 * index,) * 3).save(folder / f"{split}_{number}.JPEG")
