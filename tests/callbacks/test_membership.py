"""Which weights are made sparse: those that are trained and multiplied as they are, from when they are."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from bame_lightning import BAMECallback, Schedule, StaticMask
from tests.callbacks.registry import METHODS, every_method
from tests.training import Spy, Task, blocks_over, trainer

# Modules of the bottom of networks here: 48 inputs, and two linear layers that 4 divides.
HIDDEN = (1, 3)


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        layers = [nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 5)]
    return nn.Sequential(nn.Flatten(), *layers)


class Adam(Task):
    """One optimizer over all that the module holds."""

    def __init__(self, model: nn.Module | None = None, **kwargs: Any) -> None:
        super().__init__(model or network(), lambda p: torch.optim.AdamW(p, lr=1e-2), **kwargs)


class Average(Adam):
    """Holds an average of its network, which the optimizer holds, too."""

    def __init__(self) -> None:
        super().__init__()
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.8))

    def on_train_batch_end(self, *_: Any) -> None:
        self.average.update_parameters(self.model)


class Teacher(Adam):
    """Learns from a network that runs without gradients, though nobody has switched them off for its weights."""

    held = True

    def __init__(self) -> None:
        super().__init__()
        self.teacher = network()

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        with torch.no_grad():
            taught = self.teacher(batch[0])
        return functional.mse_loss(self.model(batch[0]), taught)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam((self if self.held else self.model).parameters(), lr=1e-2)


class Experts(Adam):
    """The second expert is asked from the second epoch on, and after what classifies in the order of modules."""

    asked = 1

    def __init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            super().__init__(nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 8)))
            self.experts = nn.ModuleList(nn.Linear(48, 16) for _ in range(2))
            self.last = nn.Linear(8, 5)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        hidden = self.model[:2](batch[0]) + self.experts[0](batch[0].flatten(1))
        if self.current_epoch >= self.asked:
            hidden = hidden + self.experts[1](batch[0].flatten(1))
        return functional.cross_entropy(self.last(self.model[2:](hidden)), batch[1])


class ManualAverage(Average):
    """The same by hand, a step every other batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        self.manual_backward(functional.cross_entropy(self.model(batch[0]), batch[1]))
        if batch_idx % 2:
            self.optimizers().step()
            self.optimizers().zero_grad()


def names(callback: Any) -> list[str]:
    return [sparse.name for sparse in callback.weights]


