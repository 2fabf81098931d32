"""One battery that every method runs through."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.amp import GradScaler
from torch.nn import functional

from bame_lightning import SRSTE, RigL, Schedule, TransposableSTE
from tests.callbacks.registry import MASKED, METHODS, MOVING, every_method
from tests.callbacks.test_base import assert_same
from tests.training import Spy, Task, blocks_over, trainer


def assert_sparse(module: L.LightningModule) -> None:
    assert [blocks_over(module.model[i].weight, 2, 4) for i in (2, 4, 6)] == [0, 0, 0]


class Validated(Task):
    """Looks at its weights whenever it is validated."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        assert_sparse(self)

    def val_dataloader(self) -> Any:
        return self.train_dataloader()


@every_method
def test_validation_and_every_step_see_a_sparse_network_under_plain_keys(name: str) -> None:
    task = Validated()
    keys = list(task.state_dict())
    trainer(METHODS[name](), Spy(lambda _, module: assert_sparse(module)), val_check_interval=3).fit(task)
    assert list(task.state_dict()) == keys


@pytest.mark.parametrize("name", MOVING)
@pytest.mark.parametrize(
    "optimizer", [lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), lambda p: torch.optim.AdamW(p, lr=1e-2)]
)
def test_resuming_changes_nothing_and_masks_moved_before_and_after(name: str, optimizer: Any, tmp_path: Path) -> None:
    whole, first, second = (METHODS[name]() for _ in range(3))
    one, two, three = (Task(optimizer=optimizer) for _ in range(3))
    masks: list[torch.Tensor] = []
    look = Spy(lambda *_: masks.append(torch.cat([sparse.pruned.flatten() for sparse in whole.weights])))
    trainer(whole, look, max_epochs=4, accumulate_grad_batches=2).fit(one)
    stop = Spy(lambda t, _: setattr(t, "should_stop", t.global_step == 8))
    cut = trainer(first, stop, max_epochs=4, min_epochs=1, accumulate_grad_batches=2)
    cut.fit(two)
    cut.save_checkpoint(tmp_path / "cut.ckpt")
    saved = torch.load(tmp_path / "cut.ckpt", weights_only=True)
    Task().load_state_dict(saved["state_dict"])
    trainer(second, max_epochs=4, accumulate_grad_batches=2).fit(three, ckpt_path=tmp_path / "cut.ckpt")
    for a, b in zip(one.parameters(), three.parameters(), strict=True):
        assert torch.equal(a, b)
    assert_same(whole.state_dict(), second.state_dict())
    assert not torch.equal(masks[0], masks[15])
    assert not torch.equal(masks[15], masks[-1])


@every_method
def test_steps_that_a_loss_scaler_skips_leave_a_sparse_network(name: str) -> None:
    scaler = GradScaler("cpu", init_scale=2.0**40, growth_interval=1000)
    callback, scales = METHODS[name](), [2.0**40]

    def look(trainer: L.Trainer, module: L.LightningModule) -> None:
        assert_sparse(module)
        scales.append(scaler.get_scale())
        skipped = sum(now < before for before, now in pairwise(scales))
        assert callback.steps == len(scales) - 1 - skipped

    task = Validated()
    trainer(callback, Spy(look), max_epochs=8, plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)]).fit(task)
    assert callback.steps < 64
    assert scales[-1] < scales[0]


