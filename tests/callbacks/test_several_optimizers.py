"""Several optimizers that hold sparse weights, each at a pace of its own: a GAN whose critic steps in every batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bame_lightning import BAMECallback, RigL, Schedule, StaticMask
from tests.callbacks import processes
from tests.callbacks.gan import BATCHES, CRITIC_STEPS, EPOCHS, STEPS, Gan
from tests.callbacks.registry import METHODS, every_method
from tests.training import Spy, blocks_over, trainer


def clocks(callback: Any) -> dict[str, int]:
    """Steps that a callback has counted, by network."""
    return {clock["layers"][0].partition(".")[0]: clock["steps"] for clock in callback.state_dict()["clocks"]}


@every_method
def test_a_layer_moves_in_the_steps_of_its_own_optimizer_only(name: str) -> None:
    callback, task = METHODS[name](), Gan()
    before: dict[str, list[Tensor]] = {}
    moved = {"maker": 0, "critic": 0}

    def look(*_: Any) -> None:
        for network in moved:
            held = [sparse for sparse in callback.weights if sparse.name.startswith(network)]
            assert len(held) == {"maker": 3, "critic": 2}[network]
            assert not any(blocks_over(sparse.weight, 2, 4) for sparse in held)
            here = [tensor.clone() for sparse in held for tensor in (sparse.values, sparse.kept)]
            differs = network in before and any(
                not torch.equal(a, b) for a, b in zip(here, before[network], strict=True)
            )
            if network == "maker" and task.batches % CRITIC_STEPS:
                assert not differs
            moved[network] += differs
            before[network] = here

    trainer(callback, Spy(look), max_epochs=EPOCHS).fit(task)
    assert clocks(callback) == STEPS
    assert callback.steps == sum(STEPS.values())
    assert moved == {"critic": 79, "maker": 16}  # nobody has looked before the first batch


@pytest.mark.parametrize("make", [BAMECallback, RigL])
def test_a_window_is_a_share_of_the_steps_of_ones_own_optimizer(make: Callable[..., Any]) -> None:
    callback, task = make("2:4", schedule=Schedule(start=0.0, stop=0.5, every=2)), Gan()
    changed: dict[str, list[int]] = {"maker": [], "critic": []}
    before: dict[str, Tensor] = {}

    def look(*_: Any) -> None:
        own = {"critic": task.batches, "maker": task.batches // CRITIC_STEPS}
        for sparse in callback.weights:
            network = sparse.name.partition(".")[0]
            if sparse.name in before and not torch.equal(before[sparse.name], sparse.kept):
                changed[network].append(own[network])
            before[sparse.name] = sparse.kept.clone()

    trainer(callback, Spy(look), max_epochs=EPOCHS).fit(task)
    for network, steps in STEPS.items():
        assert changed[network], f"the masks of the {network} never change"
        assert max(changed[network]) <= steps // 2
        assert all(step % 2 == 0 for step in changed[network])
    assert max(changed["critic"]) > 30


def test_a_layer_is_booked_for_the_batches_of_its_own_optimizer() -> None:
    callback = StaticMask("2:4")
    trainer(callback, max_epochs=EPOCHS).fit(Gan())
    # 4 inputs a batch; the critic sees those that are made and real ones. Forward, and gradients of inputs and weights.
    critic, maker, head = 3 * 8 * (48 * 16 + 16 * 16), 3 * 4 * (8 * 16 + 16 * 16 + 16 * 48), 3 * 8 * 16
    dense = 80 * critic + 16 * maker + 80 * head
    sparse = 80 * critic / 2 + 16 * maker / 2 + 80 * head
    booked = callback.summary()["flops"]
    assert booked["flops/train_total"] == 2 * sparse
    assert booked["flops/train_vs_dense"] == pytest.approx(sparse / dense, rel=1e-9)


@pytest.mark.parametrize("name", ["bame", "rigl", "sr_ste"])
def test_an_interrupted_run_ends_as_one_that_is_not(name: str, tmp_path: Path) -> None:
    whole, first, second = (METHODS[name]() for _ in range(3))
    straight = Gan()
    trainer(whole, max_epochs=4).fit(straight)
    half = Gan()

    def stop(fit: Any, task: Any) -> None:
        if task.batches == 2 * BATCHES:
            fit.should_stop = True

    fit = trainer(first, Spy(stop), max_epochs=4)
    fit.fit(half)
    fit.save_checkpoint(tmp_path / "half.ckpt")
    resumed = Gan()
    trainer(second, max_epochs=4).fit(resumed, ckpt_path=tmp_path / "half.ckpt", weights_only=False)
    assert clocks(second) == clocks(whole)
    assert resumed.batches == straight.batches == 64
    for ours, theirs in zip(resumed.parameters(), straight.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert second.summary() == whole.summary()


def test_a_sparse_weight_of_two_optimizers_is_refused_before_anything_changes() -> None:
    class Shared(Gan):
        def configure_optimizers(self) -> Any:
            return [torch.optim.Adam(self.critic.parameters()), torch.optim.SGD(self.parameters(), lr=0.1)]

    task = Shared()
    before = task.critic[0].weight.detach().clone()
    with pytest.raises(
        ValueError, match=r"returns Adam and SGD with the sparse weight `critic.0.weight` in common.*one"
    ):
        trainer(StaticMask("2:4")).fit(task)
    assert torch.equal(task.critic[0].weight, before)


def test_two_ranks_train_the_networks_that_one_process_trains(tmp_path: Path) -> None:
    processes.launch(processes.several_optimizers, tmp_path, 2)
    alone = processes.train_gan(1)
    for rank in range(2):
        record = torch.load(tmp_path / f"gan-rank{rank}.pt")
        assert record["clocks"] == alone["clocks"] == STEPS
        assert len(record["weights"]) == len(alone["weights"]) == EPOCHS * BATCHES
        for ours, theirs in zip(record["weights"], alone["weights"], strict=True):
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)
                assert torch.equal(a != 0, b != 0)
        assert record["flops"] == pytest.approx(alone["flops"], rel=1e-9)