class TestNotTrained:
    @every_method
    @pytest.mark.parametrize("held", [True, False])
    def test_a_teacher_stays_bit_for_bit_and_holds_no_classifier(self, name: str, held: bool) -> None:
        task, callback = Teacher(), METHODS[name]()
        task.held, before = held, copy.deepcopy(task.teacher.state_dict())
        trainer(callback, max_epochs=1).fit(task)
        assert all(torch.equal(before[key], value) for key, value in task.teacher.state_dict().items())
        assert names(callback) == ["model.1.weight", "model.3.weight"]
        assert [blocks_over(task.model[i].weight, 2, 4) > 0 for i in (1, 3, 5)] == [False, False, True]

    @every_method
    @pytest.mark.parametrize(("kind", "accumulated"), [(Average, 1), (Average, 4), (ManualAverage, 1)])
    def test_an_average_is_that_of_the_weights_there_were(self, name: str, kind: Any, accumulated: int) -> None:
        task, own = kind(), {}

        def follow(_: Any, module: Any) -> None:
            for i in HIDDEN:
                weight = module.model[i].weight.detach()
                own[i] = own[i].lerp(weight, 0.2) if i in own else weight.clone()

        callback = METHODS[name]()
        trainer(callback, Spy(follow), accumulate_grad_batches=accumulated).fit(task)
        for i in HIDDEN:
            torch.testing.assert_close(task.average.module[i].weight.detach(), own[i], atol=1e-6, rtol=0)
        assert names(callback) == ["model.1.weight", "model.3.weight"]

    @pytest.mark.parametrize("name", ["bame", "sr_ste"])
    @pytest.mark.parametrize("when", ["on_train_batch_start", "on_before_zero_grad"])
    def test_an_average_that_is_updated_before_the_first_backward_pass_is_told_with_the_remedy(
        self, name: str, when: str
    ) -> None:
        def early(*, trained: bool) -> Average:
            task = Average()
            task.average.requires_grad_(trained)
            task.on_train_batch_end = lambda *_: None
            setattr(task, when, lambda *_: task.average.update_parameters(task.model))
            return task

        with pytest.warns(
            UserWarning, match=r"`average\.module\.1\.weight` \(and 1 more\) was written to before the first"
        ):
            trainer(METHODS[name](), max_epochs=1).fit(early(trained=True))
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*was written to before")
            trainer(METHODS[name](), max_epochs=1).fit(early(trained=False))

    def test_dense_values_are_kept_until_the_first_step_only(self) -> None:
        callback, kept = StaticMask("2:4"), []

        class Look(Teacher):
            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                kept.append(sorted(callback.state_dict()["trial"]))
                return super().training_step(batch, batch_idx)

        trainer(callback, max_epochs=1).fit(Look())
        first, *others = kept
        assert first == [
            f"{of}.{i}.weight" for of in ("model", "teacher") for i in (1, 3, 5) if (of, i) != ("teacher", 5)
        ]
        assert others == [[]] * 7

    def test_the_sanity_check_and_the_first_step_see_all_pruned_and_later_ones_what_is_trained(self) -> None:
        over = []

        class Look(Average):
            val_dataloader = Average.train_dataloader

            def look(self) -> None:
                networks = self.model, self.average.module
                over.append([blocks_over(network[i].weight, 2, 4) > 0 for network in networks for i in HIDDEN])

            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                self.look()
                return super().training_step(batch, batch_idx)

            def validation_step(self, batch: Any, batch_idx: int) -> None:
                if self.trainer.sanity_checking:
                    self.look()

            def on_train_batch_end(self, *_: Any) -> None: ...

        trainer(StaticMask("2:4"), max_epochs=1, num_sanity_val_steps=1).fit(Look())
        assert over == [[False] * 4] * 2 + [[False, False, True, True]] * 7

    def test_a_resumed_run_leaves_the_average_alone(self, tmp_path: Path) -> None:
        assert_resumes(Average, tmp_path, (1, 3))

    def test_a_second_fit_tries_again_and_evolution_goes_on(self) -> None:
        task, callback = Teacher(), METHODS["bame"]()
        before = copy.deepcopy(task.teacher.state_dict())
        fit = trainer(callback, max_epochs=1)
        fit.fit(task)
        adapted = callback.adaptations
        fit.fit_loop.max_epochs = 2
        fit.fit(task)
        assert all(torch.equal(before[key], value) for key, value in task.teacher.state_dict().items())
        assert (adapted, callback.adaptations) == (2, 4)

    def test_a_network_of_which_nothing_is_trained_stays_dense_and_says_so(self) -> None:
        class Idle(Adam):
            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                with torch.no_grad():
                    hidden = self.model[:-1](batch[0])
                return functional.cross_entropy(self.model[-1](hidden), batch[1])

        task, callback = Idle(), METHODS["bame"]()
        before = copy.deepcopy(task.state_dict())
        with pytest.warns(UserWarning, match=r"keeps no layer sparse.*Name the classifier.*gradients switched on"):
            trainer(callback, max_epochs=1).fit(task)
        assert all(torch.equal(before[f"model.{i}.weight"], task.model[i].weight) for i in HIDDEN)
        assert callback.summary()["flops"]["flops/train_vs_dense"] == 1


