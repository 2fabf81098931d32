"""One battery of scenarios through which every method runs."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.cli import LightningCLI
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset

from bame_lightning import BAMECallback, Evidence, Schedule
from tests.callbacks.registry import COMPUTED, MASKED, METHODS, every_method
from tests.callbacks.scenarios import SAM, SCENARIOS, Groups, Manual, ManualHalves, scaled
from tests.callbacks.test_base import assert_same
from tests.callbacks.watch import Watch, most_in_a_block
from tests.training import Task, tiny_model, trainer

CASES = [
    pytest.param(
        name,
        scenario,
        id=f"{name}-{scenario}",
        marks=[pytest.mark.filterwarnings(f"ignore:{message}") for message in how.warns],
    )
    for scenario, how in SCENARIOS.items()
    for name in METHODS
    if name in MASKED or not how.several_evaluations
]


@pytest.mark.parametrize(("name", "scenario"), CASES)
def test_every_step_keeps_the_promises(name: str, scenario: str) -> None:
    torch.manual_seed(0)
    how, callback = SCENARIOS[scenario], METHODS[name]()
    watch = Watch(callback, how.sparse, masked=name in MASKED)
    fit = trainer(*how.callbacks(), callback, watch, **how.trainer())
    fit.fit(how.task())
    assert callback.steps == watch.steps
    if how.steps is None:
        batches = fit.fit_loop.epoch_loop.total_batch_idx + 1
        assert 0 < watch.steps < batches // fit.accumulate_grad_batches
    else:
        assert watch.steps == how.steps
    assert (watch.moves > 0) == (name != "static")
    # Under manual optimization the decay of straight-through methods comes after the user has clipped.
    if how.clip and (name in MASKED or not scenario.startswith("manual")):
        # Had clipping seen more than the sparse gradient, what is left of it would be smaller.
        reached = watch.norms if how.clip == "norm" else watch.largest
        assert max(reached) == pytest.approx(0.05, rel=2e-3)
        assert sum(value == pytest.approx(0.05, rel=2e-3) for value in reached) > watch.steps / 2


def ends(callback: Any, task: Task) -> dict[str, Any]:
    """All that a run leaves behind but its costs, and what it knows of the distance between steps."""
    return {"weights": dict(task.named_parameters()), "callback": without_costs(callback.state_dict())}


class Zeroed(ManualHalves):
    """Before each step a backward pass whose gradients are thrown away."""

    set_to_none = True

    def update(self, optimizer: Any, batch: Sequence[Tensor], batch_idx: int) -> None:
        self.manual_backward(100 * self.model(batch[0]).square().sum())
        optimizer.zero_grad(set_to_none=self.set_to_none)
        for half in zip(*(part.chunk(2) for part in batch), strict=True):
            self.manual_backward(self.loss(half) / 2)
        optimizer.step()
        optimizer.zero_grad(set_to_none=self.set_to_none)


class TestManualOptimization:
    @every_method
    @pytest.mark.parametrize("how", ["plain", "after zeroing", "after zeroing in place"])
    def test_several_backward_passes_are_one_reading_as_accumulated_batches_are(self, name: str, how: str) -> None:
        automatic, manual = METHODS[name](), METHODS[name]()
        one, two = Task(batch=4), (ManualHalves if how == "plain" else Zeroed)()
        two.set_to_none = how == "after zeroing"
        trainer(automatic, accumulate_grad_batches=2).fit(one)
        trainer(manual).fit(two)
        assert_same(ends(manual, two), ends(automatic, one))
        assert (automatic.summary().get("flips", 0) > 0) == (name != "static")

    @every_method
    def test_gradients_that_manual_backward_has_not_made_are_refused(self, name: str) -> None:
        class Raw(Manual):
            def update(self, optimizer: Any, batch: Sequence[Tensor], batch_idx: int) -> None:
                optimizer.zero_grad()
                if batch_idx < 2:
                    self.manual_backward(self.loss(batch))
                else:
                    self.loss(batch).backward()
                optimizer.step()

        task, callback = Raw(), METHODS[name]()
        with pytest.raises(
            RuntimeError, match=r"no `self.manual_backward` has made.*Call `self.manual_backward\(loss\)`"
        ):
            trainer(callback).fit(task)
        assert callback.steps == 2
        assert all(most_in_a_block(sparse.weight) <= 2 for sparse in callback.weights)

    @every_method
    def test_gradients_of_one_rank_are_refused(self, name: str) -> None:
        class Unsynchronised(Manual):
            # As DistributedDataParallel has it under `no_sync`.
            require_backward_grad_sync = False

        with pytest.raises(ValueError, match=r"`manual_backward` under `no_sync` of DDP.*`accumulate_grad_batches`"):
            trainer(METHODS[name]()).fit(Unsynchronised())


class TestRefusals:
    @every_method
    def test_lbfgs(self, name: str) -> None:
        task = Task(optimizer=torch.optim.LBFGS)
        before = task.model[6].weight.detach().clone()
        with pytest.raises(ValueError, match=r"returns LBFGS.*Use an optimizer that keeps one value per weight"):
            trainer(METHODS[name]()).fit(task)
        assert torch.equal(task.model[6].weight, before)

    @pytest.mark.parametrize("name", ["sr_ste", "transposable"])
    def test_a_second_evaluation_at_weights_that_are_dense(self, name: str) -> None:
        task, callback = Task(optimizer=SAM), METHODS[name]()
        callback.verify = False  # it would be the first to notice
        with pytest.raises(RuntimeError, match=r"closure more than once in a step.*or BAME"):
            trainer(callback).fit(task)
        assert all(most_in_a_block(sparse.weight) <= 2 for sparse in callback.weights)

    @pytest.mark.parametrize("name", ["bame", "rigl"])
    def test_a_fraction_of_a_run_without_an_end_before_anything_changes(self, name: str) -> None:
        class Endless(Task):
            def train_dataloader(self) -> Any:
                return DataLoader(Stream(), batch_size=None)

        task = Endless()
        before = task.model[6].weight.detach().clone()
        with pytest.raises(ValueError, match=r"`schedule.start` = 0.0 is a fraction of the run"):
            trainer(METHODS[name]()).fit(task)
        assert torch.equal(task.model[6].weight, before)


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(list(Task().train_dataloader()))


@every_method
def test_a_step_that_a_loss_scaler_skips_leaves_no_trace(name: str) -> None:
    # Without rescaling, which is at a layer's first finite gradient, whatever becomes of the step.
    callback, traces = METHODS[name](**({"rescale": False} if name in MASKED else {})), []
    watch = Watch(callback, SCENARIOS["float32"].sparse, masked=name in MASKED)

    class Trace(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            self.before, self.steps = copy.deepcopy(self._state(trainer, pl_module)), watch.steps

        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            traces.append(watch.steps == self.steps)
            if traces[-1]:
                assert_same(self._state(trainer, pl_module), self.before)

        @staticmethod
        def _state(trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
            moments = dict(enumerate(trainer.optimizers[0].state_dict()["state"].values()))
            state = callback.state_dict()
            state["flops"] = state["flops"].get("algorithmic", 0.0)
            state["trial"] = state["dense"] = None  # known after the first backward pass, whatever becomes of the step
            return {"callback": state, "model": pl_module.state_dict(), "optimizer": moments}

    trainer(callback, watch, Trace(), **scaled()).fit(Task(optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2)))
    assert 3 < sum(traces) < len(traces) - 10
    assert (watch.moves > 0) == (name != "static")


def test_a_window_is_a_fraction_of_the_steps_that_changing_accumulation_makes() -> None:
    callback = BAMECallback("2:4", schedule=Schedule(stop=0.5, every=1), evidence=Evidence(read_every=2))
    trainer(callback, GradientAccumulationScheduler({0: 1, 2: 4}), max_epochs=4).fit(Task())
    assert callback.steps == 20
    assert callback.adaptations == 10


class Judged(Task):
    """Can be validated, tested and asked for predictions."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", functional.cross_entropy(self.model(batch[0]), batch[1]))

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.model(batch[0])

    def val_dataloader(self) -> Any:
        return self.train_dataloader()

    test_dataloader = predict_dataloader = val_dataloader


