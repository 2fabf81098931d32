"""Real processes that reach different parts of a network agree on what is sparse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.callbacks import reached
from tests.callbacks.processes import METHODS, launch
from tests.callbacks.test_distributed import assert_same, load
from tests.training import blocks_over

pytestmark = pytest.mark.filterwarnings("ignore:`late.weight`, not trained")
UNTRAINED = ("never", "frozen", "idle", "teacher.1", "teacher.3")


def assert_agree(records: list[dict[str, Any]], alone: dict[str, Any], *sparse: str, late: int = 8) -> None:
    """Ranks hold the same bits; the network of one process; untrained weights as they were, the late expert until then."""
    first, other = records
    assert_same({**first, "rank": 0}, {**other, "rank": 0})
    assert set(first["masks"]) == set(alone["masks"]) == {f"{part}.weight" for part in sparse}
    assert first["steps"] == alone["steps"]
    for step, (ours, theirs) in enumerate(zip(first["weights"], alone["weights"], strict=True)):
        for part, weight in ours.items():
            torch.testing.assert_close(weight, theirs[part], rtol=1e-9, atol=1e-12)
            assert torch.equal(weight != 0, theirs[part] != 0)
            if part in UNTRAINED or (part == "late" and step < late):
                assert torch.equal(weight, first["before"][part])
            else:
                assert blocks_over(weight, 2, 4) == 0


def assert_routed(folder: Path, name: str, alone: dict[str, Any], late: int = 8) -> None:
    assert_agree(load(folder, name, 2), alone, "model.1", "model.3", "early", "late", late=late)


def test_what_one_rank_reaches_is_sparse_on_both(tmp_path: Path) -> None:
    launch(reached.ddp_bame, tmp_path, 2)
    assert_routed(tmp_path, "bame", reached.routed("bame"))


@pytest.mark.slow
def test_what_one_rank_reaches_is_sparse_on_both_by_every_method(tmp_path: Path) -> None:
    launch(reached.ddp, tmp_path, 2)
    for name in METHODS:
        assert_routed(tmp_path, name, reached.routed(name))
    accumulated = reached.routed("bame", accumulate_grad_batches=2, max_epochs=2)
    assert accumulated["steps"] == 8
    # The first update that moves the late expert comes after two batches of the second epoch.
    assert_routed(tmp_path, "accumulated", accumulated, late=9)


@pytest.mark.slow
def test_shards_of_what_is_not_trained_are_as_they_were(tmp_path: Path) -> None:
    launch(reached.sharded, tmp_path, 2)
    for name in METHODS:
        alone = reached.run(name, reached.Taught(), reached.TAUGHT)
        assert_agree(load(tmp_path, name, 2), alone, "model.1", "model.3")
