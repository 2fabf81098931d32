"""What every sparse method promises: enforcement, plain checkpoints, clear refusals."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.amp import GradScaler

from bame_lightning import BAMECallback, Evidence, Schedule, StaticMask
from tests.training import Spy, Task, blocks_over, tiny_model, trainer


def lively(read_every: int) -> Evidence:
    """Evidence by which masks change in runs of a few steps."""
    return Evidence(read_every=read_every, contenders=0.5, step_size=4.0)


def bame(**kwargs: Any) -> BAMECallback:
    return BAMECallback(
        "2:4",
        **({"schedule": Schedule(every=2), "evidence": lively(2)} | kwargs),
    )


def save(callback: L.Callback | None, path: Path, task: Task | None = None) -> Path:
    fit = trainer(*([callback] if callback else []), max_epochs=1)
    fit.fit(task or Task())
    fit.save_checkpoint(path)
    return path


class TestEnforcement:
    def test_a_static_mask_keeps_its_positions(self) -> None:
        task, supports = Task(), []
        trainer(StaticMask("2:4"), Spy(lambda _, module: supports.append(module.model[6].weight != 0))).fit(task)
        assert all(torch.equal(supports[0], support) for support in supports)
        assert supports[0].sum() == task.model[6].weight.numel() / 2

    def test_the_initial_mask_keeps_the_largest_weights_of_each_block(self) -> None:
        task = Task(optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
        before = task.model[6].weight.detach().view(-1, 4)
        expected = [sorted(range(4), key=lambda i: -abs(block[i]))[:2] for block in before.tolist()]
        trainer(StaticMask("2:4"), max_epochs=1).fit(task)
        kept = task.model[6].weight.detach().view(-1, 4)
        assert [sorted(i) for i in expected] == [block.nonzero().flatten().tolist() for block in kept]

    def test_random_masks_leave_the_global_random_state_alone(self) -> None:
        states, masks = [], []
        for init in ("random", "magnitude"):
            callback, task = StaticMask("1:4", init=init), Task()
            torch.manual_seed(3)
            trainer(callback, max_epochs=1, limit_train_batches=1).fit(task)
            states.append(torch.get_rng_state())
            masks.append(callback.weights[2].pruned)
        assert torch.equal(*states)
        assert not torch.equal(*masks)

    @pytest.mark.parametrize("automatic", [True, False])
    def test_clipping_sees_the_sparse_gradient(self, automatic: bool) -> None:
        norms = []

        class Clipped(Task):
            def configure_gradient_clipping(
                self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None
            ) -> None:
                callback = self.trainer.callbacks[0]
                sparse = {id(s.weight): s.pruned for s in callback.weights}
                total = 0.0
                for parameter in self.parameters():
                    gradient = parameter.grad.clone()
                    if id(parameter) in sparse:
                        gradient[sparse[id(parameter)]] = 0
                    total += gradient.square().sum().item()
                norms.append((math.sqrt(total), nn.utils.clip_grad_norm_(self.parameters(), 0.1).item()))

        class Manual(Clipped):
            def __init__(self) -> None:
                super().__init__()
                self.automatic_optimization = False

            def training_step(self, batch, batch_idx) -> None:
                optimizer = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(super().training_step(batch, batch_idx))
                self.configure_gradient_clipping(optimizer)
                optimizer.step()

        callback = bame(verify=True)
        task = Clipped() if automatic else Manual()
        trainer(callback, gradient_clip_val=0.1 if automatic else None).fit(task)
        assert len(norms) == 16
        assert all(math.isclose(expected, seen, rel_tol=1e-5) for expected, seen in norms)
        assert callback.summary()["flips"] > 0

    def test_steps_that_a_loss_scaler_skips_are_not_read_and_do_not_count(self) -> None:
        scaler = GradScaler("cpu", init_scale=2.0**40, growth_interval=1000)
        callback, read = bame(), []

        def look(trainer, module) -> None:
            read.append((callback.steps, float(callback.evolving[0].noise), scaler.get_scale()))

        fit = trainer(callback, Spy(look), max_epochs=8, plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)])
        fit.fit(Task())
        skipped = sum(now[2] < before[2] for before, now in zip([(0, 0, 2.0**40), *read], read, strict=False))
        assert skipped > 3
        assert fit.global_step == 64
        assert callback.steps == 64 - skipped
        assert callback.summary()["discarded_readings"] == 0
        assert read[0][:2] == (0, 0.0)
        assert callback.summary()["flips"] > 0

    def test_bfloat16_and_unused_layers(self) -> None:
        model = nn.ModuleDict({"used": tiny_model(), "unused": nn.Linear(8, 8)})
        model.forward = lambda x: model["used"](x)
        model["head"] = nn.Linear(8, 2)
        task = Task(model)
        callback, before = bame(verify=True), model["unused"].weight.detach().clone()
        trainer(callback, precision="bf16-mixed").fit(task)
        assert torch.equal(model["unused"].weight, before)
        assert [sparse.name for sparse in callback.weights] == [f"model.used.{i}.weight" for i in (2, 4, 6)]
        assert callback.summary()["flips"] > 0

    def test_channels_last_weights(self) -> None:
        task, twin = Task(), Task()
        task.model.to(memory_format=torch.channels_last)
        for each in (task, twin):
            trainer(bame(), max_epochs=3).fit(each)
        torch.testing.assert_close(task.model[2].weight, twin.model[2].weight.to(memory_format=torch.channels_last))


class TestRescaling:
    def test_kept_weights_grow_by_the_root_of_m_over_n_once(self) -> None:
        task, callback = still(), StaticMask("1:4")
        before = [task.model[i].weight.detach().clone() for i in (2, 4, 6)]
        trainer(callback, max_epochs=2).fit(task)
        for weight, sparse in zip(before, callback.weights, strict=True):
            torch.testing.assert_close(sparse.weight.detach(), 2 * weight * ~sparse.pruned)
        after = task.model[6].weight.detach().clone()
        trainer(callback, max_epochs=2).fit(task)
        assert torch.equal(task.model[6].weight, after)

    def test_it_can_be_left_out(self) -> None:
        task, callback = still(), StaticMask("1:4", rescale=False)
        before = task.model[6].weight.detach().clone()
        trainer(callback, max_epochs=1).fit(task)
        assert torch.equal(task.model[6].weight, before * ~callback.weights[2].pruned)

    def test_a_layer_behind_a_batch_norm_keeps_its_scale(self) -> None:
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 2), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16, 8),
            nn.ReLU(), nn.Linear(8, 5),
        )  # fmt: skip
        task, callback = still(model), StaticMask("1:4")
        before = [model[i].weight.detach().clone() for i in (1, 5)]
        trainer(callback, max_epochs=1).fit(task)
        factors = [(sparse.weight / b).mean() * 4 for sparse, b in zip(callback.weights, before, strict=True)]
        torch.testing.assert_close(torch.stack(factors).detach(), torch.tensor([1.0, 2.0]))

    def test_a_layer_waits_for_its_first_gradient_beyond_a_checkpoint(self, tmp_path: Path) -> None:
        class Late(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.late, self.early, self.head = nn.Linear(48, 8), nn.Linear(48, 8), nn.Linear(8, 5)
                self.waiting = True

            def forward(self, images: torch.Tensor) -> torch.Tensor:
                hidden = self.early(images.flatten(1))
                return self.head(hidden if self.waiting else hidden + self.late(images.flatten(1)))

        first, second = still(Late()), still(Late())
        late, early = first.model.late.weight.detach().clone(), first.model.early.weight.detach().clone()
        second.model.waiting = False
        path = save(StaticMask("1:4"), tmp_path / "a.ckpt", first)
        assert torch.equal(first.model.late.weight, late)
        with pytest.warns(
            UserWarning, match=r"`model\.late\.weight`, not trained \(the loss does not reach it\) until now"
        ):
            trainer(StaticMask("1:4"), max_epochs=2).fit(second, ckpt_path=path)
        for weight, before in ((second.model.late.weight, late), (second.model.early.weight, early)):
            assert weight.count_nonzero() == 8 * 48 / 4
            torch.testing.assert_close(weight.detach(), 2 * before * (weight != 0))

    def test_a_gradient_that_is_not_finite_decides_nothing(self) -> None:
        class Poison(StaticMask):
            def on_before_optimizer_step(self, *args: Any) -> None:
                factors.append((self.weights[2].weight.detach() / before).sum() / 512)
                if self.steps < 3:
                    for sparse in self.weights:
                        sparse.weight.grad.fill_(math.nan)
                super().on_before_optimizer_step(*args)

        factors: list[torch.Tensor] = []
        task = Task(optimizer=Unmoved)
        before = task.model[6].weight.detach().clone()
        trainer(Poison("1:4"), max_epochs=1).fit(task)
        assert factors == pytest.approx([1] * 4 + [2] * 4, rel=1e-5)


class Unmoved(torch.optim.SGD):
    """Takes steps of nothing, whatever the gradient."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.0)

    def step(self, closure: Any = None) -> Any:
        return closure() if closure else None


