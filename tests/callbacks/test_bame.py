"""BAME in a Trainer, step by step against its specification."""

from __future__ import annotations

import copy
import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional

from bame_lightning import BAMECallback, Evidence, OneBatch, Schedule
from tests import reference
from tests.training import Spy, Task, blocks_over, trainer


@pytest.mark.parametrize(
    ("n", "m", "freeze_after", "one_per_row", "averaging", "piece"),
    [
        (1, 4, None, True, 0.75, 2**18),
        (1, 4, None, True, 0.75, 24),
        (2, 4, None, False, 0.75, 24),
        (2, 4, 1, False, 0.0, 2**18),
        (3, 8, 2, True, 0.5, 24),
    ],
)
def test_training_equals_the_specification_written_out_in_loops(
    n: int, m: int, freeze_after: int | None, one_per_row: bool, averaging: float, piece: int, monkeypatch
) -> None:
    monkeypatch.setattr("bame_lightning.blocks.masks.CHUNK", piece)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 5)
    ).double()
    twin = copy.deepcopy(model)
    settings = reference.Settings(
        n=n, m=m, start=3, stop=70, every=2, read_every=7, contenders=0.25, step_size=3.5, margin=0.1,
        averaging=averaging, one_per_row=one_per_row, freeze_after=freeze_after, lr=0.2, momentum=0.8, weight_decay=1e-3,
    )  # fmt: skip
    callback = BAMECallback(
        f"{n}:{m}",
        schedule=Schedule(start=3, stop=70, every=2),
        evidence=Evidence(7, 0.25, step_size=3.5, momentum=averaging, margin=0.1, one_per_row=one_per_row),
        freeze_after=freeze_after,
        rescale=False,
        verify=True,
    )
    task = Task(model, lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.8, weight_decay=1e-3))
    batches = [(images.double(), labels) for images, labels in task.train_dataloader()]
    trainer(callback, max_epochs=10, precision="64-true").fit(task)

    sparse = [twin[1].weight, twin[3].weight]
    dense = torch.optim.SGD(
        [p for p in twin.parameters() if not any(p is w for w in sparse)], lr=0.2, momentum=0.8, weight_decay=1e-3
    )

    def loss_of(step: int) -> torch.Tensor:
        if step:
            dense.step()
        dense.zero_grad()
        images, labels = batches[step % len(batches)]
        return functional.cross_entropy(twin(images), labels)

    layers, swaps = reference.train(sparse, loss_of, 80, settings)

    blocks = [block for layer in layers for block in layer.blocks]
    assert swaps > 50
    assert sum(block.oscillations for block in blocks) > 10
    assert any(block.oscillations > 1 for block in blocks)
    assert any(reference.frozen(block, settings) for block in blocks) == (freeze_after is not None)
    assert callback.summary()["flips"] == 2 * swaps
    for weight, layer, evolving in zip(sparse, layers, callback.evolving, strict=True):
        assert evolving.sparse.mask().tolist() == [block.kept for block in layer.blocks]
        assert evolving.oscillations.tolist() == [block.oscillations for block in layer.blocks]
        torch.testing.assert_close(evolving.sparse.weight.detach(), weight.detach())
        evidence = torch.tensor([block.evidence for block in layer.blocks], dtype=torch.float64)
        torch.testing.assert_close(evolving.evidence, evidence)
        if averaging:
            mean = torch.tensor([block.mean_gradient for block in layer.blocks], dtype=torch.float64)
            torch.testing.assert_close(evolving.mean_gradient, mean)
        assert (evolving.noise.item(), evolving.unit.item()) == pytest.approx((layer.noise, layer.unit))


def test_looking_at_the_evidence_changes_nothing() -> None:
    def train(hooks: list) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        task = Task(optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))
        trainer(callback, *hooks, max_epochs=4).fit(task)
        return task.state_dict()

    def look(trainer, module) -> None:
        looks.append([weight.evidence.clone() for weight in callback.evolving])

    looks: list = []
    callback = BAMECallback("1:4", evidence=Evidence(read_every=5, step_size=3.0), schedule=Schedule(every=2))
    unseen = train([])
    state = callback.state_dict()
    callback = BAMECallback("1:4", evidence=Evidence(read_every=5, step_size=3.0), schedule=Schedule(every=2))
    seen = train([Spy(look)])
    assert callback.summary()["flips"] > 0
    assert all(torch.equal(seen[name], unseen[name]) for name in seen)
    saved = [layer["evidence"] for layer in state["layers"].values()]
    again = [layer["evidence"] for layer in callback.state_dict()["layers"].values()]
    assert all(map(torch.equal, saved, again))
    # Evidence moves in every step of the window, that of contenders at least.
    assert all(not torch.equal(before[0], after[0]) for before, after in pairwise(looks[:20]))


def test_default_arguments_are_the_contract() -> None:
    callback = BAMECallback("1:16")
    assert (callback.schedule, callback.freeze_after, callback.init) == (Schedule(0.0, 0.9, 2), None, "magnitude")
    assert callback.evidence == Evidence(
        read_every=20, contenders=0.05, step_size=1.5, momentum=0.97, init="weights", margin=0.2
    )
    assert (callback.rescale, callback.verify, callback.rules) == (True, False, {})


