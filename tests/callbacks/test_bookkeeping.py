"""The ledger of a real run against a count by hand."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from bame_lightning import SRSTE, BAMECallback, Dense, Evidence, RigL, Schedule, StaticMask
from tests.training import Spy, Task, trainer

# Batch 8 through 48 -> 32 (2:4) -> 16 (2:4) -> 5 (dense): MACs of one forward pass.
FIRST, SECOND, LAST = 8 * 48 * 32, 8 * 32 * 16, 8 * 16 * 5
SPARSE, DENSE = FIRST + SECOND, FIRST + SECOND + LAST


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 5)]
    return nn.Sequential(nn.Flatten(), *layers)


def fit(callback: Any, *others: Any, **kwargs: Any) -> dict[str, float]:
    # The images need no gradient, so the first layer's input gradient is never computed; the convention books it all the same.
    trainer(callback, *others, **({"max_epochs": 1} | kwargs)).fit(Task(network()))
    return callback.summary()["flops"]


def test_a_static_mask_halves_all_but_the_classifier() -> None:
    flops = fit(StaticMask("2:4"))
    expected = 3 * (SPARSE / 2 + LAST)
    assert flops["flops/train_total"] == 2 * 8 * expected
    assert flops["flops/train_vs_dense"] == pytest.approx(expected / (3 * DENSE))
    sr_ste = SPARSE / 2 + LAST + 2 * DENSE
    assert flops["flops/train_vs_sr_ste"] == pytest.approx(expected / sr_ste)
    hardware = 2 * (SPARSE / 2) + SPARSE + 3 * LAST
    assert flops["flops/hardware/train_total"] == 2 * 8 * hardware


def test_sr_ste_is_its_own_reference() -> None:
    flops = fit(SRSTE("2:4"))
    assert flops["flops/train_vs_sr_ste"] == 1
    assert flops["flops/train_total"] == 2 * 8 * (SPARSE / 2 + LAST + 2 * DENSE)


def test_rigl_reads_all_dense_gradients_when_it_swaps() -> None:
    flops = fit(RigL("2:4", schedule=Schedule(0, 8, 4)))
    assert flops["flops/train_total"] == 2 * (8 * 3 * (SPARSE / 2 + LAST) + 2 * SPARSE / 2)


def test_bame_reads_contenders_and_skips_frozen_blocks() -> None:
    callback = BAMECallback(
        "2:4", schedule=Schedule(0, 40, 2), evidence=Evidence(read_every=4, contenders=0.25), freeze_after=0
    )
    expected = 0.0
    frozen = {"model.1.weight": 0, "model.3.weight": 0}
    contenders: dict[str, int] = {}
    blocks = {"model.1.weight": 384, "model.3.weight": 128}
    macs = {"model.1.weight": FIRST, "model.3.weight": SECOND}
    inputs = {"model.1.weight": 48, "model.3.weight": 32}

    def look(trainer: Any, module: Any) -> None:
        nonlocal expected
        step = callback.steps - 1
        expected += 3 * (SPARSE / 2 + LAST)
        for name in macs if step < 40 else ():
            # Two positions of each block are pruned.
            read = 2 * (blocks[name] - frozen[name]) if step % 4 == 0 else contenders[name]
            expected += macs[name] / 2 * read / (2 * blocks[name])
        for weight in callback.evolving:
            name, oscillations = weight.sparse.name, weight.oscillations.tolist()
            frozen[name] = sum(count > 0 for count in oscillations)
            saved = callback.state_dict()["layers"][name]["contenders"]
            places = [row * inputs[name] + place for row, own in enumerate(saved.tolist()) for place in own]
            contenders[name] = sum(not oscillations[place // 4] for place in places)

    flops = fit(callback, Spy(look), max_epochs=6)
    assert sum(frozen.values()) > 0
    assert flops["flops/train_total"] == pytest.approx(2 * expected, rel=1e-9)
    assert 0.5 < flops["flops/train_vs_dense"] < 1


def test_accumulated_batches_and_skipped_ones_are_all_booked() -> None:
    assert fit(StaticMask("2:4"), accumulate_grad_batches=4) == fit(StaticMask("2:4"))


def test_a_batch_that_the_module_leaves_out_costs_nothing() -> None:
    class Skips(Task):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if self.current_epoch == 0 else None  # which ends the epoch

    callback = StaticMask("2:4")
    trainer(callback, max_epochs=2).fit(Skips(network()))
    assert callback.summary()["flops"]["flops/train_total"] == 2 * 8 * 3 * (SPARSE / 2 + LAST)


@pytest.mark.parametrize("make", [SRSTE, StaticMask, Dense])
def test_a_second_fit_with_an_unfrozen_layer_is_counted_anew(make: Any) -> None:
    task = Task(network(), lambda parameters: torch.optim.SGD([p for p in parameters if p.requires_grad], lr=0.1))
    task.model[1].requires_grad_(False)
    callback = make("2:4")
    run = trainer(callback, max_epochs=1)
    run.fit(task)
    task.model[1].requires_grad_(True)
    run.fit_loop.max_epochs = 2
    run.fit(task)
    # Frozen, the first layer costs a forward pass, and an input gradient that nobody needs is not asked for.
    first = {"sr_ste": FIRST + SECOND / 2 + 2 * SECOND + 3 * LAST, "dense": FIRST + 3 * (SECOND + LAST)}
    second = {"sr_ste": SPARSE / 2 + LAST + 2 * DENSE, "dense": 3 * DENSE}
    first["static"], second["static"] = FIRST + 3 * (SECOND / 2 + LAST), 3 * (SPARSE / 2 + LAST)
    costs = {kind: 8 * (first[kind] + second[kind]) for kind in first}
    own = costs[{SRSTE: "sr_ste", StaticMask: "static", Dense: "dense"}[make]]
    flops = callback.summary()["flops"]
    assert flops["flops/train_total"] == 2 * own
    assert flops["flops/train_vs_dense"] == own / costs["dense"]
    assert flops["flops/train_vs_sr_ste"] == own / costs["sr_ste"]


def test_a_counter_of_the_user_counts_what_it_counts_without_us() -> None:
    class Counted(Task):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            with FlopCounterMode(display=False) as counter:
                loss = super().training_step(batch, batch_idx)
            counts.append(counter.get_total_flops())
            return loss

    seen = []
    for callbacks in ((), (BAMECallback("2:4"),)):
        counts: list[int] = []
        trainer(*callbacks, max_epochs=1).fit(Counted(network()))
        seen.append(counts)
    assert seen[0] == seen[1] == [2 * DENSE] * 8


def test_a_copy_under_no_grad_costs_a_forward_pass_only() -> None:
    class Teacher(Task):
        def __init__(self) -> None:
            super().__init__(network())
            self.teacher = network()

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            with torch.no_grad():
                self.teacher(batch[0])
            return super().training_step(batch, batch_idx)

    flops = {}
    for callback in (SRSTE("2:4"), Dense("2:4"), StaticMask("2:4")):
        trainer(callback, max_epochs=1).fit(Teacher())
        flops[type(callback)] = callback.summary()["flops"]
    assert flops[SRSTE]["flops/train_vs_sr_ste"] == 1
    assert flops[Dense]["flops/train_total"] == 2 * 8 * 4 * DENSE
    assert flops[StaticMask]["flops/train_total"] == 2 * 8 * (DENSE + 3 * (SPARSE / 2 + LAST))
    assert flops[Dense]["flops/train_vs_sr_ste"] == 4 * DENSE / (DENSE + SPARSE / 2 + LAST + 2 * DENSE)


class Foreign(L.Callback):
    """A user's own counter, entered and left in hooks."""

    def on_train_batch_start(self, *_: Any) -> None:
        self.counter = FlopCounterMode(display=False)
        self.counter.__enter__()

    def on_train_batch_end(self, *_: Any) -> None:
        self.counter.__exit__(None, None, None)
        self.totals = [*getattr(self, "totals", []), self.counter.get_total_flops()]


