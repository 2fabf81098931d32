"""Pictures for loggers that take them, and nothing for the others."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from bame_lightning import SRSTE, BAMECallback, Schedule
from bame_lightning.callbacks.images import MaskImages, draw
from bame_lightning.callbacks.watcher import evolving_layers, maps_of
from tests.training import Task, trainer


def test_training_goes_on_where_wandb_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    callback = BAMECallback("2:4", schedule=Schedule(every=2))
    trainer(callback, MaskImages(), logger=CSVLogger(tmp_path, "", ""), log_every_n_steps=1).fit(Task())
    assert "bame/survival" in (tmp_path / "metrics.csv").read_text().splitlines()[0]


def test_what_is_drawn_depends_on_what_a_method_knows() -> None:
    for method, names in (
        (BAMECallback("2:4", schedule=Schedule(every=2)), ["mask", "oscillations"]),
        (
            BAMECallback("2:4", schedule=Schedule(every=2), freeze_after=9),
            ["mask", "oscillations"],
        ),  # nothing is frozen
        (SRSTE("2:4"), ["mask"]),
    ):
        trainer(method, max_epochs=1).fit(Task())
        evolving = evolving_layers(method)
        for sparse in method.weights:
            maps = maps_of(sparse, evolving.get(sparse.name))
            assert list(draw(sparse, maps)) == names
            if maps.frozen is not None:
                some = replace(maps, frozen=torch.ones_like(maps.frozen))
                assert list(draw(sparse, some)) == [*names, "frozen"]


def test_training_is_the_same_with_and_without_pictures() -> None:
    tasks = Task(), Task()
    trainer(BAMECallback("2:4", schedule=Schedule(every=2))).fit(tasks[0])
    trainer(BAMECallback("2:4", schedule=Schedule(every=2)), MaskImages()).fit(tasks[1])
    for a, b in zip(tasks[0].parameters(), tasks[1].parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_progress_bar_shows_flips_and_cost() -> None:
    fit = trainer(BAMECallback("2:4", schedule=Schedule(every=2)), log_every_n_steps=1)
    fit.fit(Task())
    assert {"bame/flip_rate", "flops/train_vs_dense"} <= fit.progress_bar_metrics.keys()
    assert not any("layer" in name for name in fit.progress_bar_metrics)