class TestTrainedLater:
    @every_method
    def test_an_expert_that_is_reached_late_is_pruned_when_it_is(self, name: str) -> None:
        task, callback, seen = Experts(), METHODS[name](), []
        before = task.experts[1].weight.detach().clone()
        look = Spy(lambda *_: seen.append(task.experts[1].weight.detach().clone()))
        with pytest.warns(UserWarning, match=r"`experts\.1\.weight`, not .*the loss does not reach it.*step 9 on:"):
            trainer(callback, look, max_epochs=3).fit(task)
        assert all(torch.equal(weight, before) for weight in seen[:8])
        assert [blocks_over(weight, 2, 4) for weight in seen[8:]] == [0] * 16
        assert names(callback) == ["model.1.weight", "model.3.weight", "experts.0.weight", "experts.1.weight"]
        assert callback.steps == 24
        # Counted anew when the expert joins.
        counted = callback.summary()["flops"]["flops/train_vs_sr_ste"]
        assert counted == 1 if name == "sr_ste" else counted < 1

    @pytest.mark.filterwarnings("ignore:`experts")
    def test_resuming_before_and_after_an_expert_has_joined(self, tmp_path: Path) -> None:
        assert_resumes(Experts, tmp_path, (1, 3), (2, 3))

    @pytest.mark.parametrize("how", ["new optimizer", "parameter group", "new layer"])
    def test_phases_with_other_parameters(self, how: str) -> None:
        class Phases(Adam):
            second = False

            def on_train_epoch_start(self) -> None:
                if self.current_epoch != 1:
                    return
                self.second = True
                if how == "new optimizer":
                    self.trainer.strategy.setup_optimizers(self.trainer)
                else:
                    if how == "new layer":
                        self.model[1] = nn.Linear(48, 32)
                    self.trainer.optimizers[0].add_param_group({"params": list(self.model[1].parameters())})

            def configure_optimizers(self) -> Any:
                part = self.model[:2] if self.second else self.model[2:]
                return torch.optim.AdamW(part.parameters(), lr=1e-2)

        task, callback, over = Phases(), METHODS["bame"](), []
        look = Spy(lambda *_: over.append([blocks_over(task.model[i].weight, 2, 4) for i in HIDDEN]))
        with pytest.warns(UserWarning, match=r"`model\.1\.weight`, not trained \(in no optimizer\) until now"):
            trainer(callback, look, max_epochs=3).fit(task)
        assert all(first > 0 and second == 0 for first, second in over[:8])
        assert over[8:] == [[0, 0]] * 16
        assert callback.steps == 24

    @every_method
    def test_a_layer_that_takes_the_place_of_another(self, name: str) -> None:
        class Replaces(Adam):
            def on_train_epoch_start(self) -> None:
                if self.current_epoch == 1:
                    self.model[1] = nn.Linear(48, 32)  # as many parameters as before
                    self.trainer.strategy.setup_optimizers(self.trainer)

        task, callback, over = Replaces(), METHODS[name](), []
        look = Spy(lambda *_: over.append([blocks_over(task.model[i].weight, 2, 4) for i in HIDDEN]))
        with pytest.warns(UserWarning, match=r"`model\.1\.weight`.*until now, is trained from optimizer step 9 on"):
            trainer(callback, look, max_epochs=2).fit(task)
        assert over == [[0, 0]] * 16
        assert [w.weight for w in callback.weights] == [task.model[i].weight for i in HIDDEN]

    @pytest.mark.parametrize("name", ["bame", "sr_ste"])
    def test_a_layer_that_joins_behind_the_classifier_leaves_it_dense(self, name: str, tmp_path: Path) -> None:
        class HeadFirst(Task):
            unfrozen = 1

            def __init__(self) -> None:
                super().__init__(nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 5)))
                with torch.random.fork_rng():
                    torch.manual_seed(1)
                    self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(48, 32), nn.ReLU())

            def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
                return functional.cross_entropy(self.model(self.backbone(batch[0])), batch[1])

            def on_train_epoch_start(self) -> None:
                self.backbone.requires_grad_(self.current_epoch >= self.unfrozen)

        task, callback = HeadFirst(), METHODS[name]()
        fit = trainer(callback, max_epochs=2)
        with pytest.warns(
            UserWarning, match=r"`backbone\.1\.weight`, not trained .* is trained from optimizer step 9 on"
        ):
            fit.fit(task)
        assert sorted(names(callback)) == ["backbone.1.weight", "model.0.weight"]
        assert blocks_over(task.model[2].weight, 2, 4) > 0
        fit.save_checkpoint(tmp_path / "end.ckpt")
        resumed = METHODS[name]()
        trainer(resumed, max_epochs=3).fit(HeadFirst(), ckpt_path=tmp_path / "end.ckpt")
        assert names(resumed) == names(callback)


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight * 2)