@every_method
@pytest.mark.parametrize("where", ["forward", "update"])
def test_an_exception_leaves_a_sparse_network_and_no_hooks(name: str, where: str) -> None:
    class Failing(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            loss = closure()
            if where == "update" and self.count == 5:
                raise RuntimeError("on purpose")
            super().step()
            self.count += 1
            return loss

    class Broken(Task):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if where == "forward" and self.trainer.global_step == 5:
                raise RuntimeError("on purpose")
            return super().training_step(batch, batch_idx)

    def make(parameters: Any) -> Any:
        optimizer = Failing(parameters, lr=0.1)
        optimizer.count = 0
        return optimizer

    task, callback = Broken(optimizer=make), METHODS[name]()
    fit = trainer(callback)
    with pytest.raises(RuntimeError, match="on purpose"):
        fit.fit(task)
    assert_sparse(task)
    assert not fit.optimizers[0]._optimizer_step_post_hooks
    assert callback.steps == 5


@every_method
def test_a_second_fit_starts_from_the_masks_of_the_first(name: str) -> None:
    task, callback = Task(), METHODS[name]()
    trainer(callback, max_epochs=1, gradient_clip_val=0.1).fit(task)
    before = [sparse.pruned.clone() for sparse in callback.weights]
    with torch.no_grad():
        task.model[6].weight.mul_(0)  # a magnitude would forget the mask
    seen: list[torch.Tensor] = []

    class Look(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            seen.extend(sparse.pruned.clone() for sparse in callback.weights)

    trainer(callback, Look(), max_epochs=1).fit(task)
    assert all(torch.equal(a, b) for a, b in zip(before, seen, strict=True))
    assert_sparse(task)


@pytest.mark.parametrize("name", MASKED)
def test_where_the_optimizer_moves_pruned_weights_makes_no_difference(name: str) -> None:
    def push(*_: Any) -> None:
        """As an optimizer does that mixes inputs or outputs."""
        for sparse in callback.weights:
            sparse.weight.detach().add_(strength * sparse.pruned)

    def make(parameters: Any) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
        optimizer.register_step_post_hook(push)  # before that of the callback
        return optimizer

    strength, ends = torch.zeros(()), []
    for by in (0.0, 5.0):
        strength.fill_(by)
        callback, task = METHODS[name](), Task(optimizer=make)
        trainer(callback, Spy(lambda _, module: assert_sparse(module))).fit(task)
        ends.append([*task.parameters(), *(sparse.pruned for sparse in callback.weights)])
        assert (callback.summary().get("flips", 0) > 0) == (name != "static")
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


class TestSRSTE:
    @pytest.mark.parametrize("accumulate", [1, 2])
    @pytest.mark.parametrize("clip", [None, 0.5])
    def test_equals_its_update_rule_written_out(self, accumulate: int, clip: float | None) -> None:
        task = Task()
        weights = {name: p.detach().clone() for name, p in task.named_parameters()}
        sparse = [f"model.{i}.weight" for i in (2, 4, 6)]
        momenta = {name: torch.zeros_like(w) for name, w in weights.items()}
        batches = [tuple(batch) for batch in task.train_dataloader()]
        decay, lr, momentum, weight_decay = 0.01, 0.1, 0.9, 1e-3
        for step in range(24 // accumulate):
            masks = {name: mask_by_loops(weights[name]) for name in sparse}
            used = {name: (w * masks[name] if name in masks else w).requires_grad_() for name, w in weights.items()}
            loss = sum(
                functional.cross_entropy(torch.func.functional_call(task.model, plain(used), (images,)), labels)
                / accumulate
                for images, labels in (batches[(step * accumulate + k) % 8] for k in range(accumulate))
            )
            gradients = dict(zip(used, torch.autograd.grad(loss, list(used.values())), strict=True))
            with torch.no_grad():
                for name in sparse:
                    gradients[name] = gradients[name] + decay * (1 - masks[name]) * weights[name]
                if clip:
                    norm = torch.cat([g.flatten() for g in gradients.values()]).norm()
                    gradients = {name: g * min(1.0, clip / (norm.item() + 1e-6)) for name, g in gradients.items()}
                for name, w in weights.items():
                    momenta[name] = momentum * momenta[name] + gradients[name] + weight_decay * w.detach()
                    weights[name] = w.detach() - lr * momenta[name]
        callback = SRSTE("2:4", decay=decay)
        trainer(callback, max_epochs=3, accumulate_grad_batches=accumulate, gradient_clip_val=clip).fit(task)
        assert callback.summary()["flips"] > 0
        for latent in callback.method.latents:
            torch.testing.assert_close(latent.value, weights[latent.sparse.name])
            expected = weights[latent.sparse.name] * mask_by_loops(weights[latent.sparse.name])
            torch.testing.assert_close(latent.sparse.weight.detach(), expected)

    def test_decay_is_not_divided_by_the_loss_scale(self) -> None:
        seen = []
        for plugins in ([], [MixedPrecision("16-mixed", "cpu", scaler=GradScaler("cpu", init_scale=2.0**10))]):
            model = nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.Linear(8, 5))
            nn.init.ones_(model[2].weight)
            task = Task(model, lambda p: torch.optim.SGD(p, lr=1.0))
            task.training_step = lambda batch, index, model=model: model(batch[0]).sum() * 0
            callback = SRSTE("2:4", layers={"*.1": "2:4"}, decay=0.25)
            before = model[1].weight.detach().clone()
            trainer(callback, max_steps=1, plugins=plugins).fit(task)
            kept = mask_by_loops(before)
            torch.testing.assert_close(callback.method.latents[0].value, before * (kept + 0.75 * (1 - kept)))
            seen.append(callback.method.latents[0].value)

    def test_a_negative_decay(self) -> None:
        with pytest.raises(ValueError, match=r"`decay` must not be negative; got -1"):
            SRSTE("2:4", decay=-1.0)


def plain(parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("model."): value for name, value in parameters.items()}


def mask_by_loops(weight: torch.Tensor) -> torch.Tensor:
    mask = torch.zeros_like(weight)
    flat, out = weight.detach().movedim(1, -1), mask.movedim(1, -1)
    for row, target in zip(flat.flatten(0, -2), out if out.dim() == 2 else rows(out), strict=True):
        for i in range(0, len(row), 4):
            for j in sorted(range(4), key=lambda j, i=i, row=row: -abs(row[i + j].item()))[:2]:
                target[i + j] = 1
    return mask


def rows(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Views of the last dimension, also of a tensor that cannot be flattened without a copy."""
    return [
        tensor[o, y, x] for o in range(tensor.shape[0]) for y in range(tensor.shape[1]) for x in range(tensor.shape[2])
    ]


def test_transposable_masks_hold_along_the_output_dimension_too_and_move_every_few_steps() -> None:
    callback, masks = TransposableSTE("1:4", refresh_every=4), []
    look = Spy(lambda *_: masks.append([~sparse.pruned for sparse in callback.weights]))
    trainer(callback, look, max_epochs=3).fit(Task())
    for step, kept in enumerate(masks, 1):
        for mask in kept:
            matrix = mask.flatten(2).movedim(-1, 0) if mask.dim() > 2 else mask[None]
            for position in matrix:
                assert (position.view(len(position), -1, 4).sum(-1) == 1).all()
                assert (position.T.reshape(position.shape[1], -1, 4).sum(-1) == 1).all()
        if step > 1 and step % 4:
            assert all(torch.equal(a, b) for a, b in zip(kept, masks[step - 2], strict=True))
    assert callback.summary()["flips"] > 0
    with pytest.raises(ValueError, match=r"`pattern` 1:16 cannot be transposable in `model\.1`: 16 does not divide"):
        trainer(TransposableSTE("1:16")).fit(Task(nn.Sequential(nn.Flatten(), nn.Linear(48, 24), nn.Linear(24, 5))))


class TestRigL:
    def test_swaps_the_smallest_weight_for_the_largest_gradient_in_the_chosen_share(self) -> None:
        model = nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.Linear(8, 5))
        task = Task(model, lambda p: torch.optim.SGD(p, lr=0.0))
        callback = RigL("1:4", schedule=Schedule(0, 8, 4), share=0.5)
        record: list[tuple[torch.Tensor, torch.Tensor]] = []
        weight = model[1].weight
        initial = weight.detach().clone()
        weight.register_hook(lambda gradient: record.append((gradient.clone(), (weight != 0).clone())))
        trainer(callback, max_steps=5, max_epochs=1).fit(task)
        gradient, before = record[3]
        kept = before.view(-1, 4).float().argmax(-1)
        smallest = initial.view(-1, 4)[range(96), kept].abs()
        after = ~callback.weights[0].pruned.view(-1, 4)
        moved = (after.float().argmax(-1) != kept).nonzero().flatten().tolist()
        # progress 3/8 through the window: half of (1 + cos(3 pi / 8)) / 2 = 0.3457 of 96 blocks, rounded up
        assert len(moved) == 34
        assert set(moved) == set(smallest.argsort()[:34].tolist())
        for block in moved:
            candidates = [i for i in range(4) if i != kept[block]]
            best = max(candidates, key=lambda i, b=block: abs(gradient.view(-1, 4)[b, i].item()))
            assert after[block].tolist() == [i == best for i in range(4)]
        assert callback.summary()["flips"] == 68


def test_rigl_logs_how_often_masks_flip() -> None:
    callback, rates, flips = RigL("2:4", schedule=Schedule(0, 16, every=4)), [], [0]

    def look(run: Any, module: Any) -> None:
        rates.append(float(run.callback_metrics["bame/flip_rate"]))
        flips.append(callback.summary()["flips"])

    positions = 8 * 4 * 9 + 8 * 8 + 16 * 128
    trainer(callback, Spy(look), log_every_n_steps=1).fit(Task())
    for step in range(3, 16, 4):
        assert rates[step] == pytest.approx((flips[step + 1] - flips[step]) / positions)
    assert max(rates) > 0


def test_a_run_without_batches_is_no_reason_to_complain() -> None:
    trainer(RigL("2:4"), limit_train_batches=0).fit(Task())


def test_weights_that_are_not_sparse_are_named_with_the_remedy() -> None:
    with pytest.raises(
        ValueError, match=r"^`model\.2`: `init='nonzero'`.*keep it dense: layers=\{'model\.2': 'dense'\}"
    ):
        trainer(METHODS["static"](init="nonzero")).fit(Task())
