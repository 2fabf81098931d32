"""Averages of weights that Lightning's callbacks keep are N:M wherever anybody gets at them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch import callbacks
from torch import nn

from bame_lightning.checkpoints.audit import audit_checkpoint
from tests.callbacks.test_methods import METHODS, assert_sparse, every_method
from tests.training import Spy, Task, blocks_over, tiny_model, trainer

needs_ema = pytest.mark.skipif(not hasattr(callbacks, "EMAWeightAveraging"), reason="Lightning before 2.6")
AVERAGING = {
    "ema": pytest.param(lambda: callbacks.EMAWeightAveraging(decay=0.9), marks=needs_ema),
    "late ema": pytest.param(
        lambda: callbacks.EMAWeightAveraging(decay=0.9, update_starting_at_step=11, update_every_n_steps=3),
        marks=needs_ema,
    ),
    "swa": pytest.param(lambda: callbacks.StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=2)),
}
every_average = pytest.mark.parametrize("average", AVERAGING.values(), ids=AVERAGING.keys())
both_orders = pytest.mark.parametrize("average_first", [True, False])


class Validated(Task):
    """Looks at the weights that validation gets, which are the average of an EMA."""

    def on_fit_start(self) -> None:
        self.validated: list[torch.Tensor] = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        assert_sparse(self)
        self.validated.append(self.model[6].weight.detach().clone())

    def val_dataloader(self) -> Any:
        return self.train_dataloader()


def fit(name: str, average: Any, average_first: bool, task: Task, *others: L.Callback, **kwargs: Any) -> Any:
    method, averaging = METHODS[name](), average()
    pair = [averaging, method] if average_first else [method, averaging]
    trainer(*pair, *others, **({"max_epochs": 5, "val_check_interval": 3} | kwargs)).fit(task)
    return method


@every_method
@every_average
@both_orders
def test_validation_checkpoints_and_the_trained_model_get_a_sparse_average(
    name: str, average: Any, average_first: bool, tmp_path: Path
) -> None:
    files = callbacks.ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=4, filename="{step}")
    task = Validated()
    look = Spy(lambda *_: assert_sparse(task))
    method = fit(name, average, average_first, task, files, look, enable_checkpointing=True, num_sanity_val_steps=2)
    assert_sparse(task)
    assert (method.summary().get("flips", 0) > 0) == (name != "static")
    saved = sorted(tmp_path.glob("*.ckpt"))
    assert len(saved) == 10
    for path in saved:
        Task().load_state_dict(torch.load(path, weights_only=False)["state_dict"])
        report = audit_checkpoint(path)
        assert report.compliant
        assert report.layers


@pytest.mark.parametrize("average_first", [True, False])
@needs_ema
def test_the_average_is_that_of_weights_since_they_were_revived(average_first: bool) -> None:
    decay, averaging = 0.75, callbacks.EMAWeightAveraging(decay=0.75)
    method, task = METHODS["bame"](), Task()
    expected: list[torch.Tensor] = []
    kept: list[torch.Tensor] = []
    revived = 0

    class Average(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            nonlocal revived
            weight, mask = task.model[6].weight.detach().clone(), method.weights[2].kept.clone()
            if not expected:
                expected.append(weight)
            else:
                new = mask & ~kept[-1]
                revived += int(new.sum())
                # Those that come back have no past; the others a past of zeros at most where they were pruned since.
                past = torch.where(new, weight, expected[-1] * mask)
                expected.append(decay * past + (1 - decay) * weight)
            kept.append(mask)

    pair = [averaging, method] if average_first else [method, averaging]
    fitted = trainer(*pair, Average(), max_epochs=5)
    fitted.fit(task)
    assert revived > 10
    # Training ends with the average in the model.
    torch.testing.assert_close(task.model[6].weight.detach(), expected[-1])
    assert blocks_over(task.model[6].weight, 2, 4) == 0


@needs_ema
@both_orders
@pytest.mark.filterwarnings("ignore:The dirpath has changed from")
def test_resuming_with_an_average_changes_nothing(average_first: bool, tmp_path: Path) -> None:
    ends = []
    for cut in (False, True):
        tasks, path = (Task(), Task()), tmp_path / f"{cut}"
        options = {"average_first": average_first, "average": lambda: callbacks.EMAWeightAveraging(decay=0.9)}
        if not cut:
            method = fit("bame", task=tasks[0], **options)
            ends.append([*tasks[0].parameters(), *(sparse.kept for sparse in method.weights)])
            continue
        stop = Spy(lambda t, _: setattr(t, "should_stop", t.global_step == 16))
        save = callbacks.ModelCheckpoint(path, save_last=True)
        fit("bame", options["average"], average_first, tasks[0], stop, save, enable_checkpointing=True)
        method, averaging = METHODS["bame"](), options["average"]()
        pair = [averaging, method] if average_first else [method, averaging]
        again = callbacks.ModelCheckpoint(tmp_path / "again", save_last=True)
        trainer(*pair, again, max_epochs=5, enable_checkpointing=True).fit(tasks[1], ckpt_path=path / "last.ckpt")
        ends.append([*tasks[1].parameters(), *(sparse.kept for sparse in method.weights)])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@every_method
@both_orders
def test_a_network_with_batch_norm_is_averaged_and_measured_once_more(name: str, average_first: bool) -> None:
    # SWA runs another epoch for the statistics of batch norms. (Its last batch steps on a gradient from before: Lightning's.)
    model = tiny_model()
    model[3] = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU())
    task, swa = Task(model), callbacks.StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2)
    last: list[torch.Tensor] = []
    look = Spy(lambda t, _: last.append(model[6].weight.detach().clone()) if t.current_epoch == 3 else None)
    method = fit(name, lambda: swa, average_first, task, look, max_epochs=4)
    assert method.steps == task.trainer.global_step
    assert_sparse(task)
    average = swa._average_model.model[6].weight
    assert (task.model[6].weight - average).norm() < (task.model[6].weight - last[-1]).norm()


def test_straight_through_methods_follow_weights_that_somebody_changes_between_steps() -> None:
    def halve(trainer: L.Trainer, module: Any) -> None:
        if trainer.global_step == 5:
            module.model[6].weight.data.mul_(0.5)
            seen.append(module.model[6].weight.detach().clone())

    seen: list[torch.Tensor] = []
    task = Task(optimizer=lambda p: torch.optim.SGD(p, lr=1e-6))
    method = METHODS["sr_ste"](decay=0.0)
    trainer(method, Spy(halve), max_steps=6).fit(task)
    kept = seen[0] != 0
    torch.testing.assert_close(method.method.latents[2].value[kept], seen[0][kept], atol=1e-5, rtol=1e-4)
