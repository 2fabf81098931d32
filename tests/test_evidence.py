from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bame_lightning.evidence import Evidence, OneBatch, Reading, accumulate
from bame_lightning.schedule import Window

EVERYWHERE, DESIGNATED = True, False


def test_all_blocks_are_read_at_intervals_and_designated_ones_in_between() -> None:
    evidence, window = Evidence(read_every=3), Window(4, 11, 10)
    kinds = {step: evidence.reading(step, window) for step in range(14)}
    assert [step for step, kind in kinds.items() if kind is None] == [0, 1, 2, 3, 11, 12, 13]
    assert [step for step, kind in kinds.items() if kind and kind.everywhere] == [4, 7, 10]
    assert [step for step, kind in kinds.items() if kind and not kind.everywhere] == [5, 6, 8, 9]


@pytest.mark.parametrize(("read_every", "steps"), [(1, 1), (2, 1), (3, 2), (10, 3), (16, 4), (100, 10)])
def test_a_reading_everywhere_stands_for_the_root_of_the_interval(read_every: int, steps: int) -> None:
    window = Window(0, 1000, 10)
    assert Evidence(read_every=read_every).reading(0, window) == Reading(EVERYWHERE, steps)
    if read_every > 1:
        assert Evidence(read_every=read_every).reading(1, window) == Reading(DESIGNATED, 1)


def test_without_designated_blocks_nothing_is_read_in_between() -> None:
    evidence = Evidence(read_every=2, share=0.0)
    assert [evidence.reading(step, Window(0, 5, 1)) is not None for step in range(6)] == [1, 0, 1, 0, 1, 0]


def test_every_block_may_adapt_by_accumulated_evidence() -> None:
    assert [Evidence(share=0.1).adaptable_share(step, Window(0, 10, 5)) for step in (0, 4, 9)] == [1, 1, 1]


def test_one_batch_reads_everything_when_masks_adapt_and_at_no_other_step() -> None:
    kinds = [OneBatch().reading(step, Window(2, 9, 3)) for step in range(12)]
    assert {step: kind for step, kind in enumerate(kinds) if kind} == {4: (EVERYWHERE, 1), 7: (EVERYWHERE, 1)}


def test_one_batch_anneals_its_share_by_a_cosine() -> None:
    window = Window(100, 200, 10)
    shares = [OneBatch(share=0.5).adaptable_share(step, window) for step in (100, 125, 150, 175, 200)]
    # (1 + cos) / 2 at 0, 45, 90, 135 and 180 degrees.
    root = math.sqrt(0.5)
    assert shares == pytest.approx([0.5, 0.25 * (1 + root), 0.25, 0.25 * (1 - root), 0])


@pytest.mark.parametrize(
    ("kind", "arguments", "says"),
    [
        (Evidence, {"read_every": 0}, r"`evidence.read_every` must be at least 1 optimizer step; got 0"),
        (Evidence, {"share": -0.1}, r"`evidence.share` is a share of blocks in \[0, 1\]; got -0.1"),
        (Evidence, {"share": 1.5}, r"`evidence.share`.*got 1.5"),
        (Evidence, {"share": math.nan}, r"`evidence.share`.*got nan"),
        (Evidence, {"step_size": 0.0}, r"`evidence.step_size` must be positive; got 0.0"),
        (Evidence, {"step_size": -1.0}, r"`evidence.step_size`.*got -1.0"),
        (Evidence, {"step_size": math.nan}, r"`evidence.step_size`.*got nan"),
        (Evidence, {"decay": -1e-9}, r"`evidence.decay` must not be negative; got -1e-09"),
        (Evidence, {"decay": math.nan}, r"`evidence.decay`.*got nan"),
        (OneBatch, {"share": 0.0}, r"`evidence.share` of a one-batch criterion.*\(0, 1\]; got 0.0"),
        (OneBatch, {"share": 1.1}, r"`evidence.share`.*got 1.1"),
        (OneBatch, {"share": math.nan}, r"`evidence.share`.*got nan"),
    ],
)
def test_arguments_outside_their_range_are_refused(kind: Any, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        kind(**arguments)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_ends_of_the_range_of_shares_are_allowed(share: float) -> None:
    assert Evidence(share=share).share == share


def test_accumulate_by_hand() -> None:
    evidence = torch.tensor([[2.0, 0.0], [-4.0, 1.0]])
    gradient = torch.tensor([[1.0, -2.0], [0.5, 0.0]])
    rate = torch.tensor([[0.5], [2.0]])
    # 0.75 * 2 - 0.5 * 1, 0 + 0.5 * 2; 0.75 * -4 - 2 * 0.5, 0.75 * 1
    assert accumulate(evidence, gradient, rate, torch.tensor(0.25)).tolist() == [[1.0, 1.0], [-4.0, 0.75]]


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=8), st.floats(0.01, 0.5), st.floats(0, 0.5))
def test_evidence_is_where_gradient_descent_with_decay_would_have_gone(
    gradients: list[float], rate: float, decay: float
) -> None:
    # A free weight under the same gradients, with torch's own SGD and L2 penalty.
    free = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([free], lr=rate, weight_decay=decay)
    evidence = torch.zeros(1, 1, dtype=torch.float64)
    for gradient in gradients:
        free.grad = torch.full_like(free, gradient)
        optimizer.step()
        step, shrink = torch.tensor([[rate]], dtype=torch.float64), torch.tensor(rate * decay, dtype=torch.float64)
        evidence = accumulate(evidence, free.grad, step, shrink)
    torch.testing.assert_close(evidence, free.detach())
