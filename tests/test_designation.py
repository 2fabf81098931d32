from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bame_lightning.designation import designate, most_urgent, urgency


def test_urgency_compares_the_strongest_pruned_with_the_weakest_kept_weight() -> None:
    weight = torch.tensor([[2.0, -0.5, 0.0, 0.0], [0.0, 8.0, 0.0, -4.0]])
    evidence = torch.tensor([[0.0, 0.0, 0.25, -1.0], [-1.0, 0.0, 0.5, 0.0]])
    # |-1| / |-0.5| and |-1| / |-4|
    assert urgency(weight, evidence, evidence == 0).tolist() == [2.0, 0.25]


def test_a_block_whose_kept_weight_is_zero_is_the_most_urgent_and_stays_finite() -> None:
    mask = torch.tensor([[True, False]] * 3)
    weight = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    evidence = torch.tensor([[0.0, 0.5], [0.0, 100.0], [0.0, 0.0]])
    some, large, none = urgency(weight, evidence, mask).tolist()
    assert some > large == 100
    assert none == 0


def test_a_block_that_keeps_everything_never_wants_to_swap() -> None:
    assert urgency(torch.ones(2, 3), torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)).tolist() == [0, 0]


@given(st.data())
def test_designated_are_the_most_urgent_unfrozen_blocks_ascending(data: st.DataObject) -> None:
    ratios = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=12))
    frozen = data.draw(st.lists(st.booleans(), min_size=len(ratios), max_size=len(ratios)))
    eighths = data.draw(st.integers(0, 8))
    unfrozen = [i for i in range(len(ratios)) if not frozen[i]]
    # Rounded up, in whole numbers; between equals the lower index goes first.
    count = -(-eighths * len(unfrozen) // 8)
    expected = sorted(sorted(unfrozen, key=lambda i: (-ratios[i], i))[:count])
    chosen = designate(torch.tensor(ratios).float(), torch.tensor(frozen), eighths / 8)
    assert chosen.tolist() == expected


def test_an_infinitely_urgent_frozen_block_is_not_designated() -> None:
    urgent = torch.tensor([0.0, math.inf, 0.0])
    assert designate(urgent, torch.tensor([False, True, False]), 1.0).tolist() == [0, 2]


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.01, 1), (0.25, 1), (0.26, 2), (1.0, 4)])
def test_the_share_is_rounded_up(share: float, count: int) -> None:
    assert len(designate(torch.zeros(4), torch.zeros(4, dtype=torch.bool), share)) == count


@given(st.data())
def test_most_urgent_against_loops(data: st.DataObject) -> None:
    rows, per_row = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    everything = range(rows * per_row)
    blocks = sorted(data.draw(st.sets(st.sampled_from(everything))))
    ratios = {block: data.draw(st.integers(-1, 3)) for block in blocks}
    chosen, may_swap = most_urgent(
        torch.tensor([float(ratios[block]) for block in blocks]),
        None if len(blocks) == len(everything) else torch.tensor(blocks, dtype=torch.int64),
        rows,
        per_row,
    )
    assert [block // per_row for block in chosen.tolist()] == list(range(rows))
    for row, (block, may) in enumerate(zip(chosen.tolist(), may_swap.tolist(), strict=True)):
        rivals = [(-ratios[b], b) for b in blocks if b // per_row == row and ratios[b] >= 0]
        assert may == bool(rivals)
        if rivals:
            assert block == min(rivals)[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_urgency_against_loops(dtype: torch.dtype) -> None:
    # More than a piece, and weights that the optimizer has moved although they are pruned.
    generator = torch.Generator().manual_seed(0)
    weight, evidence = torch.randn(2, 60_000, 3, generator=generator, dtype=dtype)
    mask = torch.rand(60_000, 3, generator=generator) > 0.5
    mask[:, 1] = True
    evidence[mask] = 0
    expected = [
        max([0.0, *(abs(v) for v, k in zip(vs, ks, strict=True) if not k)])
        / min(abs(w) for w, k in zip(ws, ks, strict=True) if k)
        for ws, vs, ks in zip(weight.tolist(), evidence.tolist(), mask.tolist(), strict=True)
    ]
    ratios = urgency(weight, evidence, mask)
    assert ratios.dtype == dtype
    torch.testing.assert_close(ratios, torch.tensor(expected, dtype=dtype))
