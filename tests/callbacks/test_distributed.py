"""Real processes: ranks train one network on different data; one that goes astray is named; shards add up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch import Tensor

from bame_lightning import SRSTE, BAMECallback, RigL, StaticMask
from tests.callbacks import processes
from tests.callbacks.processes import METHODS, RESUMED, Exact, train, until
from tests.training import trainer

STEPS = 24


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Any]]:
    """What one process makes of the same batches."""
    return {name: train(make(), Exact()) for name, make in METHODS.items()}


def load(folder: Path, name: str, ranks: int) -> list[Any]:
    return [torch.load(folder / f"{name}-rank{rank}.pt") for rank in range(ranks)]


def leaves(tree: Any) -> list[Tensor]:
    """All numbers in a tree of dictionaries, in the order of their names."""
    if isinstance(tree, dict):
        return [leaf for key in sorted(tree) for leaf in leaves(tree[key])]
    if isinstance(tree, list):
        return [leaf for branch in tree for leaf in leaves(branch)]
    return [] if isinstance(tree, str | None) else [torch.as_tensor(tree)]


def assert_same(one: Any, other: Any, **tolerance: float) -> None:
    """Equal to the last bit, or within a tolerance where numbers are not integers."""
    for a, b in zip(leaves(one), leaves(other), strict=True):
        if tolerance and a.is_floating_point():
            torch.testing.assert_close(b.double(), a.double(), **tolerance)
        else:
            assert torch.equal(a, b)


def assert_trains_one_network(records: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    """All ranks are the same to the last bit; one process differs by the order in which batches are summed."""
    first, *others = records
    for other in others:
        for part in ("weights", "metrics", "state", "summary"):
            ignored = {"train/loss"} if part == "metrics" else set()
            assert_same(without(first[part], ignored), without(other[part], ignored))
    assert len(alone["weights"]) == len(first["weights"]) == STEPS
    for ours, theirs in zip(first["weights"], alone["weights"], strict=True):
        assert all(torch.equal(a != 0, b != 0) for a, b in zip(ours, theirs, strict=True))
    assert_same(alone["weights"], first["weights"], rtol=1e-9, atol=1e-12)
    # Metrics and some of the books pass through float32.
    assert_same(
        without(alone["metrics"], {"train/loss"}), without(first["metrics"], {"train/loss"}), rtol=1e-5, atol=1e-7
    )
    # Blocks that have just swapped are equally urgent, and rounding decides which are designated: weights agree all the same,
    # evidence does in nearly all positions.
    pairs = [*zip(leaves(alone["state"]), leaves(first["state"]), strict=True)]
    wrong = sum(int((~torch.isclose(a.double(), b.double(), rtol=1e-9, atol=1e-12)).sum()) for a, b in pairs)
    assert wrong <= 0.01 * sum(a.numel() for a, _ in pairs)
    assert_same(alone["summary"], first["summary"], rtol=1e-5, atol=1e-7)


def without(part: Any, names: set[str]) -> Any:
    return [{key: value for key, value in row.items() if key not in names} for row in part] if names else part


def assert_saw_different_data(records: list[dict[str, Any]]) -> None:
    first, *others = records
    assert len(first["local"]) == STEPS
    assert not any(torch.equal(a, b) for other in others for a, b in zip(first["local"], other["local"], strict=True))


def masks_moved(alone: dict[str, Any], since: int = 0) -> bool:
    return any(
        not torch.equal(a != 0, b != 0) for a, b in zip(alone["weights"][since], alone["weights"][-1], strict=True)
    )


def test_two_ranks_train_the_network_that_one_process_trains(tmp_path: Path) -> None:
    processes.launch(processes.ddp_bame, tmp_path, 2)
    records, alone = load(tmp_path, "bame", 2), train(METHODS["bame"](), Exact())
    assert_saw_different_data(records)
    assert masks_moved(alone)
    assert_trains_one_network(records, alone)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_every_method_under_ddp(ranks: int, tmp_path: Path, alone: dict[str, Any]) -> None:
    processes.launch(processes.ddp, tmp_path, ranks)
    for name in METHODS:
        records = load(tmp_path, name, ranks)
        assert_saw_different_data(records)
        assert masks_moved(alone[name]) == (name != "static")
        assert_trains_one_network(records, alone[name])


@pytest.mark.slow
def test_every_method_under_fsdp2(tmp_path: Path, alone: dict[str, Any]) -> None:
    processes.launch(processes.sharded, tmp_path, 2)
    # What is sharded is computed densely, so other FLOPs are executed than by one process.
    for name in METHODS.keys() - {"bame_computed"}:
        assert_trains_one_network(load(tmp_path, name, 2), alone[name])


@pytest.mark.slow
def test_a_rank_that_goes_astray_is_named(tmp_path: Path) -> None:
    processes.launch(processes.corrupted, tmp_path, 4)
    expected = {
        # The first comparison after step 5 is at step 50, at the end, or with `verify` after every step.
        "mask": "after step 50, the mask of `model.4` on rank 2 differs from that of 3 others",
        "weight": "after step 8, the weight of `model.4` on rank 3 differs from that of 3 others",
        "evidence": "after step 50, the evidence of `model.6` on rank 3 differs from that of 3 others",
        "latent": "after step 6, the latent weight of `model.2` on rank 3 differs from that of 3 others",
        "noise": "after step 8, the size of gradients of `model.2` on rank 3 differs from that of 3 others",
    }
    for name, message in expected.items():
        reports = load(tmp_path, name, 4)
        assert message in reports[0]
        assert reports == reports[:1] * 4


@pytest.mark.slow
def test_shards_that_cannot_be_right_are_refused(tmp_path: Path) -> None:
    processes.launch(processes.refused, tmp_path, 2)
    expected = {
        "uneven": "`model.1.weight` has 15 rows, which 2 processes cannot share evenly",
        "columns": "`model.1.weight` is a DTensor placed as (Shard(dim=1),), which cuts its blocks",
        "tensor_parallel": "`strategy` ModelParallelStrategy has `tensor_parallel_size` 2",
        "averaging": "`callbacks` holds EMAWeightAveraging",
        "both_ways": "2 processes hold 2 rows of `model.1` each, which 4 does not divide",
        "transposable": "4 does not divide its output dimension 4 / 2 processes",
    }
    for name, message in expected.items():
        for report in load(tmp_path, name, 2):
            assert message in report
            assert "dense" in report or "ddp" in report


@pytest.mark.slow
def test_a_checkpoint_resumes_on_another_number_of_ranks(tmp_path: Path) -> None:
    for name in RESUMED:
        half = trainer(METHODS[name](), until(2), max_epochs=4, min_epochs=1)
        half.fit(Exact())
        half.save_checkpoint(tmp_path / f"{name}-single.ckpt")
    processes.launch(processes.checkpoints, tmp_path, 2)
    for name in RESUMED:
        (whole, _), close = load(tmp_path, f"{name}-whole", 2), {"rtol": 1e-9, "atol": 1e-12}
        assert masks_moved(whole, since=16)
        for kind in ("directory", "file", "single"):
            for record in load(tmp_path, f"{name}-{kind}", 2):
                tolerance = close if kind == "single" else {}
                assert_same(whole["weights"][16:], record["weights"], **tolerance)
                assert_same(whole["state"], record["state"], **tolerance)
        # What two ranks saved, one process goes on with.
        record = train(METHODS[name](), Exact(), tmp_path / f"{name}-file.ckpt", max_epochs=4)
        assert_same(whole["weights"][16:], record["weights"], **close)
        assert_same(whole["state"], record["state"], **close)


@pytest.mark.parametrize(
    "callback",
    [BAMECallback("2:4"), RigL("2:4"), SRSTE("2:4"), StaticMask("2:4")],
    ids=lambda callback: type(callback).__name__,
)
@pytest.mark.parametrize(
    ("strategy", "why"),
    [(FSDPStrategy, "FSDP1 flattens weights"), (DeepSpeedStrategy, "DeepSpeed updates flat copies of the weights")],
)
def test_strategies_that_flatten_weights_are_refused(callback: Any, strategy: Any, why: str) -> None:
    # Neither starts here: FSDP1 needs a GPU, and DeepSpeed is not installed.
    running = trainer(callback)
    running._accelerator_connector.strategy = object.__new__(strategy)
    with pytest.raises(ValueError, match=rf"`strategy` {strategy.__name__} cannot train .*{why}.*Use `strategy='ddp'`"):
        callback.setup(running, Exact(), "fit")
    callback.setup(running, Exact(), "test")
