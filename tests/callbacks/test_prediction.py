"""Predicted and realised loss reduction, against what the test itself evaluates."""

from __future__ import annotations

import copy
import pickle
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn
from torch.nn import functional

from bame_lightning import BAMECallback, Evidence, PredictionCheck, Schedule, StaticMask
from tests.training import Task, tiny_model, trainer


class Noisy(Task):
    """With dropout and a batch norm, which forward passes draw numbers for and write into."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        model = tiny_model()
        model.insert(7, nn.Dropout(0.3))
        model.insert(7, nn.BatchNorm1d(16))
        super().__init__(model)


def loss(module: Any, batch: Any) -> torch.Tensor:
    return functional.cross_entropy(module.model(batch[0]).double(), batch[1])


def bame() -> BAMECallback:
    return BAMECallback(
        "2:4", schedule=Schedule(every=2), evidence=Evidence(read_every=2, contenders=0.5, step_size=4.0)
    )


def test_realised_is_the_loss_before_less_the_loss_after_the_swaps() -> None:
    method, check = bame(), PredictionCheck(loss, every=2)
    networks, predicted, batches = list[Any](), list[float](), list[Any]()

    class Look(L.Callback):
        def on_train_start(self, fit: Any, module: Any) -> None:
            @contextmanager
            def around() -> Any:
                before = copy.deepcopy(module.model)
                yield
                if method.adaptations % 2 == 0:
                    networks.append((before, copy.deepcopy(module.model)))
                    predicted.append(sum(float(weight.predicted) for weight in method.evolving))
                    batches.append(batches_of_step[:])

            method.training.run.observers.append(around)

        def on_train_batch_start(self, fit: Any, module: Any, batch: Any, index: int) -> None:
            if index % 2 == 0:
                batches_of_step.clear()
            batches_of_step.append(batch)

    batches_of_step: list[Any] = []
    fit = trainer(method, check, Look(), accumulate_grad_batches=2, max_epochs=5, log_every_n_steps=1)
    fit.fit(Task())
    # 20 steps, 18 of them in the window: 9 adaptations, of which the first, third, ... are checked, if masks changed.
    assert len(networks) == 5
    seen = [
        both
        for both in zip(networks, predicted, batches, strict=True)
        if any((a != b).any() for a, b in zip(*(network.parameters() for network in both[0]), strict=True))
    ]
    assert len(seen) == 4
    assert check.predicted == pytest.approx([prediction for _, prediction, _ in seen])
    for ((before, after), _, step), realised in zip(seen, check.realised, strict=True):
        with torch.no_grad():
            means = [
                sum(functional.cross_entropy(model(x).double(), y) for x, y in step) / len(step)
                for model in (before, after)
            ]
        assert realised == pytest.approx(float(means[0] - means[1]), rel=1e-6, abs=1e-12)
    assert max(map(abs, check.realised)) > 1e-5
    assert float(fit.callback_metrics["bame/realised_loss_reduction"]) == pytest.approx(check.realised[-1])
    expected = spearmanr(check.predicted, check.realised).statistic
    assert float(fit.callback_metrics["bame/prediction_rank_correlation"]) == pytest.approx(expected, abs=1e-5)


def test_training_is_the_same_with_and_without() -> None:
    tasks = Noisy(), Noisy()
    for task, checks in zip(tasks, ([], [PredictionCheck(loss, every=1)]), strict=True):
        torch.manual_seed(0)
        trainer(bame(), *checks).fit(task)
    for (name, a), b in zip(tasks[0].state_dict().items(), tasks[1].state_dict().values(), strict=True):
        assert a.equal(b), name


def test_what_was_checked_before_is_part_of_a_resumed_run(tmp_path: Path) -> None:
    def run(epochs: int, **kwargs: Any) -> PredictionCheck:
        check = PredictionCheck(loss, every=1)
        method = BAMECallback("2:4", schedule=Schedule(0, 20, every=2), evidence=Evidence(read_every=2))
        fit = trainer(check, method, max_epochs=epochs)
        fit.fit(Task(), **kwargs)
        fit.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return check

    half, whole = run(1), run(3)
    resumed = run(3, ckpt_path=tmp_path / "1.ckpt")
    assert 0 < len(half.realised) < len(whole.realised)
    assert (resumed.predicted, resumed.realised) == (whole.predicted, whole.realised)


def test_only_recent_adaptations_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bame_lightning.callbacks.prediction.RECENT", 3)
    check = PredictionCheck(loss, every=1)
    trainer(bame(), check).fit(Task())
    assert len(check.predicted) == len(check.realised) == 3


def test_other_methods_predict_nothing() -> None:
    check = PredictionCheck(loss)
    fit = trainer(StaticMask("2:4"), check, log_every_n_steps=1)
    fit.fit(Task())
    assert not check.realised
    assert "bame/realised_loss_reduction" not in fit.callback_metrics


def test_a_wrong_number_is_named() -> None:
    with pytest.raises(ValueError, match=r"`every` must be .* at least 1; got 0"):
        PredictionCheck(loss, every=0)


def test_pairs_of_another_run_are_dropped_and_those_of_the_same_trainer_kept() -> None:
    check = PredictionCheck(loss, every=1)
    trainer(bame(), check, max_epochs=2).fit(Noisy())
    assert len(check.realised) > 3
    again = trainer(bame(), check, max_epochs=1)
    again.fit(Noisy())
    first = check.realised
    assert 0 < len(first) <= 4  # every other of 8 steps adapts
    again.fit_loop.max_epochs = 2
    again.fit(again.lightning_module)
    assert check.realised[: len(first)] == first
    assert len(check.realised) > len(first)


class Fails(Noisy):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.trainer.global_step == 5:
            raise RuntimeError("a bug")
        return super().training_step(batch, batch_idx)


def test_an_exception_leaves_callbacks_that_can_be_pickled() -> None:
    method, check = bame(), PredictionCheck(loss, every=100)
    task = Fails()
    task.make_optimizer = torch.optim.SGD
    with pytest.raises(RuntimeError, match="a bug"):
        trainer(method, check).fit(task)
    again, _ = pickle.loads(pickle.dumps((method, check)))
    assert again.steps == 5
