from __future__ import annotations

from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from omegaconf import OmegaConf

from bame_lightning.blocks.layout import from_blocks, to_blocks
from bame_lightning.blocks.pattern import NMPattern
from tests.helpers import Case, block_positions, cases


@pytest.mark.parametrize(
    "written", ["2:4", " 2:4 ", "2 : 4", {"n": 2, "m": 4}, OmegaConf.create({"n": 2, "m": 4}), NMPattern(2, 4)]
)
def test_every_way_to_write_a_pattern_means_the_same(written: Any) -> None:
    pattern = NMPattern.parse(written)
    assert (pattern.n, pattern.m, pattern.density, str(pattern)) == (2, 4, 0.5, "2:4")


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ("16:1", r"`pattern`.*N <= M; got 16:1\. Did you mean '1:16'\?"),
        ("0:4", r"`pattern`.*N >= 1.*got 0:4"),
        ({"n": 5, "m": 4}, r"`pattern`.*got 5:4\. Did you mean '4:5'\?"),
        (124, r"`pattern`.*such as '2:4', got the integer 124.*base 60\. Write it in quotes"),
        (True, r"`pattern` must be a string 'N:M' such as '1:16'.*got True"),
        (None, r"`pattern` must be a string 'N:M'.*got None"),
        (0.5, r"`pattern` must be a string 'N:M'.*got 0.5"),
        ("1-4", r"`pattern` must be a string 'N:M'.*got '1-4'"),
        ("1:4:8", r"got '1:4:8'"),
        ("-1:4", r"got '-1:4'"),
        ({"n": 2}, r"mapping \{n, m\}; got \{'n': 2\}"),
        ({"n": True, "m": 4}, r"got \{'n': True"),
        ({"n": 2, "m": 4, "k": 1}, r"got .*'k': 1"),
    ],
)
def test_a_pattern_that_cannot_be_is_refused_with_a_remedy(written: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        NMPattern.parse(written)


@pytest.mark.parametrize(("written", "integer"), [("2:4", 124), ("1:16", 76), ("4:8", 248)])
def test_a_pattern_without_quotes_in_yaml_is_refused(written: str, integer: int) -> None:
    with pytest.raises(ValueError, match=f"got the integer {integer}"):
        NMPattern.parse(yaml.safe_load(f"pattern: {written}")["pattern"])
    assert str(NMPattern.parse(yaml.safe_load(f"pattern: '{written}'")["pattern"])) == written


@given(cases())
def test_a_block_is_m_consecutive_inputs_of_one_filter_at_one_kernel_position(case: Case) -> None:
    pattern, weight = case
    blocks = to_blocks(weight, pattern.m)
    expected = [[weight[place].item() for place in block] for block in block_positions(weight.shape, pattern.m)]
    assert blocks.tolist() == expected


def test_blocks_of_a_convolution_by_hand() -> None:
    # Two filters, four input channels, two kernel positions: value = 100 filter + 10 channel + position.
    weight = torch.tensor([[[100 * o + 10 * c + k for k in range(2)] for c in range(4)] for o in range(2)])
    expected = [[0, 10], [20, 30], [1, 11], [21, 31], [100, 110], [120, 130], [101, 111], [121, 131]]
    assert to_blocks(weight, 2).tolist() == expected


@given(cases())
def test_blocks_take_their_places_back(case: Case) -> None:
    pattern, weight = case
    count = len(block_positions(weight.shape, pattern.m))
    blocks = torch.arange(count * pattern.m).reshape(count, pattern.m)
    restored = from_blocks(blocks, weight.shape)
    assert restored.shape == weight.shape
    for row, block in enumerate(block_positions(weight.shape, pattern.m)):
        assert [int(restored[place]) for place in block] == blocks[row].tolist()
    assert torch.equal(to_blocks(restored, pattern.m), blocks)
    assert torch.equal(from_blocks(to_blocks(weight, pattern.m), weight.shape), weight)


def test_blocks_of_a_linear_weight_are_a_view() -> None:
    weight = torch.zeros(2, 4)
    to_blocks(weight, 2)[3, 1] = 1
    assert weight.tolist() == [[0, 0, 0, 0], [0, 0, 0, 1]]