@every_method
def test_validating_testing_and_predicting_alone_change_nothing(name: str, tmp_path: Path) -> None:
    task, callback = Judged(), METHODS[name]()
    alone = trainer(callback)

    def judge(**kwargs: Any) -> Tensor:
        alone.validate(task, verbose=False, **kwargs)
        alone.test(task, verbose=False, **kwargs)
        return torch.cat(alone.predict(task, **kwargs))

    images = torch.cat([batch[0] for batch in task.train_dataloader()])
    before = copy.deepcopy(task.state_dict())
    dense = judge()
    assert_same(task.state_dict(), before)
    assert callback.weights == []
    fit = trainer(callback, max_epochs=1)
    fit.fit(task)
    fit.save_checkpoint(tmp_path / "end.ckpt")
    trained, state = copy.deepcopy(task.state_dict()), copy.deepcopy(callback.state_dict())
    for kwargs in ({}, {"ckpt_path": tmp_path / "end.ckpt"}):
        predicted = judge(**kwargs)
        assert_same(task.state_dict(), trained)
        assert_same(callback.state_dict(), state)
        assert not torch.equal(predicted, dense)
        plain = tiny_model()
        plain.load_state_dict({key.removeprefix("model."): value for key, value in trained.items()})
        with torch.no_grad():
            densely = torch.cat([plain(part) for part in images.split(8)])
        assert torch.allclose(predicted, densely, atol=1e-6) if name in COMPUTED else torch.equal(predicted, densely)