def still(model: nn.Module | None = None) -> Task:
    """A task whose weights do not move."""
    return Task(model, lambda p: torch.optim.SGD(p, lr=0.0))


class TestCheckpoints:
    def test_load_strictly_into_the_plain_model_with_zeros_inside(self, tmp_path: Path) -> None:
        task = Task()
        keys = list(task.state_dict())
        checkpoint = torch.load(save(bame(), tmp_path / "a.ckpt", task), weights_only=True)
        assert list(checkpoint["state_dict"]) == keys
        plain = Task()
        plain.load_state_dict(checkpoint["state_dict"])
        assert blocks_over(plain.model[6].weight, 2, 4) == 0

    @pytest.mark.parametrize(
        "optimizer",
        [
            lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-3),
            lambda p: torch.optim.AdamW(p, lr=1e-2),
        ],
    )
    @pytest.mark.parametrize("cut", [1, 2, 3])
    def test_resuming_at_the_end_of_an_epoch_changes_nothing(self, tmp_path: Path, optimizer: Any, cut: int) -> None:
        whole, first, second = (bame(schedule=Schedule(every=3), evidence=lively(4)) for _ in range(3))
        one, two, three = Task(optimizer=optimizer), Task(optimizer=optimizer), Task(optimizer=optimizer)
        masks = []
        look = Spy(lambda *_: masks.append(torch.cat([s.pruned.flatten() for s in whole.weights])))
        # The window is a fraction of the run, so the interrupted run must know its length, too.
        trainer(whole, look, max_epochs=4).fit(one)
        stopper = Spy(lambda t, _: setattr(t, "should_stop", t.global_step == 8 * cut))
        interrupted = trainer(first, stopper, max_epochs=4, min_epochs=1)
        interrupted.fit(two)
        assert interrupted.global_step == 8 * cut
        interrupted.save_checkpoint(tmp_path / "cut.ckpt")
        resumed = trainer(second, max_epochs=4)
        resumed.fit(three, ckpt_path=tmp_path / "cut.ckpt")

        assert resumed.global_step == 32
        for a, b in zip(one.parameters(), three.parameters(), strict=True):
            assert torch.equal(a, b)
        assert_same(whole.state_dict(), second.state_dict())
        end, middle = masks[-1], masks[8 * cut - 1]
        assert not torch.equal(masks[0], middle)
        assert not torch.equal(middle, end)

    def test_resuming_without_masks_names_the_option_that_rebuilds_them(self, tmp_path: Path) -> None:
        path = save(None, tmp_path / "dense.ckpt")
        with pytest.raises(ValueError, match=r"dense\.ckpt holds no state of BAMECallback.*init='nonzero'"):
            trainer(bame()).fit(Task(), ckpt_path=path)

    def test_masks_can_be_rebuilt_from_the_zeros_of_sparse_weights(self, tmp_path: Path) -> None:
        task = Task()
        fit = trainer(bame(), max_epochs=1)
        fit.fit(task)
        fit.callbacks.clear()
        fit.save_checkpoint(tmp_path / "plain.ckpt")
        support = task.model[6].weight != 0
        callback = bame(init="nonzero", schedule=Schedule(0, 1, 1), evidence=Evidence(read_every=1))
        start = []

        class Look(L.Callback):
            def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
                start.append(~callback.weights[2].pruned)

        trainer(callback, Look()).fit(Task(), ckpt_path=tmp_path / "plain.ckpt")
        assert torch.equal(start[0], support)

    def test_dense_weights_that_have_no_zeros_to_rebuild_masks_from_are_named(self) -> None:
        task = Task()
        with torch.no_grad():
            task.model[2].weight[:, ::2] = 0
            task.model[4].weight[:, ::2] = 0  # these two obey
        with pytest.raises(
            ValueError, match=r"`model\.6`: .*512 of 512 blocks hold more.*layers=\{'model\.6': 'dense'\}"
        ):
            trainer(bame(init="nonzero")).fit(task)

    def test_rebuilding_masks_scales_nothing_and_goes_on_counting(self, tmp_path: Path) -> None:
        task, callback = Task(optimizer=lambda p: torch.optim.SGD(p, lr=0.0)), bame()
        fit = trainer(callback, max_epochs=1)
        fit.fit(task)
        fit.callbacks.clear()
        fit.save_checkpoint(tmp_path / "plain.ckpt")
        again, rebuilt = Task(optimizer=lambda p: torch.optim.SGD(p, lr=0.0)), bame(init="nonzero", rescale=True)
        trainer(rebuilt, max_epochs=2).fit(again, ckpt_path=tmp_path / "plain.ckpt")
        assert torch.equal(again.model[6].weight, task.model[6].weight)
        assert rebuilt.steps == 16

    def test_a_run_may_change_its_precision(self, tmp_path: Path) -> None:
        path = save(bame(), tmp_path / "a.ckpt")

        class Double(Task):
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                return super().training_step((batch[0].double(), batch[1]), batch_idx)

        callback = bame()
        trainer(callback, max_epochs=2, precision="64-true").fit(Double(), ckpt_path=path)
        assert callback.evolving[0].evidence.dtype == torch.float64
        assert callback.steps == 16

    def test_masks_that_do_not_fit_the_model_are_refused(self, tmp_path: Path) -> None:
        path = save(bame(), tmp_path / "a.ckpt")
        with pytest.raises(ValueError, match=r"`model\.2\.weight`, which is 2:4 of shape .* and 1:4 of shape"):
            trainer(BAMECallback("1:4")).fit(Task(), ckpt_path=path)
        with pytest.raises(ValueError, match=r"1 layers differ.*`model\.6\.weight`.*and not sparse here"):
            trainer(bame(layers={"*.6": "dense"})).fit(Task(), ckpt_path=path)

    def test_state_of_another_version_is_refused(self) -> None:
        with pytest.raises(ValueError, match="version 7, this release reads 6"):
            bame().load_state_dict({"nm_sparsity_version": 7})

    def test_state_is_a_bit_a_weight_for_masks_and_a_float_a_pruned_weight_for_evidence(self) -> None:
        callback = BAMECallback("1:16", schedule=Schedule(every=1))
        trainer(callback, max_epochs=1).fit(Task(nn.Sequential(nn.Flatten(), nn.Linear(48, 64), nn.Linear(64, 5))))
        layer = callback.state_dict()["layers"]["model.1.weight"]
        assert layer["mask"].nbytes == layer["initial"].nbytes == layer["pruned_before"].nbytes == 48 * 64 / 8
        assert layer["evidence"].nbytes == 48 * 64 * 15 / 16 * 4

    def test_a_second_fit_keeps_masks_although_a_revived_weight_is_zero(self) -> None:
        callback, task = StaticMask("2:4"), Task()
        trainer(callback, max_epochs=1).fit(task)
        mask = callback.weights[2].pruned.clone()
        with torch.no_grad():
            task.model[6].weight.zero_()
        trainer(callback, max_epochs=1).fit(task)
        assert torch.equal(callback.weights[2].pruned, mask)


