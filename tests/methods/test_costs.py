"""Which share of dense gradients a run reads on average, against counts by hand."""

import pytest

from bame_lightning import Evidence, NMPattern, OneBatch, Schedule
from bame_lightning.methods.bame import BAME
from bame_lightning.methods.masked import Masked
from bame_lightning.methods.rigl import DropAndGrow

PATTERN = NMPattern(1, 4)


@pytest.mark.parametrize(
    ("schedule", "evidence", "steps", "share"),
    [
        # everywhere at 2 and 5, contenders at 3, 4, 6 and 7
        (Schedule(2, 8, every=3), Evidence(read_every=3, contenders=0.5), 10, (2 + 4 * 0.5) / 10),
        # the run ends inside the window: everywhere at 2, contenders at 3
        (Schedule(2, 20, every=3), Evidence(read_every=3, contenders=0.5), 4, (1 + 0.5) / 4),
        # at the adaptations after 4 and 7
        (Schedule(2, 8, every=3), OneBatch(share=0.5), 10, 2 / 10),
        (Schedule(), Evidence(), 1000, 0.9 * (0.05 + 0.95 * 0.05)),
    ],
)
def test_bame_reads_as_by_hand(schedule: Schedule, evidence: Evidence | OneBatch, steps: int, share: float) -> None:
    assert BAME(evidence, schedule).mean_read_share(PATTERN, steps) == pytest.approx(share)


def test_rigl_reads_everything_where_it_swaps() -> None:
    # After 3, 6 and 9 of the window's ten steps; the run ends before the last one.
    assert DropAndGrow(Schedule(0, 10, every=3), 0.3).mean_read_share(PATTERN, 10) == pytest.approx(3 / 10)
    assert DropAndGrow(Schedule(0, 10, every=3), 0.3).mean_read_share(PATTERN, 8) == pytest.approx(2 / 8)


def test_static_masks_read_nothing() -> None:
    assert Masked().mean_read_share(PATTERN, 10) == 0