@pytest.mark.parametrize("evidence", [Evidence(read_every=3), Evidence(read_every=3, init="zero"), OneBatch(share=1.0)])
@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
        lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1, amsgrad=True),
        lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
    ],
)
def test_masks_move_and_every_step_stays_sparse(evidence: Evidence | OneBatch, optimizer) -> None:
    callback = BAMECallback("2:4", schedule=Schedule(every=2), evidence=evidence, verify=True)
    task = Task(optimizer=optimizer)
    masks = []

    def look(trainer, module) -> None:
        state = trainer.optimizers[0].state
        for index in (2, 4, 6):
            weight = module.model[index].weight
            tensors = [weight, *(v for v in state[weight].values() if v.shape == weight.shape)]
            assert len(tensors) > 1
            assert [blocks_over(tensor, 2, 4) for tensor in tensors] == [0] * len(tensors)
        masks.append(module.model[6].weight != 0)

    trainer(callback, Spy(look), max_epochs=3).fit(task)
    assert callback.summary()["flips"] > 0
    assert not torch.equal(masks[0], masks[-1])


def test_revived_weights_start_without_optimizer_state() -> None:
    before: list = []

    class Watch(BAMECallback):
        def on_train_batch_start(self, *args) -> None:
            super().on_train_batch_start(*args)
            before[:] = [sparse.pruned.clone() for sparse in self.weights]

        def on_train_batch_end(self, trainer, *args) -> None:
            super().on_train_batch_end(trainer, *args)
            for old, sparse in zip(before, self.weights, strict=True):
                where, state = old & ~sparse.pruned, trainer.optimizers[0].state[sparse.weight]
                seen.append(int(where.sum()))
                assert state["exp_avg"][where].count_nonzero() == 0
                assert state["exp_avg_sq"][where].count_nonzero() == 0
                assert not where.any() or state["exp_avg"].any()

    seen: list[int] = []
    callback = Watch("2:4", schedule=Schedule(every=2), evidence=Evidence(read_every=2))
    trainer(callback).fit(Task(optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2)))
    assert sum(seen) > 0


def test_evidence_follows_a_weight_that_is_rescaled() -> None:
    task = Task(optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    before = task.model[6].weight.detach().clone()
    # Evidence starts at pruned weights, and nothing is read before step 1000.
    callback = BAMECallback("1:4", schedule=Schedule(1000, 1100))
    trainer(callback, max_epochs=1).fit(task)
    kept = ~callback.weights[2].pruned
    assert kept.sum() == 16 * 128 / 4
    torch.testing.assert_close(task.model[6].weight.detach(), 2 * before * kept)
    torch.testing.assert_close(callback.evolving[2].evidence, (2 * before * ~kept).view(-1, 4))


def test_accumulated_batches_count_as_one_step_and_are_read_whole() -> None:
    whole = BAMECallback("2:4", schedule=Schedule(every=2), evidence=Evidence(read_every=2))
    parts = BAMECallback("2:4", schedule=Schedule(every=2), evidence=Evidence(read_every=2))
    one, four = Task(tiny_double(), batch=32), Task(tiny_double(), batch=8)
    trainer(whole, max_epochs=6, precision="64-true").fit(one)
    trainer(parts, max_epochs=6, precision="64-true", accumulate_grad_batches=4).fit(four)
    assert parts.steps == whole.steps == 12
    assert parts.summary()["flips"] == whole.summary()["flips"] > 0
    for a, b in zip(one.parameters(), four.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def tiny_double() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 5)).double()


def test_a_poisoned_reading_is_discarded_whole_and_counted() -> None:
    class Poison(BAMECallback):
        def on_before_optimizer_step(self, *args) -> None:
            if self.steps == 3:
                self.before = [(w.evidence.clone(), w.noise.clone()) for w in self.evolving]
                # Only a pruned position of one layer: what the optimizer sees stays finite.
                grad = self.weights[0].weight.grad
                grad[tuple(self.weights[0].pruned.nonzero()[0])] = math.nan
            super().on_before_optimizer_step(*args)

        def on_train_batch_end(self, *args) -> None:
            super().on_train_batch_end(*args)
            if self.steps == 4:
                for (evidence, noise), weight in zip(self.before, self.evolving, strict=True):
                    assert torch.equal(evidence, weight.evidence)
                    assert torch.equal(noise, weight.noise)
                    assert noise > 0
                    assert evidence.count_nonzero()

    callback = Poison("2:4", schedule=Schedule(every=7), evidence=Evidence(read_every=1))
    trainer(callback, max_epochs=1).fit(Task())
    assert callback.summary()["discarded_readings"] == 1
    assert all(weight.evidence.isfinite().all() for weight in callback.evolving)


def test_without_an_adaptation_it_warns() -> None:
    with pytest.warns(UserWarning, match=r"never adapt a mask.*`schedule.every` = 100"):
        trainer(BAMECallback("2:4", schedule=Schedule(every=100)), max_epochs=1).fit(Task())


def test_masks_stay_fixed_outside_the_window() -> None:
    masks = []
    callback = BAMECallback("2:4", schedule=Schedule(start=4, stop=12, every=2), evidence=Evidence(read_every=2))
    spy = Spy(lambda *_: masks.append(callback.weights[2].pruned.clone()))
    trainer(callback, spy).fit(Task())
    same = [torch.equal(a, b) for a, b in pairwise(masks)]
    # Steps count from 0: adaptations follow steps 5, 7, 9 and 11.
    assert all(same[:4])
    assert not all(same[4:11])
    assert all(same[11:])
    assert callback.adaptations == 4
