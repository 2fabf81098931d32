import pickle
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torchvision

from bame_lightning.tasks import CIFAR10, CIFAR100
from tests.tasks.fake_data import shade, write_cifar


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", refuse)


@pytest.mark.parametrize(("make", "classes", "batches"), [(CIFAR10, 10, 5), (CIFAR100, 100, 1)])
@pytest.mark.usefixtures("no_network")
def test_reads_what_torchvision_reads(
    make: type[CIFAR10], classes: int, batches: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cifar(tmp_path, classes, monkeypatch, images=100)
    data = make(str(tmp_path), batch_size=10, val_size=0)
    data.prepare_data()
    train, test = data.load()
    assert (len(train.labels), len(test.labels)) == (100 * batches, 100)
    assert train.pixels.dtype == torch.uint8
    # The test batch is written first, from index 0.
    for index, pixels, label in ((7, test.pixels[7], test.labels[7]), (105, train.pixels[5], train.labels[5])):
        assert pixels.shape == (3, 32, 32)
        assert pixels.flatten(1).unique(dim=1).flatten().tolist() == shade(index).tolist()
        assert label == index % classes


def test_training_images_alone_are_augmented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path, 10, monkeypatch)
    data = CIFAR10(str(tmp_path), batch_size=50, val_size=10)
    data.setup("fit")
    (train, labels), (val, _), (test, _) = (
        next(iter(loader())) for loader in (data.train_dataloader, data.val_dataloader, data.test_dataloader)
    )
    assert train.shape == (50, 3, 32, 32)
    assert train.dtype == torch.float32
    assert labels.dtype == torch.int64
    # Images are of one shade; black at the edges shows that they were moved.
    assert (val == val[:, :, :1, :1]).all()
    assert (test == test[:, :, :1, :1]).all()
    assert (train != train[:, :, 16:17, 16:17]).flatten(1).any(1).sum() > 40


@pytest.mark.usefixtures("no_network")
def test_missing_files_say_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        CIFAR100(str(tmp_path / "nowhere")).prepare_data()
    for part in ("`root`", "nowhere", "CIFAR100", "cifar-100-python", "no route to host", "data.root=", "tar.gz"):
        assert part in str(caught.value)


@pytest.mark.usefixtures("no_network")
def test_a_damaged_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path, 10, monkeypatch)
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(pickle.dumps({}))
    with pytest.raises(FileNotFoundError, match="undamaged"):
        CIFAR10(str(tmp_path)).prepare_data()


def test_downloads_into_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path / "elsewhere", 10, monkeypatch)

    def download(url: str, root: Path, **options: str) -> None:
        root.mkdir()
        (tmp_path / "elsewhere" / "cifar-10-batches-py").rename(root / "cifar-10-batches-py")

    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", download)
    data = CIFAR10(str(tmp_path / "here"), val_size=0, batch_size=20)
    data.prepare_data()
    assert len(data.train_dataloader()) == 5