class TestOneCallback:
    @every_method
    def test_fitted_to_another_model_starts_anew(self, name: str) -> None:
        callback, fresh = METHODS[name](), METHODS[name]()
        first, second, twin = Groups(), Task(), Task()
        trainer(callback, max_epochs=1).fit(first)
        left = copy.deepcopy(first.state_dict())
        trainer(callback).fit(second)
        trainer(fresh).fit(twin)
        assert_same(ends(callback, second), ends(fresh, twin))
        assert callback.summary() == fresh.summary()
        assert_same(first.state_dict(), left)

    @every_method
    def test_fits_of_one_trainer_go_on_counting(self, name: str) -> None:
        callback, task = METHODS[name](), Task()
        fit = trainer(callback, max_epochs=1)
        for epochs in (1, 2, 3):
            fit.fit_loop.max_epochs = epochs
            fit.fit(task)
            assert callback.steps == fit.global_step == 8 * epochs
            assert all(most_in_a_block(sparse.weight) <= 2 for sparse in callback.weights)
            assert not fit.optimizers[0]._optimizer_step_post_hooks

    @every_method
    def test_runs_of_one_process_do_not_meet(self, name: str) -> None:
        results = []
        for other in ("bame", "sr_ste"):
            callback, task = METHODS[name](), Task()
            trainer(callback).fit(task)
            results.append(ends(callback, task))
            trainer(METHODS[other](layers={"*.6": "dense"}), precision="bf16-mixed").fit(Task())
        assert_same(*results)

    @every_method
    def test_copies_are_of_their_own(self, name: str) -> None:
        callback, task = METHODS[name](), Task()
        before = copy.deepcopy(callback)
        trainer(callback).fit(task)
        assert before.weights == []
        pair, state = copy.deepcopy((callback, task)), copy.deepcopy(callback.state_dict())
        after = copy.deepcopy(callback)
        assert_same(after.state_dict(), state)
        for copied in (before, after):
            other = Task()
            trainer(copied).fit(other)
            assert_same(
                ends(copied, other), {"weights": dict(task.named_parameters()), "callback": without_costs(state)}
            )
        assert_same(callback.state_dict(), state)
        trainer(callback).fit(task)
        trainer(pair[0]).fit(pair[1])
        assert_same(ends(*pair), ends(callback, task))


def without_costs(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if key not in ("flops", "clocks")}


