import pytest
import torch

from bame_lightning.map_pictures import block_picture, mask_picture
from bame_lightning.maps import CHANGES, block_map, changes
from bame_lightning.pattern import NMPattern
from tests.helpers import random_kept


@pytest.mark.parametrize(("filters", "each"), [(1, 1), (64, 8), (16, 200)])
def test_every_kind_of_change_is_seen_in_its_colour(filters: int, each: int) -> None:
    first, now = (random_kept(filters * each, NMPattern(2, 4), seed).view(filters, -1) for seed in (0, 3))
    codes = changes(now, first)
    picture = mask_picture(codes, 4, "layer")
    height, width, _ = picture.shape
    assert 200 < height < 600 < width < 1000
    inside = picture[height // 5 : 3 * height // 5, width // 5 : 4 * width // 5].reshape(-1, 3).tolist()
    found = {"#" + "".join(f"{value:02X}" for value in pixel) for pixel in inside}
    assert found >= {CHANGES[code][1] for code in codes.unique().tolist()}


def test_values_of_blocks_go_from_dark_to_light() -> None:
    values = block_map(torch.arange(80 * 100), 80)
    picture = block_picture(values, (80, 100), "layer", "oscillations").float().mean(-1)
    height, width = picture.shape
    upper, lower = picture[height // 4, width // 4 : width // 2], picture[3 * height // 5, width // 4 : width // 2]
    assert upper.mean() + 20 < lower.mean()
    nothing = block_picture(torch.zeros(2, 3), (2, 3), "layer", "oscillations")
    assert nothing.float().std() > 1
