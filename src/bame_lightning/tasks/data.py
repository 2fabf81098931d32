"""Image data sets as LightningDataModules."""

from __future__ import annotations

from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torchvision.datasets import FashionMNIST as TorchvisionFashionMNIST
from typing_extensions import override

from bame_lightning.tasks.idx import find_idx, read_idx
from bame_lightning.tasks.images import Images, InMemoryImages

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")


class Digits(InMemoryImages):
    """scikit-learn's handwritten digits: 1,797 grey images of 8x8 pixels, 360 of them for testing.

    They come with scikit-learn, so nothing is downloaded. The split is stratified and fixed.

    Args:
        batch_size: Images per batch.
        val_size: Training images put aside for validation.
        num_workers: Processes that load batches.
    """

    input_shape = (1, 8, 8)
    num_classes = 10

    def __init__(self, batch_size: int = 64, val_size: int = 180, num_workers: int = 0) -> None:
        super().__init__(batch_size, val_size, num_workers)

    @override
    def load(self) -> tuple[Images, Images]:
        digits = load_digits()
        pixels = torch.from_numpy(digits.images).float().unsqueeze(1)
        return Images(pixels, torch.from_numpy(digits.target).long()).split(360)


class FashionMNIST(InMemoryImages):
    """Fashion-MNIST: 60,000 training and 10,000 test images of clothes, grey, 28x28 pixels.

    Args:
        data_dir: Folder that holds the four idx files (`.gz` or unpacked), or holds them in `FashionMNIST/raw`, as
            torchvision does. If they are missing, they are downloaded to this folder. None takes the files of the Debian
            package if it is installed, else the folder `data`.
        batch_size: Images per batch.
        val_size: Training images put aside for validation.
        num_workers: Processes that load batches.
    """

    input_shape = (1, 28, 28)
    num_classes = 10
    files = (
        "train-images-idx3-ubyte",
        "train-labels-idx1-ubyte",
        "t10k-images-idx3-ubyte",
        "t10k-labels-idx1-ubyte",
    )

    def __init__(
        self, data_dir: str | None = None, batch_size: int = 128, val_size: int = 5000, num_workers: int = 0
    ) -> None:
        super().__init__(batch_size, val_size, num_workers)
        if data_dir is not None:
            self.folder = Path(data_dir).expanduser()
        else:
            self.folder = DEBIAN_FOLDER if DEBIAN_FOLDER.is_dir() else Path("data")

    @override
    def prepare_data(self) -> None:
        missing = [name for name in self.files if find_idx(self.folder, name) is None]
        if not missing:
            return
        try:
            TorchvisionFashionMNIST(str(self.folder), download=True)
        except (OSError, RuntimeError) as error:
            raise FileNotFoundError(
                f"`data_dir` {self.folder} lacks {', '.join(missing)} (.gz), and downloading failed "
                f"({type(error).__name__}: {error}). Either name the folder that holds Fashion-MNIST "
                "(data.data_dir=...), or run `apt-get install dataset-fashion-mnist` and leave `data_dir` out, or try "
                "again with a network."
            ) from error

    @override
    def load(self) -> tuple[Images, Images]:
        return self._read(*self.files[:2]), self._read(*self.files[2:])

    def _read(self, images_file: str, labels_file: str) -> Images:
        paths = find_idx(self.folder, images_file), find_idx(self.folder, labels_file)
        if paths[0] is None or paths[1] is None:
            raise FileNotFoundError(f"`data_dir` {self.folder} lacks {images_file} or {labels_file}.")
        pixels, labels = read_idx(paths[0]), read_idx(paths[1])
        fitting = pixels.shape == (len(labels), *self.input_shape[1:])
        if not fitting or labels.dim() != 1 or labels.max() >= self.num_classes:
            raise ValueError(
                f"`data_dir` {self.folder} does not hold Fashion-MNIST, images of 28x28 pixels and as many labels from "
                f"0 to 9; got images of shape {tuple(pixels.shape)} and labels of shape {tuple(labels.shape)}."
            )
        return Images(pixels.unsqueeze(1), labels.long())