class Manual(Task):
    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for _ in range(2):
            self.optimizers().zero_grad()
            self.manual_backward(functional.cross_entropy(self.model(batch[0]), batch[1]))
            self.optimizers().step()


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("task", [Task, Manual])
def test_a_counter_that_a_user_enters_in_hooks_counts_what_it_counts_without_us(first: bool, task: type[Task]) -> None:
    foreign, callback = Foreign(), StaticMask("2:4")
    trainer(*[foreign, callback][:: 1 if first else -1], max_epochs=1).fit(task(network()))
    # The images need no gradient.
    once = 2 * (3 * DENSE - FIRST)
    assert foreign.totals == [once * (2 if task is Manual else 1)] * 8
    assert callback.summary()["flops"]["flops/train_vs_dense"] == pytest.approx((SPARSE / 2 + LAST) / DENSE)


def test_a_counter_within_the_step_counts_and_only_what_comes_before_the_backward_pass_is_booked() -> None:
    class Counts(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            with FlopCounterMode(display=False) as counter:
                super().training_step(batch, batch_idx)
            assert counter.get_total_flops() == 2 * 2 * (3 * DENSE - FIRST)

    callback = StaticMask("2:4")
    trainer(callback, max_epochs=1, limit_train_batches=1).fit(Counts(network()))
    assert callback.books.ledger.state_dict()["dense"] == 3 * DENSE  # a batch is booked once


def test_no_mode_and_no_patch_is_left_when_a_first_step_fails() -> None:
    class Fails(Task):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            raise RuntimeError("a bug")

    run = trainer(StaticMask("2:4"))
    with pytest.raises(RuntimeError, match="a bug"):
        run.fit(Fails(network()))
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
    assert "training_step" not in vars(run.strategy)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_optimizer_step_is_counted_and_leaves_torch_usable() -> None:
    def compiled(parameters: Any) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        optimizer.step = torch.compile(optimizer.step, backend="eager")
        return optimizer

    callback = StaticMask("2:4")
    trainer(callback, max_epochs=1, limit_train_batches=2).fit(Task(network(), compiled))
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
    assert torch.zeros(2).tolist() == [0, 0]
    assert callback.summary()["flops"]["flops/train_total"] == 2 * 2 * 3 * (SPARSE / 2 + LAST)


def test_somebody_elses_training_step_of_the_strategy_stays() -> None:
    calls: list[int] = []

    class Patches(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            step = trainer.strategy.training_step
            self.patch = trainer.strategy.training_step = lambda *args: (calls.append(1), step(*args))[1]

    patches, callback = Patches(), StaticMask("2:4")
    run = trainer(patches, callback, max_epochs=1)
    run.fit(Task(network()))
    assert run.strategy.training_step is patches.patch
    assert len(calls) == 8
    assert callback.summary()["flops"]["flops/train_total"] == 2 * 8 * 3 * (SPARSE / 2 + LAST)
