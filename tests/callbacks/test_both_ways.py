"""Masks that are 2:4 along the output dimension, too, from the first step to the last."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bame_lightning import BAMECallback, Evidence, OneBatch, RigL, Schedule, StaticMask
from tests.training import Spy, Task, trainer

METHODS: dict[str, Callable[..., Any]] = {
    "bame": lambda pattern, **kwargs: BAMECallback(
        pattern,
        schedule=Schedule(every=1),
        evidence=Evidence(read_every=4, contenders=0.5, step_size=8.0),
        **({"both_ways": True} | kwargs),
    ),
    "rigl": lambda pattern, **kwargs: RigL(pattern, schedule=Schedule(every=2), **({"both_ways": True} | kwargs)),
    "static": lambda pattern, **kwargs: StaticMask(pattern, **({"both_ways": True} | kwargs)),
}


def model() -> nn.Sequential:
    """Layers whose outputs 4 does not divide, and a convolution."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 7, 3, padding=1),
        nn.Flatten(),
        nn.Linear(112, 33),
        nn.ReLU(),
        nn.Linear(33, 5),
    )


def most_in_a_column(weight: Tensor) -> int:
    """Of any four consecutive outputs, over input channels and kernel positions, one by one."""
    matrix = weight.detach().flatten(1)
    return max(int(matrix[row : row + 4].count_nonzero(dim=0).max()) for row in range(0, len(matrix), 4))


def most_in_a_row(weight: Tensor) -> int:
    rows = weight.detach().movedim(1, -1).flatten(0, -2)
    return max(int(rows[:, start : start + 4].count_nonzero(dim=1).max()) for start in range(0, rows.shape[1], 4))


@pytest.mark.parametrize("pattern", ["1:16", "1:8", "1:4", "2:4"])
@pytest.mark.parametrize("name", METHODS)
def test_weights_fit_in_both_directions_after_every_step(name: str, pattern: str) -> None:
    callback, task, seen = METHODS[name](pattern, verify=True), Task(model()), list[int]()
    assert most_in_a_column(task.model[2].weight) == 4

    def look(*_: Any) -> None:
        seen.extend(f(sparse.weight) for f in (most_in_a_column, most_in_a_row) for sparse in callback.weights)

    trainer(callback, Spy(look), max_epochs=3).fit(task)
    assert len(callback.weights) == 2
    assert len(seen) == 24 * 4
    assert max(seen) <= 2
    summary = callback.summary()
    if name != "static":
        # At 2:4 all columns are full but those of the rows that are left over.
        assert summary["flips"] > 0
        assert summary["refused_swaps"] > 0
    plain = METHODS[name](pattern, both_ways=False)
    trainer(plain, max_epochs=1).fit(Task(model()))
    # At 1:16 hardly any four rows of so small a layer want the same column.
    assert max(most_in_a_column(sparse.weight) for sparse in plain.weights) > 2 or pattern == "1:16"
    assert "refused_swaps" not in plain.summary()


@pytest.mark.parametrize("name", ["bame", "rigl"])
def test_refused_swaps_are_logged_and_go_on_in_a_resumed_run(name: str, tmp_path: Path) -> None:
    counts, callback = list[int](), METHODS[name]("1:4")

    def look(fit: Any, _: Any) -> None:
        counts.append(int(fit.callback_metrics["bame/refused_swaps"]))

    fit = trainer(callback, Spy(look), log_every_n_steps=1, max_epochs=2)
    fit.fit(Task(model()))
    assert counts == sorted(counts)
    assert counts[-1] == callback.summary()["refused_swaps"] > counts[7] > 0
    half = trainer(
        METHODS[name]("1:4"), Spy(lambda fit, _: setattr(fit, "should_stop", True)), max_epochs=2, min_epochs=1
    )
    half.fit(Task(model()))
    assert half.global_step == 8
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed = METHODS[name]("1:4")
    trainer(resumed, max_epochs=2).fit(Task(model()), ckpt_path=tmp_path / "half.ckpt")
    assert resumed.summary()["refused_swaps"] == counts[-1]
    for a, b in zip(resumed.weights, callback.weights, strict=True):
        assert torch.equal(a.weight, b.weight)


def test_a_checkpoint_of_a_run_that_kept_one_direction_is_refused(tmp_path: Path) -> None:
    fit = trainer(METHODS["bame"]("1:4", both_ways=False), max_epochs=1)
    fit.fit(Task(model()))
    fit.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(
        ValueError, match=r"`both_ways=True` goes on with masks .* that of `model\.2` in the checkpoint is not"
    ):
        trainer(METHODS["bame"]("1:4"), max_epochs=2).fit(Task(model()), ckpt_path=tmp_path / "plain.ckpt")


def test_patterns_and_rules_that_cannot_fit_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^`model\.2`: `both_ways=True` .* at most 2 of 4 consecutive inputs.*got 4:8\. Or"
    ):
        trainer(METHODS["static"]("4:8")).fit(Task(model()))
    with pytest.raises(ValueError, match=r"`both_ways=True` refuses single swaps.*use evidence=Evidence\(\)"):
        BAMECallback("1:4", evidence=OneBatch(), both_ways=True)


def test_hardware_multiplies_with_the_transposed_weight_at_half_the_cost() -> None:
    found = []
    for both_ways in (False, True):
        callback = StaticMask("1:16", both_ways=both_ways)
        task = Task(nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.Linear(16, 32), nn.Linear(32, 5)))
        trainer(callback, max_epochs=1).fit(task)
        assert [sparse.label for sparse in callback.weights] == ["model.1", "model.2"]
        found.append(callback.summary()["flops"])
    # Multiplications of 64 samples in each of the three products of a layer, the first one's input gradient, too.
    sparse, dense = 64 * (48 * 16 + 16 * 32), 64 * 32 * 5
    both, one = (2 * (sparse / 16 + share * sparse + sparse / 16 + 3 * dense) for share in (1 / 2, 1))
    assert found[0]["flops/hardware/train_total"] == pytest.approx(one)
    assert found[1]["flops/hardware/train_total"] == pytest.approx(both)
    algorithmic = pytest.approx(2 * (3 * sparse / 16 + 3 * dense))
    assert found[0]["flops/train_total"] == found[1]["flops/train_total"] == algorithmic
