"""The Lightning driver of all methods: which hook of a Trainer calls which verb of sparse training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum, auto
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from bame_lightning.bame.schedule import Schedule, Window
from bame_lightning.blocks import statistics
from bame_lightning.blocks.pattern import NMPattern
from bame_lightning.callbacks.averaging import Averages
from bame_lightning.callbacks.bookkeeping import Bookkeeper, KeepsBooks
from bame_lightning.callbacks.home import masks_from_home
from bame_lightning.callbacks.intruders import Intruders
from bame_lightning.callbacks.loggers import record_config
from bame_lightning.callbacks.membership import Membership
from bame_lightning.callbacks.ranks import COMPARE_EVERY, Ranks
from bame_lightning.callbacks.refusals import (
    find_holders,
    refuse_backward,
    refuse_local_gradients,
    refuse_strategy,
    refuse_unknown_masks,
)
from bame_lightning.callbacks.run_length import progress, resolve_window, window_at_pace
from bame_lightning.callbacks.table import layer_table, products_table
from bame_lightning.methods.execution import Compute
from bame_lightning.methods.holder import Holder
from bame_lightning.methods.method import Method, costs
from bame_lightning.methods.training import Init, SparseTraining
from bame_lightning.weights import invariants
from bame_lightning.weights.layers import LayerPlan, SparseWeight
from bame_lightning.weights.saved_state import STATE_VERSION, VERSION_KEY, check_version, restore_masks, saved_masks

ON_THE_BAR = ("bame/flip_rate", "flops/train_vs_dense")
"""Metrics that the progress bar shows."""
FEW = 4
"""Batches with optimizer steps that Lightning does not see, after which the user is told."""
_FORWARD = "a step was computed from weights that were not sparse, and they have been zeroed since"


class Stage(Enum):
    """How far a fit has come."""

    OUTSIDE = auto()
    """No fit is going on."""
    READY = auto()
    """Masks are made, or restored."""
    TOLD = auto()
    """The user was told that no optimizer step is seen."""


class SparseCallback(KeepsBooks):
    """Drive a method from the hooks of a Trainer, so that weights are N:M sparse whenever anybody looks.

    The model is never renamed, wrapped or added to: its state dict keeps the plain keys, with exact zeros where weights
    are pruned. Masks, and what a method evolves, live in this callback's own state.

    Args:
        pattern: "N:M" or an `NMPattern`.
        method: What is done at each step.
        layers: Rules that override the default choice of layers: module or parameter name, or a glob over such names ->
            a pattern or "dense". The last match wins.
        init: Which weights the masks keep at first: of the largest "magnitude", at "random", or the "nonzero" ones of
            weights that are N:M sparse already.
        verify: Check all invariants after every step (slow, for debugging).
        compute: How products of sparse layers are computed: "dense", "auto" or "sparse" (`methods.execution.Execution`).

    Attributes:
        method: The method.
        training: The run of training that the hooks drive.

    Raises:
        ValueError: If an argument is malformed.
    """

    def __init__(
        self,
        pattern: str | NMPattern,
        method: Method,
        *,
        layers: Mapping[str, str | NMPattern] | None = None,
        init: Init = "magnitude",
        verify: bool = False,
        compute: Compute = "dense",
    ) -> None:
        self.method = method
        self.training = SparseTraining(method, init, compute)
        method.run.verify = verify
        self._brought: dict[str, Any] | None = None
        super().__init__(pattern, layers)
        self._restored: dict[str, Any] | None = None
        """A state that was loaded and is not yet taken up; empty if it was saved before a first fit."""
        self._stage = Stage.OUTSIDE
        self._optimizers: list[Optimizer] = []
        self.averages = Averages((), ())
        self.ranks = Ranks()
        self._intruders = Intruders(self.ranks)
        self._members = Membership(self)

    # What others ask.

    @property
    def weights(self) -> list[SparseWeight]:
        """The sparse weights with their masks."""
        return self.training.run.weights

    @property
    @override
    def steps(self) -> int:
        """Optimizer steps so far, of all optimizers that hold sparse weights."""
        self.come_home()
        return self.training.run.steps

    @steps.setter
    def steps(self, steps: int) -> None:
        self.training.run.steps = steps

    @property
    def window(self) -> Window:
        """When masks adapt, in optimizer steps."""
        return self.training.run.window

    @property
    def schedule(self) -> Schedule | None:
        """When masks change, for methods that change them now and then."""
        return self.method.schedule

    @property
    def init(self) -> Init:
        """Which weights the masks keep at first."""
        return self.training.init

    @property
    def rescale(self) -> bool:
        """Whether what is kept is multiplied by sqrt(M / N) at the first gradient, where the scale matters."""
        return self.method.rescale

    @property
    def both_ways(self) -> bool:
        """Whether masks are 2:4 along the output dimension, too."""
        return self.method.both_ways

    @property
    def compute(self) -> Compute:
        """How products of sparse layers are computed."""
        return self.training.execution.compute

    @property
    def verify(self) -> bool:
        """Whether all invariants are checked after every step."""
        return self.training.run.verify

    @verify.setter
    def verify(self, verify: bool) -> None:
        self.training.run.verify = verify

    def summary(self) -> dict[str, Any]:
        """What the run did, in plain types.

        Returns:
            Pattern, pattern by layer, share of non-zeros, survival of the initial masks, optimizer steps, training FLOPs
            (counted, and executed), what computes the layers, and what the method counts.

        Raises:
            RuntimeError: Before the first fit.
        """
        self.come_home()
        if self._brought is not None:
            summary: dict[str, Any] = self._brought["summary"]
            return summary
        if not self.weights and not self.steps:
            raise RuntimeError(f"{type(self).__name__} has not been fitted, so there is nothing to sum up.")
        masks = self._mean(self._mask_statistics()) if self.weights else {"bame/density": 1.0, "bame/survival": 1.0}
        return {
            "pattern": str(self.pattern),
            "layers": {sparse.label: str(sparse.pattern) for sparse in self.weights},
            "density": float(masks["bame/density"]),
            "survival": float(masks["bame/survival"]),
            "steps": self.steps,
            "flops": {name: float(value) for name, value in self._mean(self.books.metrics()).items()},
            "compute": {name: choice.words for name, choice in self.training.execution.choices.items()} or "dense",
            **self.method.summary(self._mean),
        }

    # The state in a checkpoint.

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._restored:
            return self._restored  # loaded, and not yet taken up
        self.come_home()
        if self._brought is not None:
            state: dict[str, Any] = self._brought["state"]
            return state
        flops = self._mean(self.books.state_dict())
        return {
            VERSION_KEY: STATE_VERSION,
            **self.training.state(),
            **self._members.state_dict(),
            "flops": {name: float(booked) for name, booked in flops.items()},
            "compute": self.training.execution.state(),
        }

    @override
    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        # Somebody may have written to weights since the last look; what is saved shares their memory.
        if self.training.attached:
            with torch.no_grad():
                self.method.enforce()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_version(state_dict, type(self).__name__)
        self._restored = state_dict if state_dict["layers"] else {}
        if not self._restored:
            # Saved before a first fit, as by a learning-rate finder that puts everything back: start anew.
            self.training.forget()

    # Lightning's hooks, in the order in which they are called.

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            refuse_strategy(trainer)
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        # Left by a fit that failed, or by a test of another checkpoint; this fit's own is loaded later.
        self._restored = None
        here = {id(parameter) for parameter in pl_module.parameters()}
        if not any(id(sparse.weight) in here for sparse in self.weights):
            self.training.forget()

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.ckpt_path:
            self._plan_window(trainer)  # first of all, since it may refuse, and nothing has been changed yet
        self._stage = Stage.OUTSIDE
        # Strategies that shard the model first load a checkpoint after this hook only.
        if not trainer.strategy.restore_checkpoint_after_setup:
            self._start(trainer, pl_module)

    @override
    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._stage is Stage.OUTSIDE:
            self._start(trainer, pl_module)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.ckpt_path:
            # Not earlier: to tell the length of the run, Lightning sets up the data loader, whose place is not restored yet.
            self._plan_window(trainer)
        if self._stage is Stage.OUTSIDE or self._restored:
            self._start(trainer, pl_module)
        if trainer.ckpt_path and not self.steps:
            self.steps = trainer.global_step  # masks were rebuilt in the middle of a run
            self.training.follow([holder.optimizer for holder in self.training.run.holders])
        self._attach(trainer, pl_module)

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._restored:
            # Put back in the middle of training, as by a learning-rate finder.
            self._start(trainer, pl_module)
            self._attach(trainer, pl_module)
        for holder in self.training.run.holders:
            holder.start_batch()
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    @override
    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        super().on_before_backward(trainer, pl_module, loss)
        if not pl_module.automatic_optimization:
            refuse_local_gradients(trainer)
            for holder in self.training.run.holders:
                self.training.run.withheld.before_backward(holder.weights)
                holder.before_backward()

    @override
    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Under manual optimization users clip before `on_before_optimizer_step`, so this is the last moment. Under
        # automatic optimization gradients may still be scaled here, or local to a rank.
        if pl_module.automatic_optimization:
            self._members.settle(trainer, pl_module)
            return
        for holder in self.training.run.holders:
            holder.after_backward()
            self.method.after_backward(holder)

    @override
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        self._members.settle(trainer, pl_module, optimizer)
        self._members.join(trainer, pl_module, optimizer)
        if self._optimizers != list(trainer.optimizers):
            self.refollow(trainer)  # somebody has made new optimizers in the middle of training
        holder = self.training.holder_of(optimizer)
        if holder is not None:
            self._before_step(pl_module, holder)

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self.training.end_batch()
        self._members.settle(trainer, pl_module)
        if self.training.stray and not self.steps and self.books.unbooked >= FEW * trainer.accumulate_grad_batches:
            self._tell_of_no_step()
        self.averages.follow()
        if chosen := self.training.execution.news():
            rank_zero_info(f"{type(self).__name__} computes with compute={self.compute!r}:\n{products_table(chosen)}")
        if self.verify:
            self.method.check()
        if trainer._logger_connector.should_update_logs:
            masks = {**self._mask_statistics(), **self.method.metrics()} if self.weights else {}
            for name, value in self._mean({**masks, **self.books.metrics()}).items():
                pl_module.log(name, value, on_step=True, on_epoch=False, prog_bar=name in ON_THE_BAR)

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_validation_start(trainer, pl_module)
        self._tell_of_intruders(_FORWARD)
        self._compute_outside_fit(trainer, pl_module)

    @override
    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if trainer.state.fn == "fit" and batch_idx == 0:
            self._intruders.look(self.weights)  # others may swap weights for validation, and back

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._tell_of_intruders("validation has judged a network that is not sparse")
        self._release_outside_fit(trainer)

    @override
    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._compute_outside_fit(trainer, pl_module)

    @override
    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._release_outside_fit(trainer)

    @override
    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._compute_outside_fit(trainer, pl_module)

    @override
    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._release_outside_fit(trainer)

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        self._intruders.look(self.weights)
        self._tell_of_intruders(_FORWARD)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.training.detach()
        if self.books.unbooked and not self.steps:
            self._tell_of_no_step()
        self.ranks.compare(self.method.replicas(), self.steps, every=1)
        try:
            invariants.check_weights(self.weights, self.steps)
        except invariants.InvariantError as error:
            rank_zero_warn(f"The trained network is not sparse. {error}")
            self._stage = Stage.OUTSIDE

    @override
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._stage is not Stage.OUTSIDE and not self.ranks.sharded:
            # Callbacks that come later may have changed the weights when training ended.
            self._intruders.look(self.weights)
            self._intruders.tell("the trained network is not sparse")
        if self.weights:
            self._home.send({"state": self.state_dict(), "summary": self.summary()}, first=trainer.is_global_zero)

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self.training.detach()

    # What the hooks do.

    def _plan_window(self, trainer: L.Trainer) -> None:
        """Resolve the schedule against the length of the run, or refuse it."""
        run = self.training.run
        if self.method.schedule is not None:
            run.window = resolve_window(trainer, self.method.schedule, self.method.never)
        for holder in run.holders:
            holder.window = run.window

    def _start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Make the weights sparse, or restore them."""
        loaded, self._restored, self._stage = self._restored, None, Stage.READY
        if loaded is None and trainer.ckpt_path and self.init != "nonzero":
            refuse_unknown_masks(trainer.ckpt_path, type(self).__name__, self.pattern)
        restored = loaded or None
        self._members.begin(restored)
        plans, known = self._choose_weights(trainer, pl_module, restored)
        self._members.try_masks(known, restored)
        if restored:
            self.training.execution.load_state(restored.get("compute", {}))
        self.ranks = Ranks(trainer.world_size, self.weights)
        self._intruders = Intruders(self.ranks)
        self.training.run.everywhere, self.training.run.suspect = self.ranks.all, self._intruders.look
        clocks = restored.get("clocks", []) if restored else [h.clock() for h in self.training.run.holders]
        holders = find_holders(trainer, pl_module, {id(plan.weight) for plan in plans if plan.pattern})
        self._optimizers = list(trainer.optimizers)
        self.training.follow(holders, clocks if self.steps else [])
        self.method.start(restored)
        self.averages = Averages(trainer.callbacks, self.weights)  # type: ignore[attr-defined]
        # What a step costs is counted anew: layers may have been unfrozen, and batches changed.
        booked = restored.get("flops") if restored else self.books.state_dict() if self.steps else None
        densities = {sparse.name: sparse.pattern.density for sparse in self.weights}
        self.books = Bookkeeper(densities, transposed_share=self.method.cost.transposed_share, restored=booked)
        rank_zero_info(f"{type(self).__name__}({self.pattern})\n{layer_table(plans)}")
        if trainer.is_global_zero:
            record_config(trainer.loggers, type(self).__name__, str(self.pattern), plans)

    def _choose_weights(
        self, trainer: L.Trainer, pl_module: L.LightningModule, restored: dict[str, Any] | None
    ) -> tuple[list[LayerPlan], list[SparseWeight]]:
        """Plan the layers and put weights under masks; returns the plans, and the weights that were masked before."""
        name, run = type(self).__name__, self.training.run
        # A second fit of the same model keeps the masks it has: a revived weight may be zero, and prune itself otherwise.
        # Unless somebody has loaded other weights since.
        brought, self._brought = self._brought, None
        run.weights = [*run.weights, *masks_from_home(brought, pl_module, name)]
        known = [sparse for sparse in run.weights if sparse.obeys] if not restored else []
        saved = restored["layers"] if restored else {}
        masked = [id(weight) for key, weight in pl_module.named_parameters(remove_duplicate=False) if key in saved]
        plans = self._members.plan(trainer, pl_module, masked)
        if restored:
            run.weights, run.steps = restore_masks(saved, plans, name), int(restored["steps"])
            self.method.rescaling = set(restored["rescaling"])
        else:
            run.weights = self.training.make_masks(plans, known)
            run.steps = run.steps if trainer.global_step else 0
        return plans, known

    def _attach(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """See the steps of the optimizers; no hook of Lightning follows the update before somebody sees the weights."""
        clipped = bool(trainer.gradient_clip_val)  # by norm in one operation, by value in two
        self.training.run.clips = clipped * (2 if trainer.gradient_clip_algorithm == "value" else 1)
        self.training.before_inner = partial(self._before_step, pl_module)
        self.training.on_step = partial(self._after_step, trainer)
        # The optimizers' state may come from a checkpoint of dense training.
        self.method.enforce()
        self.training.execution.share = partial(_on_the_first, trainer)
        self.training.execution.bind(pl_module, self.weights)
        for holder in self.training.run.holders:
            self._keep_pace(trainer, holder)
        self.training.attach()

    def _compute_outside_fit(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compute as training has, by the masks of the last fit, or of the checkpoint that was loaded."""
        if trainer.state.fn == "fit" or self.compute == "dense":
            return
        weights = self.weights
        if self._restored:
            weights = saved_masks(self._restored["layers"], pl_module)
            self.training.execution.load_state(self._restored.get("compute", {}))
        self.training.execution.bind(pl_module, weights, watching=False)

    def _release_outside_fit(self, trainer: L.Trainer) -> None:
        if trainer.state.fn != "fit":
            self.training.execution.release()

    def _before_step(self, pl_module: L.LightningModule, holder: Holder) -> None:
        if not pl_module.automatic_optimization:
            refuse_backward(holder, type(self).__name__)
        self.training.before_step(holder.optimizer, whole=pl_module.automatic_optimization)

    def _after_step(self, trainer: L.Trainer, holder: Holder) -> None:
        """Book a step, and compare what ranks hold."""
        run, moved = self.training.run, costs(self.method, holder)
        executed = self.training.execution.shares(moved)
        if len(run.holders) == 1:
            self.books.book(moved, self.ranks.count, executed)
        else:
            # Of the network, or of the layers that the optimizer holds where several hold sparse ones.
            sparse = {weight.name for weight in run.weights}
            self.books.book_part(moved, self.ranks.count, holder.batches, sparse, executed)
        holder.batches = 0
        self.ranks.compare(self.method.replicas(), run.steps, every=1 if run.verify else COMPARE_EVERY)
        if not trainer.lightning_module.automatic_optimization:
            holder.pace.follow(holder.steps - 1, progress(trainer))
            self._keep_pace(trainer, holder)

    def _keep_pace(self, trainer: L.Trainer, holder: Holder) -> None:
        # Under automatic optimization the Trainer knows how many steps there will be.
        if self.method.schedule is not None and not trainer.lightning_module.automatic_optimization:
            at_pace = window_at_pace(trainer, self.method.schedule, holder.pace)
            holder.window = at_pace or self.training.run.window

    def refollow(self, trainer: L.Trainer) -> None:
        """Follow the optimizers that hold the weights now: other weights may be sparse, or others may hold them."""
        # Steps are booked even if nothing is sparse any more.
        holders = [holder.optimizer for holder in self.training.run.holders]
        if self.weights:
            holders = find_holders(trainer, trainer.lightning_module, {id(sparse.weight) for sparse in self.weights})
        self._optimizers = list(trainer.optimizers)
        self.training.refollow(holders)
        self.method.regroup()

    def follow_members(self, trainer: L.Trainer, weights: list[SparseWeight], idle: set[str]) -> None:
        """Go on with other sparse weights, of which those that are new are still dense; `idle` ones get no gradient."""
        joined = set(weights) - set(self.weights)
        self.training.run.weights = weights
        self.refollow(trainer)
        self.training.execution.bind(trainer.lightning_module, weights)
        self.averages = Averages(trainer.callbacks, weights)  # type: ignore[attr-defined]
        self.books.follow({s.name: s.pattern.density for s in weights}, idle, recount=bool(joined))

    @override
    def take_home(self, told: dict[str, Any]) -> None:
        self.training.forget()
        self._brought, self.training.run.steps = told, told["state"]["steps"]

    def _tell_of_intruders(self, what: str) -> None:
        """Tell of weights that others have changed, and make all of them sparse again."""
        if self._intruders.tell(what) and self.training.attached:
            with torch.no_grad():
                self.method.enforce()

    def _tell_of_no_step(self) -> None:
        if self._stage is Stage.TOLD:
            return
        self._stage = Stage.TOLD
        rank_zero_warn(
            f"{type(self).__name__} has seen no optimizer step in {self.books.unbooked} batches, so masks do not evolve and no "
            "cost is booked. Call `step` of the optimizer that Lightning hands out, not of the one inside it "
            "(`optimizer.optimizer`); or a loss scaler has skipped all steps."
        )

    def _mask_statistics(self) -> dict[str, Tensor]:
        return {
            "bame/density": statistics.nonzero_share(sparse.values for sparse in self.weights),
            "bame/survival": statistics.survival((sparse.kept, sparse.initial) for sparse in self.weights),
        }

    def _mean(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Metrics over all rows, where ranks hold different ones."""
        return self.ranks.mean(metrics, self.weights[0].kept.device) if self.weights else dict(metrics)


def _on_the_first(trainer: L.Trainer, function: Callable[[], Any]) -> Any:
    """Call a function in the first process; all of them return what it returned there."""
    return trainer.strategy.broadcast(function() if trainer.is_global_zero else None)