class TestCompiled:
    @pytest.mark.parametrize("name", ["bame", "rigl", "sr_ste"])
    @pytest.mark.parametrize("what", ["model", "module"])
    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
    def test_moving_masks_compile_nothing_anew_and_break_no_graph(self, name: str, what: str) -> None:
        def train(*callbacks: Any) -> tuple[int, dict[str, int], Any]:
            graphs = []

            def backend(graph: Any, inputs: Any) -> Any:
                graphs.append(graph)
                return graph.forward

            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            task = Task(torch.compile(tiny_model(), backend=backend)) if what == "model" else Task()
            trainer(*callbacks, max_epochs=3).fit(task if what == "model" else torch.compile(task, backend=backend))
            return len(graphs), dict(torch._dynamo.utils.counters["graph_break"]), task

        callback = METHODS[name]()
        graphs, breaks, task = train(callback)
        assert callback.summary()["flips"] > 0
        others, other_breaks, _ = train()
        # Fewer where the batch whose cost is counted runs uncompiled.
        assert 1 <= graphs <= others
        assert breaks.keys() <= other_breaks.keys()
        assert sum(breaks.values()) <= sum(other_breaks.values())
        if what == "model":
            assert (graphs, breaks) == (others, other_breaks) == (1, {})
            explained = torch._dynamo.explain(task.model._orig_mod)(torch.ones(8, 3, 4, 4))
            assert (explained.graph_count, explained.graph_break_count) == (1, 0)

    @every_method
    def test_a_compiled_model_trains_as_it_would_otherwise(self, name: str) -> None:
        runs = []
        for compiled in (False, True):
            callback, task = METHODS[name](), Task()
            if compiled:
                task.model = torch.compile(task.model, backend="eager")
            trainer(callback).fit(task)
            runs.append([*task.parameters(), *(sparse.kept for sparse in callback.weights)])
        # What is compiled is computed densely.
        same = torch.allclose if name in COMPUTED else torch.equal
        assert all(same(a, b) for a, b in zip(*runs, strict=True))


class Plain(Task):
    """A task that a command line can make."""

    def __init__(self, batch: int = 8) -> None:
        super().__init__(batch=batch)


CONFIGS = {
    "BAMECallback": """
        schedule: {start: 0, stop: 12, every: 3}
        evidence: {class_path: bame_lightning.Evidence, init_args: {read_every: 4}}
        layers: {model.4: dense, "*.6": "1:4"}
        """,
    "RigL": "schedule: {start: 0, stop: 12, every: 3}",
    "SRSTE": "decay: 0.001",
    "StaticMask": "init: random",
    "TransposableSTE": "refresh_every: 3",
}


def run_cli(folder: Path, monkeypatch: Any, method: str, pattern: str, *lines: str) -> LightningCLI:
    monkeypatch.setattr("sys.argv", ["train"])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning 2.6 under jsonargparse 4.53
    arguments = "".join(f"        {line}\n" for line in (f"pattern: {pattern}", *lines))
    (folder / "config.yaml").write_text(
        f"""
trainer:
  max_epochs: 2
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: bame_lightning.{method}
      init_args:
{arguments}"""
    )
    return LightningCLI(
        Plain, args=["fit", f"--config={folder / 'config.yaml'}"], save_config_callback=None, seed_everything_default=1
    )


class TestLightningCLI:
    @pytest.mark.parametrize("method", CONFIGS)
    def test_makes_the_callback_from_its_config(self, method: str, tmp_path: Path, monkeypatch: Any) -> None:
        lines = [line.strip() for line in CONFIGS[method].strip().splitlines()]
        cli = run_cli(tmp_path, monkeypatch, method, "'2:4'", *lines)
        [callback] = [found for found in cli.trainer.callbacks if hasattr(found, "summary")]
        assert type(callback).__name__ == method
        assert callback.steps == 16
        expected = {"model.2.weight": 2, "model.4.weight": 2, "model.6.weight": 2}
        if method == "BAMECallback":
            expected = {"model.2.weight": 2, "model.6.weight": 1}
        assert {sparse.name: most_in_a_block(sparse.weight) for sparse in callback.weights} == expected

    def test_takes_no_number_for_a_pattern(self, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
        with pytest.raises(SystemExit):
            run_cli(tmp_path, monkeypatch, "StaticMask", "2:4")
        assert "'pattern': 124" in capsys.readouterr().err
