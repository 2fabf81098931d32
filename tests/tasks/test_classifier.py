from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.types import LRSchedulerTypeUnion
from torch import nn
from torch.optim import SGD

from bame_lightning.tasks import Classifier, Digits
from bame_lightning.tasks.models import mlp
from bame_lightning.tasks.schedulers import cosine

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated"),
]


def trainer(tmp_path: Path, **options: object) -> L.Trainer:
    settings = {
        "default_root_dir": tmp_path,
        "accelerator": "cpu",
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(**(settings | options))


@pytest.fixture
def task() -> Classifier:
    torch.manual_seed(0)
    return Classifier(mlp((1, 8, 8), 10, hidden=(32,)), partial(SGD, lr=0.1), cosine)


def test_learns_and_logs_what_a_count_by_hand_gives(task: Classifier, tmp_path: Path) -> None:
    data = Digits()
    fitting = trainer(tmp_path)
    fitting.fit(task, data)
    logged = {**fitting.callback_metrics}
    fitting.test(task, data, verbose=False)
    logged |= fitting.callback_metrics
    assert set(logged) == {f"{stage}/{name}" for stage in ("train", "val", "test") for name in ("loss", "accuracy")}

    task.eval()
    with torch.no_grad():
        right, losses = [], []
        for images, labels in data.test_dataloader():
            logits = task.model(images)
            right += (logits.argmax(1) == labels).tolist()
            losses += (-logits.log_softmax(1)[range(len(labels)), labels]).tolist()
    assert logged["test/accuracy"].item() == pytest.approx(sum(right) / len(right))
    assert logged["test/loss"].item() == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert logged["test/accuracy"] > 0.5  # chance is 0.1


def test_shows_loss_and_accuracy_in_the_progress_bar(task: Classifier, tmp_path: Path) -> None:
    fitting = trainer(tmp_path, max_epochs=1)
    fitting.fit(task, Digits())
    assert {"train/loss", "train/accuracy", "val/loss", "val/accuracy"} <= set(fitting.progress_bar_metrics)


@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")
def test_trains_without_validation(task: Classifier, tmp_path: Path) -> None:
    fitting = trainer(tmp_path)
    fitting.fit(task, Digits(val_size=0))
    assert fitting.global_step == 2 * (1437 // 64)
    assert "val/loss" not in fitting.callback_metrics


def test_the_schedule_is_stepped_after_every_optimizer_step(task: Classifier, tmp_path: Path) -> None:
    fitting = trainer(tmp_path, accumulate_grad_batches=2)
    fitting.fit(task, Digits())
    schedulers: list[LRSchedulerTypeUnion] = [config.scheduler for config in fitting.lr_scheduler_configs]
    assert schedulers[0].get_last_lr() == pytest.approx([0.0])  # type: ignore[union-attr]
    assert schedulers[0].last_epoch == fitting.global_step == 2 * 10  # type: ignore[union-attr]


def test_an_endless_run_has_no_schedule(task: Classifier, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`scheduler` needs the length of the run"):
        trainer(tmp_path, max_epochs=-1).fit(task, Digits())


def test_without_a_scheduler_the_rate_stays(tmp_path: Path) -> None:
    task = Classifier(mlp((1, 8, 8), 10, hidden=()), partial(SGD, lr=0.1))
    fitting = trainer(tmp_path, max_epochs=1)
    fitting.fit(task, Digits())
    assert fitting.optimizers[0].param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("decay_vectors", [True, False])
def test_weight_decay_spares_vectors_on_request(decay_vectors: bool) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 3))
    task = Classifier(model, partial(SGD, lr=0.1, weight_decay=0.01), decay_vectors=decay_vectors)
    optimizer = task.configure_optimizers()
    assert isinstance(optimizer, SGD)
    decay = {id(weight): group["weight_decay"] for group in optimizer.param_groups for weight in group["params"]}
    assert {name: decay[id(weight)] for name, weight in model.named_parameters()} == {
        "0.weight": 0.01,
        "0.bias": 0.01 * decay_vectors,
        "1.weight": 0.01 * decay_vectors,
        "1.bias": 0.01 * decay_vectors,
        "3.weight": 0.01,
        "3.bias": 0.01 * decay_vectors,
    }


def test_label_smoothing_is_for_training_only() -> None:
    model = nn.Flatten()
    task = Classifier(model, partial(SGD, lr=0.1), label_smoothing=0.3)
    task.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    logits = torch.tensor([[2.0, 0.0, -1.0]]).reshape(1, 3, 1, 1)
    batch = logits, torch.tensor([0])
    log_probabilities = logits.flatten().log_softmax(0)
    smoothed = -(0.7 * log_probabilities[0] + 0.3 * log_probabilities.mean())
    torch.testing.assert_close(task.training_step(batch, 0), smoothed)


def test_checkpoints_hold_plain_types_and_load_into_the_bare_model(task: Classifier, tmp_path: Path) -> None:
    fitting = trainer(tmp_path, max_epochs=1)
    fitting.fit(task, Digits())
    fitting.save_checkpoint(tmp_path / "last.ckpt")
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    bare = mlp((1, 8, 8), 10, hidden=(32,))
    bare.load_state_dict({key.removeprefix("model."): value for key, value in checkpoint["state_dict"].items()})
    assert all(key.startswith("model.") for key in checkpoint["state_dict"])
