from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from bame_lightning.bame.evidence import Evidence, OneBatch
from bame_lightning.bame.reading import Reading, noise_step
from bame_lightning.bame.schedule import Window

EVERYWHERE, CONTENDERS = True, False


def test_all_blocks_are_read_at_intervals_and_contenders_in_between() -> None:
    evidence, window = Evidence(read_every=3), Window(4, 11, 10)
    kinds = {step: evidence.reading(step, window) for step in range(14)}
    assert [step for step, kind in kinds.items() if kind is None] == [0, 1, 2, 3, 11, 12, 13]
    assert [step for step, kind in kinds.items() if kind and kind.everywhere] == [4, 7, 10]
    assert [step for step, kind in kinds.items() if kind and not kind.everywhere] == [5, 6, 8, 9]


@pytest.mark.parametrize(("read_every", "steps"), [(1, 1), (2, 1), (3, 2), (10, 3), (16, 4), (100, 10)])
def test_a_reading_everywhere_stands_for_the_root_of_the_interval(read_every: int, steps: int) -> None:
    window = Window(5, 1005, 10)
    assert Evidence(read_every=read_every, step_size=1.0).reading(5, window) == Reading(EVERYWHERE, steps, forgets=1)


def test_steps_shrink_along_a_cosine_to_nothing_at_the_end_of_the_window() -> None:
    window = Window(100, 112, 10)
    evidence = Evidence(read_every=3, step_size=0.5)
    kinds = [evidence.reading(step, window) for step in range(100, 112)]
    # (1 + cos) / 2 at 0, 15, ... 165 degrees, times 0.5; every third reading stands for 2 steps.
    third, half = math.sqrt(3) / 2, math.sqrt(0.5)
    a, b = (math.sqrt(6) + math.sqrt(2)) / 4, (math.sqrt(6) - math.sqrt(2)) / 4
    cosines = [1, a, third, half, 0.5, b, 0, -b, -0.5, -half, -third, -a]
    steps = [0.25 * (1 + cosine) * (1 if i % 3 else 2) for i, cosine in enumerate(cosines)]
    assert [kind.steps for kind in kinds if kind] == pytest.approx(steps, rel=1e-12)
    # What is forgotten knows neither the step size nor for how many steps a reading stands.
    assert [kind.forgets for kind in kinds if kind] == pytest.approx([(1 + c) / 2 for c in cosines], rel=1e-12)
    assert [kind.everywhere for kind in kinds if kind] == [EVERYWHERE, CONTENDERS, CONTENDERS] * 4


def test_every_block_may_adapt_by_accumulated_evidence() -> None:
    assert [Evidence(contenders=0.1).adaptable_share(step, Window(0, 10, 5)) for step in (0, 4, 9)] == [1, 1, 1]


def test_one_batch_reads_everything_when_masks_adapt_and_at_no_other_step() -> None:
    kinds = [OneBatch().reading(step, Window(2, 9, 3)) for step in range(12)]
    assert {step: kind for step, kind in enumerate(kinds) if kind} == {
        4: (EVERYWHERE, 1, 0, 1),
        7: (EVERYWHERE, 1, 0, 1),
    }


def test_one_batch_anneals_its_share_by_a_cosine() -> None:
    window = Window(100, 200, 10)
    shares = [OneBatch(share=0.5).adaptable_share(step, window) for step in (100, 125, 150, 175, 200)]
    # (1 + cos) / 2 at 0, 45, 90, 135 and 180 degrees.
    root = math.sqrt(0.5)
    assert shares == pytest.approx([0.5, 0.25 * (1 + root), 0.25, 0.25 * (1 - root), 0])


@pytest.mark.parametrize(
    ("kind", "arguments", "says"),
    [
        (Evidence, {"read_every": 0}, r"`evidence.read_every` must be a whole number .* at least 1; got 0"),
        (Evidence, {"read_every": 2.5}, r"`evidence.read_every` must be a whole number .* at least 1; got 2.5"),
        (Evidence, {"contenders": "abc"}, r"`evidence.contenders` must be a number; got 'abc'"),
        (Evidence, {"contenders": 0.0}, r"`evidence.contenders` is a share of .* positions in \(0, 1\]; got 0.0"),
        (Evidence, {"contenders": 1.5}, r"`evidence.contenders`.*got 1.5"),
        (Evidence, {"contenders": math.nan}, r"`evidence.contenders`.*got nan"),
        (Evidence, {"share": 0.3}, r"`evidence.share` = 0.3 was a share of blocks.*`evidence.contenders`"),
        (Evidence, {"step_size": 0.0}, r"`evidence.step_size` must be positive; got 0.0"),
        (Evidence, {"step_size": -1.0}, r"`evidence.step_size`.*got -1.0"),
        (Evidence, {"step_size": math.nan}, r"`evidence.step_size`.*got nan"),
        (Evidence, {"momentum": 1.0}, r"`evidence.momentum` is the weight of the past in a mean, in \[0, 1\); got 1.0"),
        (Evidence, {"momentum": -0.1}, r"`evidence.momentum`.*got -0.1"),
        (Evidence, {"momentum": math.nan}, r"`evidence.momentum`.*got nan"),
        (Evidence, {"margin": -1e-9}, r"`evidence.margin` must be a share of a weight, at least 0; got -1e-09"),
        (Evidence, {"margin": math.inf}, r"`evidence.margin`.*got inf"),
        (Evidence, {"margin": math.nan}, r"`evidence.margin`.*got nan"),
        (OneBatch, {"share": 0.0}, r"`evidence.share` of a one-batch criterion.*\(0, 1\]; got 0.0"),
        (OneBatch, {"share": 1.1}, r"`evidence.share`.*got 1.1"),
        (OneBatch, {"share": math.nan}, r"`evidence.share`.*got nan"),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_arguments_outside_their_range_are_refused(kind: Any, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        kind(**arguments)


def test_all_pruned_positions_may_contend() -> None:
    assert Evidence(contenders=1.0).contenders == 1


def test_swaps_may_need_no_margin() -> None:
    assert Evidence(margin=0.0).margin == 0


@pytest.mark.parametrize(
    ("steps", "m", "inverse_square"),
    [
        (50, 4, 200 * math.log(2)),  # 2 * 50 * ln 4
        (1, 16, 8 * math.log(2)),
        (1000, 3, 2197.2245773362196),  # 2000 * 1.0986122886681098
        (7, 2, 14 * math.log(2)),
        (7, 1, 14 * math.log(2)),  # nothing is pruned there, and ln 1 = 0
    ],
)
def test_the_noise_step_by_hand(steps: int, m: int, inverse_square: float) -> None:
    assert noise_step(steps, m) == pytest.approx(inverse_square**-0.5, rel=1e-12)


@pytest.mark.parametrize(("steps", "m"), [(100, 4), (400, 16), (250, 64)])
def test_noise_moves_the_evidence_of_a_block_about_as_far_as_a_weight_over_the_whole_window(steps: int, m: int) -> None:
    # In units of the root mean square weight, and of gradients: pure noise, every step alike.
    generator = torch.Generator().manual_seed(steps)
    walk = torch.zeros(500, m)
    for _ in range(steps):
        walk -= noise_step(steps, m) * torch.randn(500, m, generator=generator)
    # Each is a random walk; the largest of M is expected at sqrt(2 ln M) deviations, a bit less for small M.
    assert walk.std().item() == pytest.approx(1 / math.sqrt(2 * math.log(m)), rel=0.05)
    assert 0.75 < walk.abs().amax(-1).mean() < 1.15
    # A gradient that lasts moves it several times as far.
    assert steps * noise_step(steps, m) > 4
