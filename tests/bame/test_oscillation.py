from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bame_lightning.bame.oscillation import FlipHistory, frozen_blocks, oscillation_frequency
from bame_lightning.blocks.pattern import NMPattern
from tests.helpers import random_kept


def oscillations(*masks: str) -> list[int]:
    """Oscillations of one block after each change of its mask, given as strings of ones and zeros."""
    kept = [torch.tensor([[bit == "1" for bit in mask]]) for mask in masks]
    history, counts = FlipHistory(1, len(masks[0])), []
    for old, new in pairwise(kept):
        history.record(old, new)
        counts.append(int(history.oscillations))
    return counts


def test_reviving_what_was_pruned_earlier_counts_one() -> None:
    assert oscillations("1000", "0100", "1000") == [0, 1]


def test_reviving_what_was_never_kept_counts_nothing() -> None:
    assert oscillations("1000", "0100", "0010", "0001") == [0, 0, 0]


def test_going_back_and_forth_counts_every_return() -> None:
    assert oscillations("1000", "0100", "1000", "0100", "1000") == [0, 1, 2, 3]


def test_the_return_need_not_be_the_next_change() -> None:
    assert oscillations("1000", "0100", "0010", "0010", "1000") == [0, 0, 0, 1]


def test_two_returns_in_one_adaptation_count_once() -> None:
    assert oscillations("1100", "0011", "1100") == [0, 1]


def test_a_mask_that_stays_counts_nothing() -> None:
    assert oscillations("1100", "0110", "0110", "0110") == [0, 0, 0]


@given(st.integers(1, 4), st.integers(0, 10**6))
def test_history_of_many_blocks_against_loops(n: int, seed: int) -> None:
    masks = [random_kept(5, NMPattern(n, 4), seed + c) for c in range(6)]
    history = FlipHistory(5, 4)
    for old, new in pairwise(masks):
        history.record(old, new)
    for block in range(5):
        pruned: set[int] = set()
        count = 0
        for old, new in pairwise(masks):
            before = {i for i in range(4) if old[block, i]}
            after = {i for i in range(4) if new[block, i]}
            count += bool((after - before) & pruned)
            pruned |= before - after
        assert history.oscillations[block] == count
        assert set(history.pruned_before()[block].nonzero().flatten().tolist()) == pruned


def test_a_block_is_quiet_as_long_as_it_has_not_oscillated() -> None:
    # One block goes away and comes back, another changes once, the third never.
    masks = [["10", "10", "10"], ["01", "10", "10"], ["10", "01", "10"], ["10", "01", "10"], ["10", "01", "10"]]
    kept = [torch.tensor([[bit == "1" for bit in block] for block in blocks]) for blocks in masks]
    history, seen = FlipHistory(3, 2), []
    for old, new in pairwise(kept):
        history.record(old, new)
        seen.append(history.quiet().tolist())
    assert seen == [[1, 1, 1], [0, 2, 2], [1, 3, 3], [2, 4, 4]]


@given(st.integers(1, 4), st.integers(2, 6), st.integers(0, 10**6))
def test_swaps_are_recorded_as_the_masks_that_they_make(n: int, blocks: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = random_kept(blocks, NMPattern(n, 5), seed)
    whole, single = FlipHistory(blocks, 5), FlipHistory(blocks, 5)
    for _ in range(8):
        # A pair in some of the blocks, of which some are swapped.
        chosen = torch.randperm(blocks, generator=generator)[:2]
        places = [[torch.nonzero(mask[b] == kept)[0].item() for b in chosen] for kept in (False, True)]
        revived, pruned = map(torch.tensor, places)
        swapped = torch.rand(2, generator=generator) > 0.3
        new = mask.clone()
        for b, up, down, swap in zip(chosen.tolist(), *places, swapped.tolist(), strict=True):
            if swap:
                new[b, up], new[b, down] = True, False
        single.record_swaps(chosen, revived, pruned, swapped)
        whole.record(mask, new)
        mask = new
        assert torch.equal(single.oscillations, whole.oscillations)
        assert torch.equal(single.quiet(), whole.quiet())
        assert torch.equal(single.pruned_before(), whole.pruned_before())


@pytest.mark.parametrize(
    ("freeze_after", "frozen"), [(None, [0, 0, 0, 0]), (0, [0, 1, 1, 1]), (1, [0, 0, 1, 1]), (2, [0, 0, 0, 1])]
)
def test_more_oscillations_than_allowed_freeze_a_block(freeze_after: int | None, frozen: list[int]) -> None:
    assert frozen_blocks(torch.tensor([0, 1, 2, 3], dtype=torch.int32), freeze_after).tolist() == frozen


def test_frequency_is_oscillations_per_adaptation() -> None:
    counts = torch.tensor([0, 1, 3], dtype=torch.int32)
    assert oscillation_frequency(counts, 4).tolist() == [0, 0.25, 0.75]
    assert oscillation_frequency(counts[:2], 1).tolist() == [0, 1]
    assert oscillation_frequency(torch.zeros(2, dtype=torch.int32), 0).tolist() == [0, 0]
