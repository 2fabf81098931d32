import pytest
import torch
from torch import Tensor

from bame_lightning.blocks.pattern import NMPattern
from bame_lightning.show.map_pictures import count_picture, frozen_picture, mask_picture, trace_picture
from bame_lightning.show.maps import CHANGES, changes
from bame_lightning.show.mask_file import Trace
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


NOTHING = "#F2F2F2"


def test_the_more_a_block_oscillated_the_darker_it_is_and_never_is_pale() -> None:
    counts = torch.tensor([[0, 1], [2, 4]])
    # A block of two positions is as wide as both. A quarter, half and all of the way of viridis, reversed.
    assert cells(count_picture(counts, 2, "layer"), 2, 4) == [
        [NOTHING] * 2 + ["#5EC962"] * 2,
        ["#21918C"] * 2 + ["#440154"] * 2,
    ]
    assert cells(count_picture(torch.zeros(1, 3, dtype=torch.int32), 1, "layer"), 1, 3) == [[NOTHING] * 3]


def test_frozen_blocks_are_told_apart() -> None:
    frozen = torch.tensor([[True, False]])
    assert cells(frozen_picture(frozen, 3, "layer"), 1, 6) == [["#D55E00"] * 3 + [NOTHING] * 3]


def test_a_trace_shows_which_position_was_kept_when() -> None:
    kept = torch.eye(4, dtype=torch.bool)[[0, 0, 3, 1]]
    earlier = Trace("b", 0, 0, since=0, oscillations=1, kept=torch.eye(4, dtype=torch.bool)[[2] * 6])
    picture = trace_picture([Trace("a", 1, 2, since=2, oscillations=2, kept=kept), earlier])
    wide, high, top = 768 // 6, 6, TOP + 22
    shown = [
        ["#" + "".join(f"{v:02X}" for v in picture[top + y * high + 3, LEFT + x * wide + 60]) for x in range(6)]
        for y in range(4)
    ]
    dark, pale, white = CHANGES[3][1], NOTHING, "#FFFFFF"
    # Nothing is known before adaptation 2.
    assert shown == [
        [white, white, dark, dark, pale, pale],
        [white, white, pale, pale, pale, dark],
        [white, white, pale, pale, pale, pale],
        [white, white, pale, pale, dark, pale],
    ]


def test_a_long_title_fits() -> None:
    counts = torch.zeros(4, 8, dtype=torch.int32)
    assert count_picture(counts, 16, "layer." * 40).shape[1] > count_picture(counts, 16, "layer").shape[1]
