import gzip
import struct
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from bame_lightning.tasks import Digits, FashionMNIST, data

TRAIN, TEST = 40, 20


def write_idx(path: Path, array: Tensor) -> None:
    header = struct.pack(f">BBBB{array.dim()}I", 0, 0, 8, array.dim(), *array.shape)
    path.write_bytes(gzip.compress(header + bytes(array.flatten().tolist())))


@pytest.fixture
def fake_fashion_mnist(tmp_path: Path) -> Path:
    """Images whose every pixel is ten times the class, plus the index of the image."""
    for part, size in (("train", TRAIN), ("t10k", TEST)):
        labels = torch.arange(size) % 10
        images = (labels * 10 + torch.arange(size))[:, None, None].expand(size, 28, 28)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", labels)
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", images)
    return tmp_path


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(root: str, *, download: bool) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(data, "TorchvisionFashionMNIST", refuse)


def all_images(module: Digits | FashionMNIST) -> dict[str, tuple[Tensor, Tensor]]:
    module.prepare_data()
    module.setup("fit")
    found = {}
    for part in ("train", "val", "test"):
        batches = list(getattr(module, f"{part}_dataloader")())
        found[part] = tuple(torch.cat(column) for column in zip(*batches, strict=True)) if batches else ()
    return found  # type: ignore[return-value]


def test_digits_are_split_without_overlap_and_classes_in_proportion() -> None:
    parts = all_images(Digits(batch_size=1, val_size=180))
    assert {name: len(labels) for name, (_, labels) in parts.items()} == {"train": 1257, "val": 180, "test": 360}
    everything = torch.cat([pixels for pixels, _ in parts.values()]).flatten(1)
    original = torch.from_numpy(load_digits().images).float().flatten(1)
    # Standardising keeps the order of pixel values, so equal images stay equal and others stay different.
    assert len(everything.unique(dim=0)) == len(original.unique(dim=0))
    share = torch.bincount(torch.from_numpy(load_digits().target)) / 1797
    for _, labels in parts.values():
        torch.testing.assert_close(torch.bincount(labels) / len(labels), share, atol=0.01, rtol=0)


def test_the_split_of_digits_is_fixed() -> None:
    first, second = (next(iter(Digits().test_dataloader())) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_training_images_are_standardised() -> None:
    pixels, _ = all_images(Digits(batch_size=1))["train"]
    assert pixels.shape[1:] == Digits.input_shape
    torch.testing.assert_close(pixels.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(pixels.std(), torch.tensor(1.0), atol=1e-4, rtol=0)


def test_training_batches_are_shuffled_and_whole() -> None:
    torch.manual_seed(0)
    loader = Digits(batch_size=100).train_dataloader()
    first, second = ([labels for _, labels in loader] for _ in range(2))
    assert [len(labels) for labels in first] == [100] * 12
    assert not torch.equal(torch.cat(first), torch.cat(second))


def test_no_validation_set_leaves_everything_to_training() -> None:
    module = Digits(batch_size=1, val_size=0)
    assert module.val_dataloader() == []
    assert len(module.train_dataloader().dataset) == 1437  # type: ignore[arg-type]


def test_workers_serve_the_same_batches() -> None:
    alone, helped = (next(iter(Digits(num_workers=n).test_dataloader())) for n in (0, 1))
    assert torch.equal(alone[0], helped[0])


def test_reads_fashion_mnist_from_data_dir(fake_fashion_mnist: Path) -> None:
    module = FashionMNIST(str(fake_fashion_mnist), batch_size=10, val_size=10)
    parts = all_images(module)
    assert {name: tuple(pixels.shape) for name, (pixels, _) in parts.items()} == {
        "train": (30, 1, 28, 28),
        "val": (10, 1, 28, 28),
        "test": (20, 1, 28, 28),
    }
    assert sorted(parts["val"][1].tolist()) == list(range(10))
    pixels, labels = parts["test"]
    assert labels.tolist() == [index % 10 for index in range(TEST)]
    # Image i shows 10 * (i % 10) + i: equal steps after standardising, whatever mean and deviation are.
    steps = pixels[1:10, 0, 0, 0] - pixels[:9, 0, 0, 0]
    torch.testing.assert_close(steps, steps[:1].expand(9))


def test_finds_torchvisions_folder_below_data_dir(fake_fashion_mnist: Path, no_network: None) -> None:
    raw = fake_fashion_mnist / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for path in fake_fashion_mnist.glob("*.gz"):
        path.rename(raw / path.name)
    assert len(all_images(FashionMNIST(str(fake_fashion_mnist), val_size=0, batch_size=1))["train"][1]) == TRAIN


def test_without_data_dir_the_debian_package_serves(fake_fashion_mnist: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "DEBIAN_FOLDER", fake_fashion_mnist)
    assert len(all_images(FashionMNIST(val_size=0, batch_size=1))["test"][1]) == TEST


def test_downloads_into_data_dir(fake_fashion_mnist: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    target = tmp_path_factory.mktemp("target")

    def download(root: str, *, download: bool) -> None:
        assert download
        raw = Path(root) / "FashionMNIST" / "raw"
        raw.parent.mkdir()
        fake_fashion_mnist.rename(raw)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "TorchvisionFashionMNIST", download)
        assert len(all_images(FashionMNIST(str(target), val_size=0, batch_size=1))["train"][1]) == TRAIN


@pytest.mark.usefixtures("no_network")
def test_a_missing_data_set_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        FashionMNIST(str(tmp_path / "nowhere")).prepare_data()
    message = str(caught.value)
    for part in (
        "`data_dir`",
        "nowhere",
        "apt-get install dataset-fashion-mnist",
        "data.data_dir=",
        "no route to host",
    ):
        assert part in message


@pytest.mark.usefixtures("no_network")
def test_a_missing_file_is_named(fake_fashion_mnist: Path) -> None:
    (fake_fashion_mnist / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks t10k-labels-idx1-ubyte \(\.gz\), and downloading failed"):
        FashionMNIST(str(fake_fashion_mnist)).prepare_data()


def test_a_truncated_file_is_named(fake_fashion_mnist: Path) -> None:
    path = fake_fashion_mnist / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz is damaged or cut short"):
        FashionMNIST(str(fake_fashion_mnist)).setup("fit")


def test_files_that_do_not_belong_together_are_refused(fake_fashion_mnist: Path) -> None:
    write_idx(fake_fashion_mnist / "train-labels-idx1-ubyte.gz", torch.arange(TRAIN - 1) % 10)
    with pytest.raises(ValueError, match=r"does not hold Fashion-MNIST.*\(40, 28, 28\).*\(39,\)"):
        FashionMNIST(str(fake_fashion_mnist)).setup("fit")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "`batch_size` must be at least 1; got 0"),
        ({"val_size": 5}, "`val_size` must be 0 .* 10 classes; got 5"),
        ({"val_size": -1}, "`val_size` must be 0"),
        ({"val_size": 1400}, "`val_size` 1400 leaves less than one batch"),
        ({"batch_size": 2000, "val_size": 0}, r"less than one batch \(`batch_size` 2000\)"),
    ],
)
def test_sizes_out_of_range_are_refused(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Digits(**arguments).setup("fit")
