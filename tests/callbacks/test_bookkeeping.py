"""The ledger of a real run against a count by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from bame_lightning import SRSTE, BAMECallback, Evidence, RigL, Schedule, StaticMask
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
