from pathlib import Path

import pytest
import torch
from PIL import Image

from bame_lightning.tasks import ImageNet
from tests.tasks.fake_data import write_imagenet

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def test_serves_images_of_224_pixels_and_their_classes(tmp_path: Path) -> None:
    write_imagenet(tmp_path, classes=3, images=2)
    data = ImageNet(str(tmp_path), batch_size=6, num_workers=0)
    data.setup("fit")
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        [(images, labels)] = list(loader)
        assert images.shape == (6, 3, 224, 224)
        assert images.dtype == torch.float32
        assert sorted(labels.tolist()) == [0, 0, 1, 1, 2, 2]
        grey = images * STD[:, None, None] + MEAN[:, None, None]
        expected = (labels * 50 / 255)[:, None, None, None].expand_as(grey)
        torch.testing.assert_close(grey, expected, atol=0.01, rtol=0)  # JPEG rounds


def test_the_middle_is_cropped_for_validation_and_anything_for_training(tmp_path: Path) -> None:
    write_imagenet(tmp_path, classes=1, images=1)
    # Twice as large as images are resized to; what the crop has to leave out is black.
    picture = Image.new("RGB", (512, 512))
    picture.paste((255, 255, 255), (32, 32, 480, 480))
    for split in ("train", "val"):
        picture.save(tmp_path / split / "n00000000" / f"{split}_0.JPEG", quality=100)
    data = ImageNet(str(tmp_path), batch_size=1, num_workers=0)
    validated = next(iter(data.val_dataloader()))[0] * STD[:, None, None] + MEAN[:, None, None]
    assert validated[..., 2:-2, 2:-2].min() > 0.95
    first, second = (next(iter(data.train_dataloader()))[0] for _ in range(2))
    assert not torch.equal(first, second)


def test_training_batches_are_whole_and_shuffled_and_workers_serve(tmp_path: Path) -> None:
    write_imagenet(tmp_path, classes=4, images=4, size=(32, 32))
    data = ImageNet(str(tmp_path), batch_size=6, num_workers=1)
    batches = [labels for _, labels in data.train_dataloader()]
    assert [len(labels) for labels in batches] == [6, 6]
    assert not torch.equal(torch.cat(batches), torch.cat(batches).sort().values)
    assert [len(batch) for _, batch in data.val_dataloader()] == [6, 6, 4]


def test_missing_files_say_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        ImageNet(str(tmp_path / "nowhere")).setup("fit")
    for part in ("`root`", "nowhere", "data.root=", "ILSVRC2012_img_train.tar", "torchvision.datasets.ImageNet("):
        assert part in str(caught.value)


def test_validation_images_outside_class_folders_are_refused(tmp_path: Path) -> None:
    write_imagenet(tmp_path, size=(32, 32))
    for folder in list((tmp_path / "val").iterdir()):
        for path in list(folder.iterdir()):
            path.rename(tmp_path / "val" / f"{folder.name}_{path.name}")
        folder.rmdir()
    with pytest.raises(FileNotFoundError, match=r"a folder of images for each class.*find any class folder"):
        ImageNet(str(tmp_path)).setup("fit")


def test_other_classes_in_validation_are_refused(tmp_path: Path) -> None:
    write_imagenet(tmp_path, size=(32, 32))
    (tmp_path / "val" / "n00000002").rename(tmp_path / "val" / "n00000009")
    with pytest.raises(ValueError, match="the same classes, at most 1000, in train and in val; got 3 and 3 folders"):
        ImageNet(str(tmp_path)).setup("fit")


def test_a_batch_size_out_of_range_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`batch_size` must be at least 1; got 0"):
        ImageNet(batch_size=0)
    write_imagenet(tmp_path, size=(32, 32))
    with pytest.raises(ValueError, match="`batch_size` 7 is more than the 6 training images"):
        ImageNet(str(tmp_path), batch_size=7).setup("fit")