class Centred(nn.Linear):
    """Weight standardisation, written in place."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.clone()
        weight -= weight.mean(1, keepdim=True)
        return functional.linear(x, weight)


class Rounded(nn.Linear):
    """Fake quantisation: forward pass on a grid, straight through in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        grid = torch.fake_quantize_per_tensor_affine(self.weight, 0.01, 0, -128, 127)
        return functional.linear(x, grid)


class Copied(nn.Linear):
    """Multiplies the values of its parameter, in other memory."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, torch.cat([self.weight.double().float().clone()[:8], self.weight[8:]]))


class Called(nn.Module):
    """Computes its weight outside, and puts it in for one call."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        scaled = {name: value * 2 for name, value in self.inner.named_parameters()}
        return torch.func.functional_call(self.inner, scaled, (x,))


OTHERS = {
    "called": Called,
    "doubled": lambda: Doubled(32, 16),
    "centred": lambda: Centred(32, 16),
    "rounded": lambda: Rounded(32, 16),
    "old weight norm": lambda: nn.utils.weight_norm(nn.Linear(32, 16)),
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(32, 16)),
    "old spectral norm": lambda: nn.utils.spectral_norm(nn.Linear(32, 16)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(32, 16)),
}


class TestWhatIsMultiplied:
    @pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
    @pytest.mark.parametrize("automatic", [True, False])
    @pytest.mark.parametrize("layer", OTHERS)
    def test_a_layer_that_multiplies_something_else_stays_dense(
        self, layer: str, automatic: bool, caplog: pytest.LogCaptureFixture
    ) -> None:
        model = network()
        model[3] = OTHERS[layer]()
        task, callback = (Adam if automatic else Manual)(model), METHODS["bame"]()
        before = {name: value.detach().clone() for name, value in model[3].named_parameters()}
        with caplog.at_level("INFO"):
            trainer(callback, max_epochs=1).fit(task)
        assert names(callback) == ["model.1.weight"]
        assert "multiplied" in caplog.text  # the table says why
        assert all((value != 0).sum() == (before[name] != 0).sum() for name, value in model[3].named_parameters())

    @pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
    def test_copies_and_casts_are_the_weight_itself(self, precision: Any) -> None:
        model = network()
        model[3] = Copied(32, 16)
        callback = METHODS["bame"]()
        trainer(callback, max_epochs=1, precision=precision).fit(Adam(model))
        assert names(callback) == ["model.1.weight", "model.3.weight"]

    def test_a_classifier_under_weight_norm_is_the_classifier(self) -> None:
        model = network()
        model[5] = parametrizations.weight_norm(nn.Linear(16, 5))
        callback = StaticMask("2:4")
        trainer(callback, max_epochs=1).fit(Adam(model))
        assert names(callback) == ["model.1.weight", "model.3.weight"]


class Manual(Adam):
    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.automatic_optimization = False

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        self.optimizers().zero_grad()
        self.manual_backward(functional.cross_entropy(self.model(batch[0]), batch[1]))
        self.optimizers().step()


def assert_resumes(kind: type[Adam], folder: Path, *interrupted: tuple[int, ...]) -> None:
    """A run that is interrupted after so many epochs ends in the same bits."""
    ends = []
    for epochs in (interrupted[0][-1:], *interrupted):
        path = None
        for last in epochs:
            task, callback = kind(), BAMECallback("2:4", schedule=Schedule(0, 20, every=3))
            fit = trainer(callback, max_epochs=last)
            fit.fit(task, ckpt_path=path)
            path = folder / f"{last}.ckpt"
            fit.save_checkpoint(path)
        ends.append(task.state_dict())
    for end in ends[1:]:
        assert all(torch.equal(a, b) for a, b in zip(ends[0].values(), end.values(), strict=True))
