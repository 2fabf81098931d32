"""Maps against the definition of blocks in `tests.helpers`, position by position."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from bame_lightning.blocks.pattern import NMPattern
from bame_lightning.show.maps import CHANGES, block_map, changes, mask_map, mask_title
from tests.helpers import Case, block_positions, cases, random_kept


@given(case=cases(), rows=st.integers(1, 6), columns=st.integers(1, 40))
def test_a_cut_of_a_mask_holds_blocks_side_by_side_in_their_order(case: Case, rows: int, columns: int) -> None:
    m, kept = case.pattern.m, case.weight > 0
    blocks = block_positions(tuple(kept.shape), m)
    each = len(blocks) // len(kept)
    shown = max(1, columns // m)
    expected = [
        [bool(kept[place]) for block in blocks[out * each : out * each + min(shown, each)] for place in block]
        for out in range(min(rows, len(kept)))
    ]
    assert mask_map(kept, m, rows=rows, columns=columns).tolist() == expected


@given(case=cases(), rows=st.integers(1, 6), columns=st.integers(1, 40))
def test_blocks_are_cut_as_their_mask_is(case: Case, rows: int, columns: int) -> None:
    m, kept = case.pattern.m, case.weight > 0
    blocks = block_positions(tuple(kept.shape), m)
    each = len(blocks) // len(kept)
    values = [sum(bool(kept[place]) for place in block) for block in blocks]
    found = block_map(torch.tensor(values), len(kept), m, rows=rows, columns=columns)
    mask = mask_map(kept, m, rows=rows, columns=columns)
    assert found.tolist() == [
        values[out * each : out * each + min(each, max(1, columns // m))] for out in range(min(rows, len(kept)))
    ]
    assert mask.view(*found.shape, m).sum(-1).equal(found)  # a block lies below its positions


def test_nothing_of_a_small_layer_is_left_out() -> None:
    kept = random_kept(64 * 8, NMPattern(1, 16)).view(64, 128)
    assert mask_map(kept, 16).equal(kept)
    assert block_map(torch.arange(64 * 8), 64, 16).equal(torch.arange(64 * 8).view(64, 8))


def test_a_block_wider_than_the_map_is_shown_whole() -> None:
    assert mask_map(torch.ones(2, 64, dtype=torch.bool), 32, columns=16).shape == (2, 32)


def test_every_change_has_a_name_and_a_colour_of_its_own() -> None:
    names = {
        (False, False): "pruned",
        (True, False): "pruned, kept at first",
        (False, True): "kept, pruned at first",
        (True, True): "kept, as at first",
    }
    for (first, now), name in names.items():
        assert CHANGES[int(changes(torch.tensor([[now]]), torch.tensor([[first]])))][0] == name
    assert len({colour for _, colour in CHANGES}) == 4


def test_titles_tell_the_true_size() -> None:
    assert mask_title("a", NMPattern(2, 4), (64, 100), (64, 100)) == "a, 2:4: 64 filters x 100 input positions"
    assert mask_title("a", NMPattern(2, 4), (2048, 100), (64, 96)) == (
        "a, 2:4: first 64 of 2,048 filters x first 96 of 100 input positions"
    )
