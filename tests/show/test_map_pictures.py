import pytest
import torch
from torch import Tensor

from bame_lightning.blocks.pattern import NMPattern
from bame_lightning.show.map_pictures import block_picture, mask_picture
from bame_lightning.show.maps import CHANGES, block_map, changes
from tests.helpers import random_kept

LEFT, TOP = 64, 36


def cells(picture: Tensor, rows: int, columns: int) -> list[list[str]]:
    """Colour in the middle of each cell; cells fill 768 x 448 pixels as far as they can, at most 96 x 24 each."""
    wide, high = min(96, 768 // columns), min(24, 448 // rows)
    return [
        [
            "#" + "".join(f"{value:02X}" for value in picture[TOP + y * high + high // 2, LEFT + x * wide + wide // 2])
            for x in range(columns)
        ]
        for y in range(rows)
    ]


@pytest.mark.parametrize(("filters", "each"), [(1, 1), (64, 8), (16, 50)])
def test_every_position_has_the_colour_of_what_became_of_it(filters: int, each: int) -> None:
    first, now = (random_kept(filters * each, NMPattern(2, 4), seed).view(filters, -1) for seed in (0, 3))
    codes = changes(now, first)
    picture = mask_picture(codes, 4, "layer")
    height, width, _ = picture.shape
    assert 100 < height < 600 < width < 1000
    assert cells(picture, *codes.shape) == [[CHANGES[code][1] for code in row] for row in codes.tolist()]
    assert len(codes.unique()) == (2 if each == 1 else 4)
    # The legend shows all four.
    below = {"#" + "".join(f"{v:02X}" for v in pixel) for pixel in picture[-40:].reshape(-1, 3).unique(dim=0)}
    assert below >= {colour for _, colour in CHANGES}


def test_values_of_blocks_go_from_dark_to_light() -> None:
    values = torch.tensor([[0.0, 1.0], [2.0, 4.0]])
    # The ends, a quarter and half of the way of matplotlib's viridis.
    assert cells(block_picture(values, (2, 2), "layer", "oscillations"), 2, 2) == [
        ["#440154", "#3B528B"],
        ["#21918C", "#FDE725"],
    ]
    assert cells(block_picture(values, (2, 2), "layer", "share", 8.0), 2, 2)[1][1] == "#21918C"
    assert cells(block_picture(torch.zeros(1, 3), (2, 3), "layer", "oscillations"), 1, 3) == [["#440154"] * 3]


def test_a_long_title_fits() -> None:
    values = block_map(torch.arange(80 * 100), 80)
    wide = block_picture(values, (80, 100), "layer." * 40, "oscillations").shape[1]
    assert wide > block_picture(values, (80, 100), "layer", "oscillations").shape[1]
