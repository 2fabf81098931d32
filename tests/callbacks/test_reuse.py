"""What happens to a running fit, and to a callback between fits: restored states, new optimizers, other weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, BatchSizeFinder, LearningRateFinder
from torch import Tensor, nn

from bame_lightning import SRSTE, BAMECallback, Dense, OneShotMagnitude, RigL, Schedule, StaticMask
from bame_lightning.bame.accumulated import Accumulated
from tests.callbacks.registry import METHODS, every_method
from tests.training import Spy, Task, blocks_over, trainer

SPARSE = (2, 4, 6)


class Tuned(Task):
    """What tuners and tests ask of a module."""

    lr, batch_size = 0.1, 8

    def test_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def test_dataloader(self) -> Any:
        return self.train_dataloader()

    validation_step, val_dataloader = test_step, test_dataloader


class AtStart(L.Callback):
    """Call a function when training starts."""

    def __init__(self, look: Any) -> None:
        self.look = look

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.look()


class FinderInTheMiddle(LearningRateFinder):
    """As in Lightning's documentation: look for a rate at the start of an epoch."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pass

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == 1:
            self.lr_find(trainer, pl_module)


def save(callback: L.Callback, path: Path, task: Task | None = None, **kwargs: Any) -> Path:
    run = trainer(callback, **kwargs)
    run.fit(task or Tuned())
    run.save_checkpoint(path)
    return path


def over(task: Task) -> int:
    return sum(blocks_over(task.model[i].weight, 2, 4) for i in SPARSE)


def counts(callback: Any) -> tuple[list[int], Spy]:
    """Steps that a callback has counted after each batch."""
    seen: list[int] = []
    return seen, Spy(lambda *_: seen.append(callback.steps))


@every_method
def test_new_optimizers_in_the_middle_of_training_are_followed(name: str) -> None:
    class Phases(Task):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                self.trainer.strategy.setup_optimizers(self.trainer)

    callback, task, dense = METHODS[name](), Phases(), []
    trainer(callback, Spy(lambda *_: dense.append(over(task))), max_epochs=3).fit(task)
    assert dense == [0] * 24
    assert callback.steps == 24


@pytest.mark.parametrize("automatic", [True, False])
def test_a_replaced_entry_in_the_list_of_optimizers_is_refused_since_lightning_steps_the_old_one(
    automatic: bool,
) -> None:
    class Phases(Task):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                self.trainer.optimizers[0] = torch.optim.SGD(self.parameters(), lr=0.1)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            if not self.automatic_optimization:
                self.optimizers().zero_grad()
                self.manual_backward(loss)
                self.optimizers().step()
            return loss

    task = Phases(optimizer=torch.optim.AdamW)
    task.automatic_optimization = automatic
    with pytest.raises(ValueError, match=r"no longer holds the AdamW that steps.*Assign a list"):
        trainer(StaticMask("2:4")).fit(task)
    assert over(task) == 0


def test_a_new_optimizer_that_cannot_be_right_is_refused() -> None:
    class Phases(Task):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                self.make_optimizer = torch.optim.LBFGS
                self.trainer.strategy.setup_optimizers(self.trainer)

    with pytest.raises(ValueError, match="`configure_optimizers` returns LBFGS"):
        trainer(StaticMask("2:4")).fit(Phases())


@every_method
def test_optimizers_that_maximize_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"`maximize=True`.*Minimize the negated loss"):
        trainer(METHODS[name]()).fit(Task(optimizer=lambda p: torch.optim.SGD(p, lr=0.1, maximize=True)))