class TestOtherTools:
    def test_a_learning_rate_finder_that_puts_everything_back_leaves_a_fresh_start(self, tmp_path: Path) -> None:
        task, twin = Task(), Task()
        callback, other = bame(rescale=True), bame(rescale=True)
        fit = trainer(callback, max_epochs=2, default_root_dir=tmp_path)
        task.lr = 0.1
        Tuner(fit).lr_find(task, num_training=8, update_attr=False)
        fit.fit(task)
        trainer(other, max_epochs=2).fit(twin)
        assert callback.steps == other.steps == 16
        for a, b in zip(task.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(a, b)

    def test_testing_a_checkpoint_does_not_lend_its_masks_to_the_next_fit(self, tmp_path: Path) -> None:
        class Tested(Task):
            def test_step(self, batch: Any, batch_idx: int) -> None:
                pass

            def test_dataloader(self) -> Any:
                return self.train_dataloader()

        callback = bame()
        path = save(callback, tmp_path / "a.ckpt", Tested())
        trainer(callback).test(Tested(), ckpt_path=path, verbose=False)
        fresh = Tested()
        with torch.no_grad():
            fresh.model[6].weight.copy_(torch.randn(16, 128, generator=torch.Generator().manual_seed(9)))
        expected = fresh.model[6].weight.detach().view(-1, 4).abs().argsort(descending=True)[:, :2].sort().values
        masks: list[torch.Tensor] = []
        look = Spy(lambda *_: masks.append(~callback.weights[2].pruned))
        trainer(callback, look, max_epochs=1).fit(fresh)
        assert callback.steps == 8
        assert torch.equal(masks[0].view(-1, 4).nonzero()[:, 1].view(-1, 2), expected)

    def test_whoever_densifies_at_the_end_is_told_about(self) -> None:
        class Densify(L.Callback):
            def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
                pl_module.model[6].weight.data.fill_(1.0)

        with pytest.warns(UserWarning, match=r"trained network is not sparse.*`model\.6\.weight`"):
            trainer(Densify(), bame()).fit(Task())

    def test_dead_inputs_do_not_throw_evidence_away_under_adam(self) -> None:
        model = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 5))
        dead = torch.arange(48) % 2 == 0
        model[0].register_forward_hook(lambda _, __, output: output.masked_fill(dead, 0))
        task = Task(model, lambda p: torch.optim.AdamW(p, lr=1e-2))
        callback = BAMECallback(
            "1:8", schedule=Schedule(every=2), evidence=Evidence(read_every=2), layers={"*.3": "dense"}
        )
        trainer(callback, max_epochs=10).fit(task)
        assert callback.summary()["flips"] > 0
        assert task.model[1].weight.abs().max() < 2


