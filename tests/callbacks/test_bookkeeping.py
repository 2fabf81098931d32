"""The ledger of a real run against a count by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
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


def test_bame_reads_designated_blocks_and_skips_frozen_ones() -> None:
    callback = BAMECallback(
        "2:4", schedule=Schedule(0, 40, 2), evidence=Evidence(read_every=4, share=0.25), freeze_after=0
    )
    expected = 0.0
    frozen = {"model.1.weight": 0, "model.3.weight": 0}
    designated: dict[str, int] = {}
    blocks = {"model.1.weight": 384, "model.3.weight": 128}
    macs = {"model.1.weight": FIRST, "model.3.weight": SECOND}

    def look(trainer: Any, module: Any) -> None:
        nonlocal expected
        step = callback.steps - 1
        expected += 3 * (SPARSE / 2 + LAST)
        for name in macs if step < 40 else ():
            read = blocks[name] - frozen[name] if step % 4 == 0 else designated[name]
            expected += macs[name] / 2 * read / blocks[name]
        for weight in callback.evolving:
            frozen[weight.sparse.name] = int((weight.history.oscillations > 0).sum())
            designated[weight.sparse.name] = len(weight.designated)

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