class TestRestoredStates:
    @every_method
    @pytest.mark.parametrize("tuner", [LearningRateFinder, BatchSizeFinder])
    def test_tuners_on_resuming_put_the_state_of_the_checkpoint_back(
        self, name: str, tuner: type, tmp_path: Path
    ) -> None:
        options = {LearningRateFinder: {"num_training_steps": 4, "update_attr": False}}
        found = tuner(**options.get(tuner, {"max_trials": 1, "steps_per_trial": 1}))
        first, second, masks = METHODS[name](), METHODS[name](), []
        path = save(first, tmp_path / "a.ckpt")
        start = AtStart(lambda: masks.extend([w.kept.clone() for w in second.weights] + [second.steps]))
        resumed = trainer(found, second, start, max_epochs=3, default_root_dir=tmp_path)
        resumed.fit(Tuned(), ckpt_path=path)
        assert masks[-1] == 16
        assert all(torch.equal(a, b.kept) for a, b in zip(masks, first.weights, strict=False))
        assert not second.method.rescaling

    @every_method
    def test_a_finder_in_the_middle_of_training_changes_nothing(self, name: str, tmp_path: Path) -> None:
        ends = []
        for finders in ([], [FinderInTheMiddle(num_training_steps=6, update_attr=False)]):
            callback, task = METHODS[name](), Tuned()
            seen, spy = counts(callback)
            trainer(*finders, callback, spy, max_epochs=3, default_root_dir=tmp_path).fit(task)
            assert seen[-1] == 24
            ends.append([*(task.model[i].weight.detach() for i in SPARSE), *(w.kept for w in callback.weights)])
        assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))

    @every_method
    def test_a_checkpoint_that_was_only_validated_is_saved_whole(self, name: str, tmp_path: Path) -> None:
        first, judge, last = (METHODS[name]() for _ in range(3))
        path = save(first, tmp_path / "a.ckpt")
        run = trainer(judge, default_root_dir=tmp_path)
        run.validate(Tuned(), ckpt_path=path, verbose=False)
        run.save_checkpoint(tmp_path / "b.ckpt")
        seen, spy = counts(last)
        weights: list[Tensor] = []
        task = Tuned(optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
        trainer(last, spy, AtStart(lambda: weights.extend(w.kept.clone() for w in last.weights)), max_epochs=3).fit(
            task, ckpt_path=tmp_path / "b.ckpt"
        )
        assert seen[0] == 17
        assert all(torch.equal(a, b.kept) for a, b in zip(weights, first.weights, strict=True))

    @pytest.mark.parametrize("make", [*METHODS.values(), lambda: Dense("2:4")], ids=[*METHODS, "dense"])
    def test_what_a_failed_test_or_fit_has_loaded_does_not_reach_the_next_fit(self, make: Any, tmp_path: Path) -> None:
        class Fails(Tuned):
            def test_step(self, batch: Any, batch_idx: int) -> None:
                raise RuntimeError("a bug")

            def configure_optimizers(self) -> Any:
                raise RuntimeError("a typo")

        path = save(make(), tmp_path / "a.ckpt")
        callback = make()
        for wrong in (
            lambda: trainer(callback).test(Fails(), ckpt_path=path),
            lambda: fit_from(callback, Fails(), path),
        ):
            with pytest.raises(RuntimeError, match=r"a bug|a typo"):
                wrong()
            seen, spy = counts(callback)
            trainer(callback, spy, max_epochs=1).fit(Tuned())
            assert seen == list(range(1, 9))

    def test_a_used_callback_takes_a_finder_on_another_model(self, tmp_path: Path) -> None:
        callback = BAMECallback("2:4")
        trainer(callback).fit(Tuned())
        seen, spy = counts(callback)
        finder = LearningRateFinder(num_training_steps=6, update_attr=False)
        trainer(finder, callback, spy, default_root_dir=tmp_path).fit(Tuned())
        assert seen == list(range(1, 17))


def fit_from(callback: L.Callback, task: Task, path: Path) -> None:
    trainer(callback).fit(task, ckpt_path=path)


class TestOtherWeights:
    def test_weights_of_an_earlier_checkpoint_keep_all_they_have(self) -> None:
        callback, task, earlier = BAMECallback("2:4", rescale=False, schedule=Schedule(every=1)), Task(), {}

        def look(run: L.Trainer, module: L.LightningModule) -> None:
            if run.global_step == 16:
                earlier.update(copy.deepcopy(module.state_dict()))

        trainer(callback, Spy(look), max_epochs=8).fit(task)
        assert any((task.model[i].weight[earlier[f"model.{i}.weight"] != 0] == 0).any() for i in SPARSE)
        task.load_state_dict(earlier)
        start: dict[str, Tensor] = {}
        keep = AtStart(lambda: start.update(copy.deepcopy(task.state_dict())))
        trainer(callback, keep, max_epochs=1).fit(task)
        assert all(torch.equal(start[name], value) for name, value in earlier.items())

    @every_method
    def test_dense_weights_get_masks_of_their_own(self, name: str) -> None:
        # The transposable mask is of the largest weights of whole tiles.
        callback, task, start = METHODS[name](), Task(), []
        dense = copy.deepcopy(task.state_dict())
        with torch.no_grad():
            task.model[6].weight.copy_(torch.randn(16, 128, generator=torch.Generator().manual_seed(5)))
        trainer(callback).fit(task)
        task.load_state_dict(dense)
        twin, first = METHODS[name](), []
        trainer(callback, AtStart(lambda: start.extend(w.kept.clone() for w in callback.weights))).fit(task)
        trainer(twin, AtStart(lambda: first.extend(w.kept.clone() for w in twin.weights))).fit(Task())
        assert len(start) == len(SPARSE)
        assert all(torch.equal(a, b) for a, b in zip(start, first, strict=True))

    def test_a_second_fit_of_one_shot_magnitude_goes_on_where_the_first_ended(self, tmp_path: Path) -> None:
        torch.save(Task().state_dict(), tmp_path / "dense.pt")
        callback, task, start = OneShotMagnitude("2:4", tmp_path / "dense.pt"), Task(), {}
        run = trainer(callback, AtStart(lambda: start.update(copy.deepcopy(task.state_dict()))), max_epochs=1)
        run.fit(task)
        end = copy.deepcopy(task.state_dict())
        run.fit_loop.max_epochs = 2
        run.fit(task)
        assert all(torch.equal(start[name], value) for name, value in end.items())
        assert callback.steps == 16


class TestFrozenLayers:
    @every_method
    def test_a_layer_that_is_frozen_on_the_way_stays_as_it_is(self, name: str) -> None:
        class Freezing(Task):
            def on_train_epoch_start(self) -> None:
                if self.current_epoch == 1:
                    self.model[6].requires_grad_(False)

        task, seen = Freezing(), []
        trainer(METHODS[name](), Spy(lambda *_: seen.append(task.model[6].weight.detach().clone())), max_epochs=3).fit(
            task
        )
        assert not torch.equal(seen[0], seen[7])
        assert all(torch.equal(seen[8], weight) for weight in seen[8:])

    @every_method
    def test_a_layer_that_is_unfrozen_on_the_way_is_pruned_and_named(self, name: str) -> None:
        class Transfer(Task):
            def __init__(self) -> None:
                super().__init__(nn.Identity())
                self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(48, 32), nn.ReLU())
                self.head = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 5))
                self.model = nn.Sequential(self.backbone, self.head)

            def configure_optimizers(self) -> Any:
                return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

        callback, task, seen = METHODS[name](), Transfer(), []
        before = task.backbone[1].weight.detach().clone()
        look = Spy(lambda *_: seen.append(task.backbone[1].weight.detach().clone()))
        finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=False)
        with pytest.warns(UserWarning, match=r"`model\.0\.1\.weight`, not trained .*step 9 on.*'model\.0\.1': 'dense'"):
            trainer(callback, finetuning, look, max_epochs=2).fit(task)
        assert all(torch.equal(weight, before) for weight in seen[:8])
        assert [blocks_over(weight, 2, 4) for weight in seen[8:]] == [0] * 8
        assert [sparse.name for sparse in callback.weights] == ["model.0.1.weight", "model.1.0.weight"]
        assert callback.steps == 16