def assert_same(a: Any, b: Any) -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


class TestBadInput:
    def test_no_eligible_layer(self) -> None:
        with pytest.raises(
            ValueError, match=r"No layer is eligible for `pattern` 1:7.*model\.0\.weight: input dimension 3"
        ):
            trainer(BAMECallback("1:7")).fit(Task())

    def test_a_named_layer_that_m_does_not_divide(self) -> None:
        with pytest.raises(ValueError, match=r"asks for 2:4 in `model\.0`.*input dimension 3 is not divisible by 4"):
            trainer(BAMECallback("2:4", layers={"model.0": "2:4"})).fit(Task())

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"pattern": "16:1"}, "N <= M; got 16:1. Did you mean '1:16'"),
            ({"pattern": "0:4"}, "N >= 1 .* got 0:4"),
            ({"pattern": 124}, "got the integer 124: YAML"),
            ({"init": "zeros"}, "`init` must be .* got 'zeros'"),
            ({"freeze_after": -1}, "`freeze_after` .* got -1"),
            ({"freeze_after": 1.5}, "`freeze_after` .* got 1.5"),
            ({"schedule": {"stop": 0.5}}, r"`schedule` must be a `Schedule`.* got \{'stop': 0.5\}"),
            ({"evidence": "OneBatch"}, "`evidence` must be an `Evidence` or a `OneBatch`.* got 'OneBatch'"),
            ({"layers": ["a"]}, r"`layers` must map names of layers .* got \['a'\]"),
            ({"layers": {"a": "4:2"}}, "`layers` has a wrong rule for 'a'.* got 4:2.*Or write 'dense'"),
            ({"layers": {"a": 124}}, "`layers` has a wrong rule for 'a'.*integer 124"),
        ],
    )
    @pytest.mark.usefixtures("unchecked_types")
    def test_arguments(self, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            BAMECallback(**({"pattern": "2:4"} | arguments))

    def test_a_run_without_an_end_needs_steps(self) -> None:
        with pytest.raises(ValueError, match=r"`schedule.start` = 0.0 is a fraction of the run.*ints"):
            trainer(BAMECallback("2:4"), max_epochs=-1).fit(Task())
        callback = BAMECallback("2:4", schedule=Schedule(0, 8, 2))
        stop = Spy(lambda t, _: setattr(t, "should_stop", t.global_step >= 16))
        trainer(callback, stop, max_epochs=-1).fit(Task())
        assert callback.adaptations == 4

    def test_square_state_of_an_unknown_optimizer(self) -> None:
        class Whitening(torch.optim.SGD):
            def step(self, closure=None):
                loss = super().step(closure)
                for group in self.param_groups:
                    for p in group["params"]:
                        self.state[p]["whitening"] = torch.ones_like(p)
                return loss

        # Nothing but square weights, so that a value per weight and a matrix factor look alike.
        model = nn.Sequential(nn.Flatten(), nn.Linear(48, 48), nn.Linear(48, 48))
        with pytest.raises(
            ValueError, match=r"Whitening keeps 'whitening' for `model\.1\.weight`.*square shape \(48, 48\)"
        ):
            trainer(bame()).fit(Task(model, lambda p: Whitening(p, lr=0.1)))

    def test_fused_optimizers_and_manual_optimization_under_a_loss_scaler(self) -> None:
        def plugins() -> list[Any]:
            return [MixedPrecision("16-mixed", "cpu", scaler=GradScaler("cpu"))]

        with pytest.raises(ValueError, match="fused optimizer under a loss scaler"):
            trainer(bame(), plugins=plugins()).fit(Task(optimizer=lambda p: torch.optim.AdamW(p, fused=True)))
        task = Task()
        task.automatic_optimization = False
        with pytest.raises(ValueError, match="Manual optimization with a loss scaler"):
            trainer(bame(), plugins=plugins()).fit(task)
