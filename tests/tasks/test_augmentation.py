import pytest
import torch
from torch.nn import functional

from bame_lightning.tasks.augmentation import crop_and_flip


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_every_image_is_one_of_the_shifted_and_mirrored_ones_and_all_of_them_come_up(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    image = torch.arange(1, 2 * 3 * 4 + 1).reshape(2, 3, 4).to(dtype)
    black = functional.pad(image, (1, 1, 1, 1))
    expected = set()
    for top in range(3):
        for left in range(3):
            crop = black[:, top : top + 3, left : left + 4]
            expected |= {tuple(crop.flatten().tolist()), tuple(crop.flip(2).flatten().tolist())}
    changed = crop_and_flip(image.expand(500, 2, 3, 4), padding=1)
    assert changed.shape == (500, 2, 3, 4)
    assert changed.dtype == dtype
    assert changed.is_contiguous()
    assert {tuple(one.flatten().tolist()) for one in changed} == expected
    assert len(expected) == 18


def test_images_are_not_mixed_up_and_the_originals_stay() -> None:
    images = torch.arange(1.0, 51.0)[:, None, None, None].expand(50, 3, 32, 32).clone()
    before = images.clone()
    changed = crop_and_flip(images)
    torch.testing.assert_close(changed.amax((1, 2, 3)), torch.arange(1.0, 51.0))
    assert torch.equal(images, before)


def test_the_seed_decides() -> None:
    images = torch.rand(8, 3, 32, 32)
    torch.manual_seed(1)
    first, second = crop_and_flip(images), crop_and_flip(images)
    torch.manual_seed(1)
    assert torch.equal(first, crop_and_flip(images))
    assert not torch.equal(first, second)