def test_steps_that_lightning_does_not_see_are_told() -> None:
    class Raw(Task):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any = None) -> None:
            closure()
            optimizer.optimizer.step()

    task, callback = Raw(), BAMECallback("2:4")
    with pytest.warns(
        UserWarning,
        match=r"BAMECallback has seen no optimizer step in 4 batches.*Step what `self.optimizers\(\)` returns",
    ):
        trainer(callback).fit(task)
    assert over(task) == 0


@pytest.mark.parametrize(("steps", "after"), [("another optimizer", 4), ("nothing", 8)])
def test_steps_of_nobody_are_told(steps: str, after: int) -> None:
    class Own(Task):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.manual_backward(super().training_step(batch, batch_idx))
            if steps == "another optimizer":
                torch.optim.SGD(self.parameters(), lr=0.1).step()

    with pytest.warns(UserWarning, match=rf"StaticMask has seen no optimizer step in {after} batches"):
        trainer(StaticMask("2:4")).fit(Own())


@pytest.mark.parametrize("other", [StaticMask, Dense, SRSTE])
def test_two_methods_are_refused_before_anything_changes(other: Any) -> None:
    task, twin = Task(), Task()
    with pytest.raises(ValueError, match=rf"holds 2 methods, {other.__name__} and BAMECallback.*layers=\{{"):
        trainer(other("2:4"), BAMECallback("1:4")).fit(task)
    assert all(torch.equal(a, b) for a, b in zip(task.parameters(), twin.parameters(), strict=True))


def test_rigl_says_that_a_run_is_too_short_for_it() -> None:
    with pytest.warns(UserWarning, match=r"RigL will never swap a weight: its window of 12 .*`schedule.every` = 100"):
        trainer(RigL("2:4")).fit(Task())


def test_flips_of_a_second_fit_add_to_those_of_the_first() -> None:
    callback, task, flips = RigL("2:4", schedule=Schedule(0, 16, every=3)), Task(), []
    run = trainer(callback, max_epochs=1)
    run.fit(task)
    flips.append(callback.summary()["flips"])
    before = [w.kept.clone() for w in callback.weights]
    run.fit_loop.max_epochs = 2
    run.fit(task)
    assert not all(torch.equal(a, b.kept) for a, b in zip(before, callback.weights, strict=True))
    assert callback.summary()["flips"] > flips[0] > 0


def test_a_summary_needs_no_weights_on_the_masks_device() -> None:
    callback = BAMECallback("2:4", schedule=Schedule(every=1))
    trainer(callback).fit(Task())
    expected = callback.summary()
    for group in callback.method.groups:
        # Lightning moves the weights to the CPU when fit is over, and the evidence stays where it was.
        group.table.accumulated = Accumulated(group.table.evidence.to("meta"), mean=False)
    assert callback.summary() == expected


def test_nothing_watches_after_batches_that_the_module_leaves_out() -> None:
    class Skips(Task):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int:
            return -1

    with torch.no_grad():
        trainer(StaticMask("2:4"), max_epochs=1).fit(Skips())
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
