"""The Lightning driver of all methods: hooks of a Trainer call verbs of sparse training."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, auto
from functools import partial
from operator import attrgetter
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from bame_lightning.bame.schedule import Schedule, Window
from bame_lightning.blocks.pattern import NMPattern
from bame_lightning.callbacks.averaging import Averages
from bame_lightning.callbacks.base import MethodCallback
from bame_lightning.callbacks.intruders import Intruders
from bame_lightning.callbacks.membership import Membership
from bame_lightning.callbacks.ranks import COMPARE_EVERY, Ranks, on_the_first
from bame_lightning.callbacks.records import state_of, summary_of
from bame_lightning.callbacks.refusals import (
    refuse_backward,
    refuse_local_gradients,
    refuse_strategy,
    refuse_unknown_masks,
    scales_loss,
)
from bame_lightning.callbacks.run_length import clip_writes, keep_pace, plan_windows, progress
from bame_lightning.callbacks.table import products_table
from bame_lightning.methods.execution import Compute
from bame_lightning.methods.holder import Holder
from bame_lightning.methods.method import Method, costs
from bame_lightning.methods.training import Init, SparseTraining
from bame_lightning.weights import invariants
from bame_lightning.weights.layers import SparseWeight
from bame_lightning.weights.mask_set import mask_statistics
from bame_lightning.weights.saved_state import check_version, saved_masks

ON_THE_BAR = ("bame/flip_rate", "flops/train_vs_dense")
"""Metrics that the progress bar shows."""
FEW = 4
"""Batches without a visible optimizer step, after which the user is told."""
_FORWARD = "a step was computed from weights that were not sparse, and they have been zeroed since"


class Stage(Enum):
    """How far a fit has come."""

    OUTSIDE = auto()
    """No fit is going on, or its masks are not made yet."""
    READY = auto()
    """Masks are made, or restored."""
    BROKEN = auto()
    """Training has ended with weights that are not sparse, and the user has been told."""


def shown(path: str, doc: str) -> Any:
    """Make a property that shows an attribute of a part of a callback."""
    return property(attrgetter(path), doc=doc)


class SparseCallback(MethodCallback):
    """Drive a method from the hooks of a Trainer, so that others only ever see N:M sparse weights.

    The model is never renamed, wrapped or extended: its state dict keeps the plain keys, with exact zeros where weights
    are pruned. Masks, and the evolving state of a method, are in this callback's own state.

    Args:
        pattern: "N:M" or an `NMPattern`.
        method: What happens in each step.
        layers: Rules that override the default choice of layers: module or parameter name, or a glob over such names ->
            a pattern or "dense". The last match wins.
        init: Which weights the masks keep at first: "magnitude" keeps the largest, "random" any, "nonzero" those that are
            not zero in weights that are N:M sparse already.
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
        """The report of a fit in a child process, until the next one."""
        super().__init__(pattern, layers)
        self._stage = Stage.OUTSIDE
        self.averages = Averages((), ())
        self.ranks = Ranks()
        self._intruders = Intruders(self.ranks, self.training)
        self.members = Membership(self)

    # What others ask.

    weights: list[SparseWeight] = shown("training.run.weights", "The sparse weights with their masks.")
    window: Window = shown("training.run.window", "When masks adapt, in optimizer steps.")
    schedule: Schedule | None = shown(
        "method.schedule", "When masks change, for methods that change them now and then."
    )
    init: Init = shown("training.init", "Which weights the masks keep at first.")
    rescale: bool = shown("method.rescale", "Whether kept weights are rescaled at the first gradient.")
    both_ways: bool = shown("method.both_ways", "Whether masks are 2:4 along the output dimension, too.")
    compute: Compute = shown("training.execution.compute", "How products of sparse layers are computed.")

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
        told: dict[str, Any] | None = self._brought and self._brought["summary"]
        return told or summary_of(self)

    # The state in a checkpoint.

    @override
    def state_dict(self) -> dict[str, Any]:
        if self.restored:
            return self.restored  # loaded, and not yet taken up
        self.come_home()
        told: dict[str, Any] | None = self._brought and self._brought["state"]
        return told or state_of(self)

    @override
    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        # Others may have written to weights since the last step, and a checkpoint shares their memory.
        if self.training.attached:
            self.method.enforce()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_version(state_dict, type(self).__name__)
        self.restored = state_dict if state_dict["layers"] else {}
        if not self.restored:
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
        here = {id(parameter) for parameter in pl_module.parameters()}
        if not any(id(sparse.weight) in here for sparse in self.weights):
            self.training.forget()

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.ckpt_path:
            plan_windows(trainer, self.method)  # first of all, since it may refuse, and nothing has been changed yet
        self._stage = Stage.OUTSIDE
        # Strategies that shard the model first load a checkpoint only after this hook.
        if not trainer.strategy.restore_checkpoint_after_setup:
            self._make_sparse(trainer, pl_module)

    @override
    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._stage is Stage.OUTSIDE:
            self._make_sparse(trainer, pl_module)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.ckpt_path:
            # Not earlier: to know the length of the run Lightning sets up the data loader, whose place is not restored yet.
            plan_windows(trainer, self.method)
        if self._stage is Stage.OUTSIDE or self.restored:
            self._make_sparse(trainer, pl_module)
        if trainer.ckpt_path and not self.steps:
            self.steps = trainer.global_step  # masks were rebuilt in the middle of a run
            self.training.follow([holder.optimizer for holder in self.training.run.holders])
        self._attach(trainer, pl_module)

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.restored:
            # Put back in the middle of training, as by a learning-rate finder.
            self._make_sparse(trainer, pl_module)
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
            self.members.settle(trainer, pl_module)
            return
        for holder in self.training.run.holders:
            holder.after_backward()
            self.method.after_backward(holder)

    @override
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        self.members.before_step(trainer, pl_module, optimizer)
        holder = self.training.holder_of(optimizer)
        if holder is not None:
            self._before_step(pl_module, holder)

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self.training.end_batch()
        self.members.settle(trainer, pl_module)
        if self.training.stray and self.books.unbooked >= FEW * trainer.accumulate_grad_batches:
            self._tell_of_no_step()
        self.averages.follow()
        if chosen := self.training.execution.news():
            rank_zero_info(f"{type(self).__name__} computes with compute={self.compute!r}:\n{products_table(chosen)}")
        if self.verify:
            self.method.check()
        if trainer._logger_connector.should_update_logs:
            masks = {**mask_statistics(self.weights), **self.method.metrics()} if self.weights else {}
            for name, value in self.ranks.mean({**masks, **self.books.metrics()}).items():
                pl_module.log(name, value, on_step=True, on_epoch=False, prog_bar=name in ON_THE_BAR)

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_validation_start(trainer, pl_module)
        self._intruders.tell(_FORWARD)
        if trainer.state.fn != "fit":
            self.on_test_start(trainer, pl_module)

    @override
    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if trainer.state.fn == "fit" and batch_idx == 0:
            self._intruders.look(self.weights)  # others may swap weights for validation, and back

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._intruders.tell("validation has judged a network that is not sparse")
        if trainer.state.fn != "fit":
            self.on_test_end(trainer, pl_module)

    @override
    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # As in training, by the masks of the last fit or of the checkpoint that was loaded.
        if self.restored:
            self.training.execution.load_state(self.restored.get("compute", {}))
        weights = saved_masks(self.restored["layers"], pl_module) if self.restored else self.weights
        self.training.execution.bind(pl_module, weights, watching=False)

    @override
    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.training.execution.release()

    on_predict_start, on_predict_end = on_test_start, on_test_end

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        if not scales_loss(trainer):  # which may skip all steps of an epoch
            self._tell_of_no_step()
        self._intruders.look(self.weights)
        self._intruders.tell(_FORWARD)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.training.detach()
        self._tell_of_no_step()
        self.ranks.compare(self.method.replicas(), self.steps, every=1)
        try:
            invariants.check_weights(self.weights, self.steps)
        except invariants.InvariantError as error:
            rank_zero_warn(f"The trained network is not sparse. {error}")
            self._stage = Stage.BROKEN

    @override
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._stage is Stage.READY and not self.ranks.sharded:
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

    def _make_sparse(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Make the weights sparse, or restore them."""
        loaded, self.restored, self._stage = self.restored, None, Stage.READY
        if loaded is None and trainer.ckpt_path and self.init != "nonzero":
            refuse_unknown_masks(trainer.ckpt_path, type(self).__name__, self.pattern)
        restored = loaded or None
        brought, self._brought = self._brought, None
        self.members.begin(trainer, pl_module, restored, brought)
        if restored:
            self.training.execution.load_state(restored.get("compute", {}))
        self.ranks = Ranks(trainer.world_size, self.weights)
        self._intruders = Intruders(self.ranks, self.training)
        self.training.run.everywhere, self.training.run.suspect = self.ranks.all, self._intruders.look
        self.method.start(restored)
        self.averages = Averages(trainer.callbacks, self.weights)  # type: ignore[attr-defined]
        self.open_books({s.name: s.pattern.density for s in self.weights}, restored, self.method.cost)
        self.members.report(trainer)

    def _attach(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Watch the steps of the optimizers: after an update no hook of Lightning comes before others see the weights."""
        self.training.run.clips = clip_writes(trainer)
        self.training.before_inner = partial(self._before_step, pl_module)
        self.training.on_step = partial(self._after_step, trainer)
        # The optimizers' state may come from a checkpoint of dense training.
        self.method.enforce()
        self.training.execution.on_the_first = partial(on_the_first, trainer)
        self.training.execution.bind(pl_module, self.weights)
        for holder in self.training.run.holders:
            keep_pace(trainer, self.method, holder)
        self.training.attach()

    def _before_step(self, pl_module: L.LightningModule, holder: Holder) -> None:
        if not pl_module.automatic_optimization:
            refuse_backward(holder, type(self).__name__)
        self.training.before_step(holder.optimizer, whole=pl_module.automatic_optimization)

    def _after_step(self, trainer: L.Trainer, holder: Holder) -> None:
        """Book a step, and compare what ranks hold."""
        run, moved = self.training.run, costs(self.method, holder)
        self.books.book_step(run, holder, moved, self.training.execution.shares(moved), self.ranks.count)
        self.ranks.compare(self.method.replicas(), run.steps, every=1 if run.verify else COMPARE_EVERY)
        if not trainer.lightning_module.automatic_optimization:
            holder.pace.follow(holder.steps - 1, progress(trainer))
            keep_pace(trainer, self.method, holder)

    def _tell_of_no_step(self) -> None:
        if self.books.unbooked and not self.steps:
            self.books.warn_of_no_step(type(self).__name__)

    @override
    def take_home(self, told: dict[str, Any]) -> None:
        self.training.forget()
        self._brought, self.training.run.steps = told, told["state"]["steps"]
