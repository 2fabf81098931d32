"""Blocks gathered side by side, against plain indexing."""

from __future__ import annotations

import pytest
import torch

from bame_lightning.working_set import BlockState, WorkingSet


def whole(*, mean: bool = True) -> BlockState:
    values = torch.arange(24.0).view(6, 4)
    return BlockState(values % 3 == 0, values.clone(), 100 + values if mean else None)


def test_changes_come_back_to_where_they_came_from() -> None:
    everything = whole()
    at_work = WorkingSet(torch.tensor([1, 4]), everything)
    assert at_work.state.kept[:2].tolist() == [[False, False, True, False], [False, False, True, False]]
    assert at_work.state.evidence[:2].tolist() == [[4.0, 5.0, 6.0, 7.0], [16.0, 17.0, 18.0, 19.0]]
    at_work.state.evidence[:2] *= -1
    at_work.state.mean[1] = 7
    at_work.put_back()
    signs = torch.tensor([1, -1, 1, 1, -1, 1])[:, None]
    assert torch.equal(everything.evidence, signs * torch.arange(24.0).view(6, 4))
    assert everything.mean[4].tolist() == [7.0] * 4
    assert torch.equal(everything.mean[[0, 1, 2, 3, 5]], 100 + torch.arange(24.0).view(6, 4)[[0, 1, 2, 3, 5]])


@pytest.mark.parametrize(
    ("index", "places"),
    [([0, 2, 5], [2, 3, 3, 0]), ([], [0, 0, 0, 0]), ([5], [0, 1, 1, 1]), ([0, 1, 2, 3, 4, 5], [5, 3, 1, 0])],
)
def test_what_is_done_to_other_blocks_goes_nowhere(index: list[int], places: list[int]) -> None:
    everything = whole(mean=False)
    at_work = WorkingSet(torch.tensor(index, dtype=torch.int64), everything)
    found = at_work.places(torch.tensor([5, 3, 1, 0]))
    assert found.tolist() == places
    at_work.state.evidence.index_copy_(0, found, torch.full((4, 4), -1.0))
    at_work.put_back()
    changed = [block for block in range(6) if (everything.evidence[block] == -1).all()]
    assert changed == sorted({0, 1, 3, 5} & set(index))
