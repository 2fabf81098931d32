"""Sparse products under training: the same numbers, chosen once, booked as executed, and gone afterwards."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from bame_lightning import BAMECallback, Evidence, OneBatch, OneShotMagnitude, RigL, Schedule, StaticMask
from bame_lightning.compute.binding import BoundForward
from bame_lightning.compute.choice import Choice
from bame_lightning.methods.masked import Masked
from bame_lightning.methods.training import SparseTraining
from tests.callbacks.gan import Gan
from tests.callbacks.registry import kernels_always
from tests.training import Spy, Task, tiny_model, trainer

LAYERS = ["model.2", "model.4", "model.6"]
"""The sparse modules of `tiny_model`."""
METHODS: dict[str, Any] = {
    "bame": lambda **kw: BAMECallback(
        "2:4", schedule=Schedule(every=3), evidence=Evidence(read_every=4, contenders=0.5, step_size=4.0), **kw
    ),
    "freezing": lambda **kw: BAMECallback(
        "1:4", schedule=Schedule(every=2), evidence=Evidence(read_every=5, step_size=6.0), freeze_after=0, **kw
    ),
    "one batch": lambda **kw: BAMECallback("2:4", schedule=Schedule(every=3), evidence=OneBatch(), **kw),
    "rigl": lambda **kw: RigL("2:4", schedule=Schedule(every=3), **kw),
    "static": lambda **kw: StaticMask("2:4", **kw),
}


def bound(module: nn.Module) -> list[str]:
    """Names of the modules whose forward pass is replaced."""
    return [name for name, m in module.named_modules() if isinstance(vars(m).get("forward"), BoundForward)]


class Recomputed(Task):
    """Recomputes its activations in the backward pass."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        output = checkpoint(self.model, batch[0], use_reentrant=False)
        return nn.functional.cross_entropy(output, batch[1])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("how", ["plain", "accumulated", "recomputed", "channels last"])
def test_training_is_what_it_was(method: str, how: str) -> None:
    ends = []
    for compute in ("dense", "sparse"):
        callback = METHODS[method](compute=compute, verify=True)
        task = Recomputed() if how == "recomputed" else Task()
        if how == "channels last":
            task.model.to(memory_format=torch.channels_last)
        seen = []
        look = Spy(lambda _, module, seen=seen: seen.append(bound(module)))
        trainer(callback, look, max_epochs=3, accumulate_grad_batches=1 + (how == "accumulated")).fit(task)
        assert seen[0] == seen[-1] == (LAYERS if compute == "sparse" else [])
        assert not bound(task)
        ends.append((callback, dict(task.state_dict())))
    (dense, wanted), (sparse, found) = ends
    for a, b in zip(dense.weights, sparse.weights, strict=True):
        assert torch.equal(a.kept, b.kept)
    assert dense.summary().get("flips") == sparse.summary().get("flips")
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


def test_what_is_executed_is_booked() -> None:
    # Multiply-accumulates of one image by hand: 64 positions of 8 channels and so on; 4x4 images.
    stem, grouped, point, first, last = 16 * 8 * 3 * 9, 16 * 8 * 4 * 9, 16 * 8 * 8, 128 * 16, 16 * 5
    callback = StaticMask("2:4", compute="sparse")
    trainer(callback, max_epochs=1).fit(Task())
    dense, half = 3 * (stem + last), 3 * (grouped + point + first)
    flops = callback.summary()["flops"]
    assert flops["flops/executed/train_total"] == 2 * 64 * (dense + half / 2)
    assert flops["flops/executed/train_vs_dense"] == pytest.approx((dense + half / 2) / (dense + half))
    assert flops["flops/executed/train_total"] == flops["flops/train_total"]
    densely = StaticMask("2:4")
    trainer(densely, max_epochs=1).fit(Task())
    assert densely.summary()["flops"]["flops/executed/train_total"] == 2 * 64 * (dense + half)
    assert densely.summary()["flops"]["flops/train_total"] == flops["flops/train_total"]


