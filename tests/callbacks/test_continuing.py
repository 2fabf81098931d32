"""From a trained network to a sparse one, on under a fixed mask, and on under another pattern."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from bame_lightning import BAMECallback, Schedule, StaticMask
from tests.training import Spy, Task, trainer

LAYER = "model.1.weight"


def network() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 5))


def task(state: dict[str, Tensor] | None = None, lr: float = 1e-3) -> Task:
    made = Task(network(), lambda p: torch.optim.AdamW(p, lr=lr))
    if state is not None:
        made.load_state_dict(state)
    return made


def loss(state: dict[str, Tensor]) -> float:
    """On all of the training data."""
    made = task(state).requires_grad_(False)
    batches = list(made.train_dataloader())
    return float(torch.stack([functional.cross_entropy(made.model(x), y) for x, y in batches]).mean())


def largest(weight: Tensor, n: int, m: int) -> Tensor:
    """The weight with all but the n largest of every m inputs set to zero, in plain loops."""
    kept = torch.zeros_like(weight)
    for row, values in enumerate(weight.tolist()):
        for first in range(0, len(values), m):
            block = sorted(range(first, first + m), key=lambda i: -abs(values[i]))[:n]
            kept[row, block] = weight[row, block]
    return kept


@pytest.fixture(scope="module")
def dense() -> dict[str, Tensor]:
    made = task(lr=1e-2)
    trainer(max_epochs=10).fit(made)
    return {name: value.clone() for name, value in made.state_dict().items()}


@pytest.fixture(scope="module")
def two_of_four(dense: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = task(dense)
    run = trainer(BAMECallback("2:4", rescale=False, verify=True), max_epochs=4)
    run.fit(made)
    path = tmp_path_factory.mktemp("sparse") / "last.ckpt"
    run.save_checkpoint(path)
    return path


def state_of(path: Path) -> dict[str, Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


def test_a_dense_network_is_pruned_by_magnitude_as_it_is(dense: dict[str, Tensor]) -> None:
    made = task(dense, lr=0.0)
    callback = BAMECallback("2:4", rescale=False, schedule=Schedule(start=0, stop=100, every=50))
    trainer(callback, max_epochs=1).fit(made)  # 8 steps, before any adaptation
    for index in (1, 3):
        assert torch.equal(made.model[index].weight, largest(dense[f"model.{index}.weight"], 2, 4))
    assert torch.equal(made.model[5].weight, dense["model.5.weight"])


def test_fine_tuning_recovers_what_pruning_cost(dense: dict[str, Tensor], two_of_four: Path) -> None:
    pruned = {
        name: largest(value, 2, 4) if name in (LAYER, "model.3.weight") else value for name, value in dense.items()
    }
    tuned = state_of(two_of_four)
    assert loss(dense) < loss(tuned) < loss(pruned)
    assert torch.equal(tuned[LAYER], largest(tuned[LAYER], 2, 4))


def test_a_sparse_network_goes_on_under_its_own_frozen_mask(two_of_four: Path) -> None:
    state = state_of(two_of_four)
    masks: list[Tensor] = []
    made, callback = task(state), StaticMask("2:4", init="nonzero", verify=True)
    trainer(callback, Spy(lambda *_: masks.append(callback.weights[0].kept.clone())), max_epochs=2).fit(made)
    zero = state[LAYER] == 0
    assert all(torch.equal(mask, masks[0]) for mask in masks)
    assert not (masks[0] & zero).any()  # no kept weight was exactly zero
    assert not made.model[1].weight[zero].any()
    assert not torch.equal(made.model[1].weight, state[LAYER])
    assert loss(made.state_dict()) < loss(state)


def test_two_of_four_goes_on_as_one_of_four(two_of_four: Path) -> None:
    state = state_of(two_of_four)
    still = task(state, lr=0.0)
    trainer(StaticMask("1:4", rescale=False), max_epochs=1).fit(still)
    assert torch.equal(still.model[1].weight, largest(state[LAYER], 1, 4))
    made, callback = task(state), BAMECallback("1:4", rescale=False, verify=True)
    trainer(callback, max_epochs=6).fit(made)
    assert callback.summary()["density"] == 0.25
    assert callback.summary()["flips"] > 0
    assert loss(made.state_dict()) < loss(still.state_dict())


def test_resuming_with_another_pattern_is_refused_and_says_what_to_do(two_of_four: Path) -> None:
    with pytest.raises(
        ValueError, match=r"is 2:4 of .* in the checkpoint and 1:4 .*load the weights and start a new run"
    ):
        trainer(BAMECallback("1:4")).fit(task(), ckpt_path=two_of_four, weights_only=True)