def test_steps_that_read_everything_execute_the_whole_weight_gradient() -> None:
    callback = RigL(
        "1:4", schedule=Schedule(every=4), compute="sparse", layers={"model.2": "dense", "model.4": "dense"}
    )
    trainer(callback, max_epochs=1).fit(Task(batch=8))
    others, first = 16 * (8 * 3 * 9 + 8 * 4 * 9 + 8 * 8) + 16 * 5, 128 * 16
    steps = [3 * others + first * (0.25 + 0.25 + (1.0 if step in (3,) else 0.25)) for step in range(8)]
    read = [step for step in range(8) if callback.window.adapts(step)]
    assert read == [3]
    assert callback.summary()["flops"]["flops/executed/train_total"] == pytest.approx(2 * 8 * sum(steps))


class TestAuto:
    def test_measures_after_the_first_step_once_for_layers_called_alike(self) -> None:
        model = nn.Sequential(nn.Flatten(), *[nn.Linear(48, 48) for _ in range(3)], nn.Linear(48, 32), nn.Linear(32, 5))
        callback, calls, seen = BAMECallback("1:4", compute="auto"), [], []

        def choose(operation: Any, weight: Tensor, mask: Tensor, pattern: Any, call: Any) -> Choice:
            calls.append((tuple(weight.shape), call.shape, call.input_gradient, call.contenders))
            return kernels_always() if weight.shape[0] == 48 else Choice(reason="too small")

        callback.training.execution.choose = choose
        trainer(callback, Spy(lambda _, module: seen.append(bound(module))), max_epochs=1).fit(Task(model))
        # The first layer's input needs no gradient. Contenders: 5 % of 36 pruned weights a row, rounded up.
        assert calls == [
            ((48, 48), (8, 48), False, 96),
            ((48, 48), (8, 48), True, 96),
            ((32, 48), (8, 48), True, 64),
        ]
        assert seen[0] == seen[-1] == ["model.1", "model.2", "model.3"]
        told = callback.summary()["compute"]
        assert told["model.1"] == "kernels: of a test"
        assert told["model.4"] == "dense: too small"
        # The first of eight steps was dense; afterwards forward, both gradients but for what contenders add.
        flops = callback.summary()["flops"]
        dense, chosen = 48 * 32 + 32 * 5, 3 * 48 * 48
        reads = [1.0, *[96 / (48 * 36)] * 6, 0.0]  # the window ends before the last step
        steps = [3 * dense + chosen * (0.25 + 0.25 + 0.25 + 0.75 * read) for read in reads[1:]]
        assert flops["flops/executed/train_total"] == pytest.approx(2 * 8 * (3 * (dense + chosen) + sum(steps)))

    def test_the_choice_is_in_the_table_and_the_log(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level("INFO")
        callback = StaticMask("2:4", compute="auto")
        callback.training.execution.choose = kernels_always
        trainer(callback, max_epochs=1).fit(Task())
        (line,) = [record.message for record in caplog.records if "computes with" in record.message]
        assert "kernels: of a test" in line
        assert "model.2, model.4, model.6" in line

    @pytest.mark.parametrize("compute", ["auto", "sparse"])
    @pytest.mark.parametrize("method", ["bame", "rigl"])
    def test_resuming_repeats_the_bits_and_measures_nothing(self, method: str, compute: str, tmp_path: Path) -> None:
        def save(fit: L.Trainer, _: Any) -> None:
            if fit.global_step == 16:
                fit.save_checkpoint(tmp_path / "half.ckpt")

        def never(*args: Any) -> Choice:
            raise AssertionError("was chosen already")

        whole, task = METHODS[method](compute=compute), Task()
        whole.training.execution.choose = kernels_always
        trainer(whole, Spy(save), max_epochs=4).fit(task)
        again, resumed = METHODS[method](compute=compute), Task()
        again.training.execution.choose = never
        trainer(again, max_epochs=4).fit(resumed, ckpt_path=tmp_path / "half.ckpt")
        for (name, value), other in zip(task.state_dict().items(), resumed.state_dict().values(), strict=True):
            assert torch.equal(value, other), name
        assert again.summary()["flops"] == whole.summary()["flops"]
        assert again.summary()["compute"] == whole.summary()["compute"]

    def test_a_layer_that_joins_late_is_chosen_when_it_is_called(self) -> None:
        class Late(Task):
            def on_train_epoch_start(self) -> None:
                self.model[4].requires_grad_(self.current_epoch > 0)

        callback, seen = StaticMask("2:4", compute="auto"), []
        callback.training.execution.choose = kernels_always
        with pytest.warns(UserWarning, match="is trained from optimizer step 9 on"):
            trainer(callback, Spy(lambda _, module: seen.append(bound(module))), max_epochs=2).fit(Late())
        assert seen[0] == ["model.2", "model.6"]
        assert seen[-1] == LAYERS


class TestBound:
    def test_until_an_exception_at_the_latest(self) -> None:
        def fail(_: Any, module: L.LightningModule) -> None:
            assert bound(module) == LAYERS
            raise RuntimeError("a bug")

        task = Task()
        with pytest.raises(RuntimeError, match="a bug"):
            trainer(StaticMask("2:4", compute="sparse"), Spy(fail)).fit(task)
        assert not bound(task)

    def test_copies_in_the_middle_compute_densely(self) -> None:
        copies = []

        def look(_: Any, module: L.LightningModule) -> None:
            copies.extend([copy.deepcopy(module.model), pickle.loads(pickle.dumps(module.model))])

        task = Task()
        trainer(StaticMask("2:4", compute="sparse"), Spy(look), max_epochs=1).fit(task)
        assert not any(bound(copied) for copied in copies)
        x = torch.randn(2, 3, 4, 4)
        torch.testing.assert_close(copies[-1](x), task.model(x))

    @pytest.mark.parametrize("loaded", [False, True])
    def test_in_validation_test_and_prediction_of_its_own(self, loaded: bool, tmp_path: Path) -> None:
        class Judged(Task):
            seen: list[Any]

            def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
                self.seen.append((bound(self), self.model(batch[0])))
                return self.seen[-1][1].mean()

            test_step = predict_step = validation_step

            def val_dataloader(self) -> Any:
                return self.train_dataloader()

            test_dataloader = predict_dataloader = val_dataloader

        task = Judged()
        task.seen = []
        callback = METHODS["bame"](compute="sparse")
        fit = trainer(callback, max_epochs=1)
        fit.fit(task)
        fit.save_checkpoint(tmp_path / "end.ckpt")
        assert {tuple(names) for names, _ in task.seen[2:]} == {tuple(LAYERS)}
        if loaded:
            task, callback = Judged(), METHODS["bame"](compute="sparse")
            fit = trainer(callback)
        where = {"ckpt_path": tmp_path / "end.ckpt"} if loaded else {}
        for verb in (fit.validate, fit.test, fit.predict):
            task.seen = []
            verb(task, **where)
            assert {tuple(names) for names, _ in task.seen} == {tuple(LAYERS)}
            assert not bound(task)
            images = next(iter(task.train_dataloader()))[0]
            torch.testing.assert_close(task.seen[0][1], task.model(images), atol=1e-6, rtol=1e-5)


class TestRefused:
    @pytest.mark.parametrize("make", [BAMECallback, StaticMask, RigL], ids=lambda kind: kind.__name__)
    @pytest.mark.usefixtures("unchecked_types")
    def test_another_word(self, make: Any) -> None:
        with pytest.raises(ValueError, match="`compute` must be 'dense', 'auto' or 'sparse'; got 'fast'"):
            make("2:4", compute="fast")
        with pytest.raises(ValueError, match="`compute` must be"):
            OneShotMagnitude("2:4", "dense.ckpt", compute=True)

    def test_sparse_where_attention_multiplies_by_itself(self, caplog: pytest.LogCaptureFixture) -> None:
        class Attends(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inside, self.head = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(48, 5)

            def forward(self, x: Tensor) -> Tensor:
                x = x.flatten(2)
                return self.head(self.inside(x, x, x)[0].flatten(1))

        task = Task(Attends())
        with pytest.raises(
            ValueError, match=r"`model\.inside\.out_proj` can only be computed densely: inside nn\.Multihead"
        ):
            trainer(StaticMask("2:4", compute="sparse")).fit(task)
        assert not bound(task)
        caplog.set_level("INFO")
        callback = StaticMask("2:4", compute="auto")
        trainer(callback, max_epochs=1).fit(Task(Attends()))
        table = next(record.message for record in caplog.records if "computes with" in record.message)
        assert "model.inside.in_proj_weight" in table
        told = callback.summary()["compute"]
        assert told["model.inside.out_proj"] == "dense: inside nn.MultiheadAttention, which multiplies by itself"
        assert told["model.inside.in_proj_weight"] == "dense: no layer multiplies with it by itself"

    def test_sparse_under_autocast(self) -> None:
        task = Task()
        with pytest.raises(
            ValueError, match=r"`model\.2` can only be computed densely: autocast .* Say compute='auto'"
        ):
            trainer(StaticMask("2:4", compute="sparse"), precision="bf16-mixed").fit(task)
        assert not bound(task)
        callback = StaticMask("2:4", compute="auto")
        trainer(callback, precision="bf16-mixed", max_epochs=1).fit(Task())
        assert callback.summary()["compute"] == dict.fromkeys(LAYERS, "dense: autocast computes in another type")

    def test_sparse_in_a_compiled_model(self) -> None:
        task = Task(torch.compile(tiny_model(), backend="eager"))
        with pytest.raises(ValueError, match="can only be computed densely: inside a compiled module"):
            trainer(StaticMask("2:4", compute="sparse")).fit(task)

    def test_sparse_without_a_compiler(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        from bame_lightning.compute.native import build

        build.kernels.cache_clear()
        monkeypatch.setenv(build.CACHE, str(tmp_path))
        monkeypatch.setenv(build.COMPILER, str(tmp_path / "no-compiler"))
        try:
            with pytest.raises(ValueError, match=r"`model\.2` can only be computed densely: kernels: .*embedding_bag"):
                trainer(StaticMask("2:4", compute="sparse")).fit(Task())
            callback = StaticMask("2:4", compute="sparse", layers={"model.2": "dense", "model.4": "dense"})
            trainer(callback, max_epochs=1).fit(Task())
            assert callback.summary()["compute"] == {"model.6": "embedding_bag (weight gradient dense): asked for"}
        finally:
            build.kernels.cache_clear()


def test_two_optimizers_prepare_their_own_layers() -> None:
    ends = []
    for compute in ("dense", "sparse"):
        callback, task = METHODS["bame"](compute=compute, verify=True), Gan()
        trainer(callback).fit(task)
        ends.append((callback, task))
    (dense, wanted), (sparse, found) = ends
    assert all(torch.equal(a.kept, b.kept) for a, b in zip(dense.weights, sparse.weights, strict=True))
    for a, b in zip(wanted.parameters(), found.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_users_counter_of_flops_sees_what_it_would_see_without_us() -> None:
    class Counted(Task):
        totals: list[int]

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            with FlopCounterMode(display=False) as counter:
                loss = super().training_step(batch, batch_idx)
            self.totals.append(counter.get_total_flops())
            return loss

    found = []
    for callbacks in ([], [StaticMask("2:4", compute="sparse")]):
        task = Counted()
        task.totals = []
        if callbacks:
            # It is told, since nothing is computed sparsely under the mode.
            with pytest.raises(ValueError, match="a dispatch mode watches the operations"):
                trainer(*callbacks, max_epochs=1).fit(task)
            callbacks[0] = StaticMask("2:4", compute="auto")
        trainer(*callbacks, max_epochs=1).fit(task)
        found.append(task.totals[-8:])
    assert found[0] == found[1]


def test_without_lightning() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4))
    other, x = copy.deepcopy(model), torch.randn(8, 16)
    for network, compute in ((model, "sparse"), (other, "dense")):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        training = SparseTraining(Masked(), compute=compute)
        training.begin(network, [optimizer], "1:4", steps=5)
        assert bound(network) == (["0", "2"] if compute == "sparse" else [])
        for _ in range(5):
            optimizer.zero_grad()
            network(x).square().sum().backward()
            training.before_step(optimizer)
            optimizer.step()
        training.detach()
        assert not bound(network)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b)
