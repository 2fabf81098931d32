"""The Lightning glue that every method shares: masks, their enforcement, their state."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from bame_lightning.bame.schedule import Schedule, Window
from bame_lightning.blocks import statistics
from bame_lightning.blocks.layout import oriented, to_blocks
from bame_lightning.blocks.masks import nonzero_mask, random_mask, top_n_mask, unpack_mask
from bame_lightning.blocks.pattern import NMPattern
from bame_lightning.callbacks.averaging import Averages
from bame_lightning.callbacks.bookkeeping import Bookkeeper, KeepsBooks
from bame_lightning.callbacks.following import Followed, find_holders
from bame_lightning.callbacks.home import Home
from bame_lightning.callbacks.intruders import Intruders
from bame_lightning.callbacks.loggers import record_config
from bame_lightning.callbacks.membership import Membership
from bame_lightning.callbacks.ranks import COMPARE_EVERY, Copy, Ranks, refuse_strategy, restores_late
from bame_lightning.callbacks.run_length import progress, window_at_pace
from bame_lightning.callbacks.table import layer_table
from bame_lightning.ledger.flops import Shares
from bame_lightning.weights import invariants
from bame_lightning.weights.layers import STATE_VERSION, VERSION_KEY, LayerPlan, SparseWeight

Init = Literal["magnitude", "random", "nonzero"]


@runtime_checkable
class _OfAWeight(Protocol):
    sparse: SparseWeight


_Evolving = TypeVar("_Evolving", bound=_OfAWeight)

ON_THE_BAR = ("bame/flip_rate", "flops/train_vs_dense")
"""Metrics that the progress bar shows."""
FEW = 4
"""Batches with optimizer steps that Lightning does not see, after which the user is told."""
_FORWARD = "a step was computed from weights that were not sparse, and the next update has zeroed them"


class SparseCallback(KeepsBooks):
    """Train weights that are N:M sparse whenever anybody looks: the base of all methods.

    The model is never renamed, wrapped or added to: its state dict keeps the plain keys, with exact zeros where weights
    are pruned. Masks, and what a method evolves, live in this callback's own state. This class chooses the layers, makes or
    restores masks, counts optimizer steps, and calls a method at the right moments of each step.

    Args:
        pattern: "N:M" or an `NMPattern`.
        layers: Rules that override the default choice of layers: module or parameter name, or a glob over such names ->
            a pattern or "dense". The last match wins.
        init: Which weights the masks keep at first: of the largest "magnitude", at "random", or the "nonzero" ones of
            weights that are N:M sparse already.
        rescale: At a layer's first gradient, multiply what is kept by sqrt(M / N), unless a batch norm makes the scale
            irrelevant (`scale.alignment`). Right from scratch, wrong for a trained network.
        verify: Check all invariants after every step (slow, for debugging).

    Raises:
        ValueError: If an argument is malformed.
    """

    schedule: Schedule | None = None
    """When masks change, for methods that change them now and then."""
    transposable = False
    """Whether masks are N:M along the output dimension, too."""

    def __init__(
        self,
        pattern: str | NMPattern,
        *,
        layers: Mapping[str, str | NMPattern] | None = None,
        init: Init = "magnitude",
        rescale: bool = True,
        verify: bool = False,
    ) -> None:
        if init not in ("magnitude", "random", "nonzero"):
            raise ValueError(f"`init` must be 'magnitude', 'random' or 'nonzero'; got {init!r}.")
        self._steps = 0
        self._home = Home()
        self._brought: dict[str, Any] | None = None
        super().__init__(pattern, layers)
        self.init = init
        self.rescale = rescale
        self.verify = verify
        self.weights: list[SparseWeight] = []
        self._followed: list[Followed] = []
        self._now: Followed | None = None
        self._optimizers: list[Optimizer] = []
        self._following = False
        self._window = Window(0, 0, 1)
        self._averages = Averages((), ())
        self._restored: dict[str, Any] | None = None
        self._rescaling: set[str] = set()
        self._blank = False
        self._ranks = Ranks()
        self._intruders = Intruders(self._ranks)
        self._started = self._sound = self._raw = self._told = False
        self._members = Membership(self)

    # What a method implements, in the order in which it is called.

    def plan(self, trainer: L.Trainer) -> None:
        """Resolve a schedule against the length of the run, or refuse it."""

    @abstractmethod
    def start(self, restored: Mapping[str, Any] | None) -> None:
        """Make the weights sparse; prepare what evolves, or restore it from what `state_dict` returned."""

    def regroup(self) -> None:
        """Follow a change of `weights`: drop what evolved in those that left, begin with those that joined, still dense."""

    def save(self, state: dict[str, Any]) -> None:
        """Add what evolves to the state that a checkpoint holds."""

    def forget(self) -> None:
        """Forget the weights, and what evolves in them."""
        for followed in self._followed:
            followed.detach()
        self.weights, self.steps, self._followed = [], 0, []

    @abstractmethod
    def enforce(self, optimizer: Optimizer) -> None:
        """Make weights and state of an optimizer fit the masks; state may come from a checkpoint of dense training."""

    def handle_gradients(self) -> None:
        """Change gradients once they are whole and before they are clipped (automatic optimization)."""

    def before_backward(self) -> None:
        """Prepare for one of a step's backward passes (manual optimization)."""

    def after_backward(self) -> None:
        """Change gradients, which further backward passes may add to and users may clip (manual optimization)."""

    def mask_gradients(self) -> None:
        """Zero gradients where weights are pruned; under manual optimization users may have written them last."""

    def before_update(self) -> None:
        """Prepare for the optimizer's update."""

    @abstractmethod
    def after_update(self, optimizer: Optimizer) -> None:
        """Make the weights sparse again, and evolve; not called for a step that a loss scaler skips."""

    def after_batch(self) -> None:
        """Make sure that the weights are sparse, although an update may have been skipped."""

    @abstractmethod
    def check(self) -> None:
        """Check the invariants that hold between two updates; called only with `verify`."""

    @abstractmethod
    def shares(self) -> dict[str, Shares]:
        """Share of the dense cost of each weight that the last step has moved, by name."""

    def method_statistics(self) -> dict[str, Tensor]:
        """Metrics of the method, on the weights' device; of one's own rows where weights are sharded."""
        return {}

    def copies(self) -> Iterator[Copy]:
        """What every rank must hold the same of, in the same order on all."""
        for sparse in self.weights:
            if sparse.rows.whole:
                yield Copy("mask", sparse.label, sparse.kept)
                yield Copy("weight", sparse.label, sparse.values)

    @property
    def steps(self) -> int:
        """Optimizer steps so far, of all optimizers that hold sparse weights."""
        self._come_home()
        return self._steps

    @steps.setter
    def steps(self, steps: int) -> None:
        self._steps = steps

    def _take_up_brought(self, pl_module: L.LightningModule) -> None:
        """Go on under the masks of a fit that ran in a child process, where the model still fits them."""
        brought, self._brought = self._brought, None
        if brought is None:
            return
        layers, parameters = brought["state"]["layers"], dict(pl_module.named_parameters())
        for name, layer in layers.items():
            weight = parameters.get(name)
            if weight is not None and list(weight.shape) == list(layer["shape"]):
                plan = LayerPlan(name, "", weight, NMPattern.parse(layer["pattern"]), "", layer["transposed"])
                self.weights += _restore_masks({name: layer}, [plan], type(self).__name__)

    def _come_home(self) -> None:
        """Take up what a child process has learned in a fit that ran there."""
        told = self._home.fetch()
        if told is not None:
            self.forget()
            self._brought, self._steps = told, told["state"]["steps"]

    # What a method may ask: several optimizers may hold sparse weights, each with steps of its own.

    @property
    def now(self) -> Followed:
        """The optimizer whose step is going on, or whose gradients are looked at, with the sparse weights that it holds."""
        assert self._now is not None
        return self._now

    @property
    def window(self) -> Window:
        """The window of mask evolution, in steps of that optimizer."""
        return self.now.window or self._window

    def held(self, optimizer: Optimizer) -> list[SparseWeight]:
        """The sparse weights that an optimizer holds."""
        return [sparse for f in self._followed if f.optimizer is optimizer for sparse in f.weights]

    def moving(self, found: Sequence[_Evolving]) -> list[_Evolving]:
        """Of what a method keeps beside its weights, that of the weights which that optimizer holds."""
        here = {id(sparse) for sparse in self.now.weights}
        return [evolving for evolving in found if id(evolving.sparse) in here]

    # Lightning's hooks, in the order in which they are called.

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        self._come_home()
        refuse_strategy(trainer)
        self._home.leave(trainer.strategy)
        # Left by a fit that failed, or by a test of another checkpoint; this fit's own is loaded later.
        self._restored, self._blank = None, False
        here = {id(parameter) for parameter in pl_module.parameters()}
        if not any(id(sparse.weight) in here for sparse in self.weights):
            self.forget()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        version = state_dict.get(VERSION_KEY)
        if version != STATE_VERSION:
            raise ValueError(
                f"The checkpoint's {type(self).__name__} state has version {version!r}, this release reads {STATE_VERSION}."
                " Resume with the release that wrote it, or load the weights and start with `init='nonzero'`."
            )
        if state_dict["layers"]:
            self._restored = state_dict
        else:
            # Saved before a first fit, as by a learning-rate finder that puts everything back: start anew.
            self._restored, self._blank = None, True
            self.forget()

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.ckpt_path:
            self.plan(trainer)  # first of all, since it may refuse, and nothing has been changed yet
        self._started = self._sound = self._raw = self._told = False
        if not restores_late(trainer):
            self._start(trainer, pl_module)

    @override
    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._started:
            self._start(trainer, pl_module)

    def _start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._started = True
        restored, self._restored = self._restored, None
        blank, self._blank = self._blank, False
        if restored is None and not blank and trainer.ckpt_path and self.init != "nonzero":
            raise ValueError(
                f"The checkpoint `ckpt_path` = {trainer.ckpt_path} holds no state of {type(self).__name__}, so its masks are "
                f"unknown. If its weights are {self.pattern} sparse, resume with {type(self).__name__}(..., init='nonzero') to "
                "rebuild the masks from their zeros; otherwise load the weights and start a new run."
            )
        self._members.begin(restored)
        # A second fit of the same model keeps the masks it has: a revived weight may be zero, and prune itself otherwise.
        # Unless somebody has loaded other weights since.
        self._take_up_brought(pl_module)
        known = [sparse for sparse in self.weights if sparse.obeys] if not restored else []
        saved = restored["layers"] if restored else {}
        masked = [id(weight) for name, weight in pl_module.named_parameters(remove_duplicate=False) if name in saved]
        plans = self._members.plan(trainer, pl_module, masked)
        holders = find_holders(trainer, pl_module, {id(plan.weight) for plan in plans if plan.pattern})
        if restored:
            self._rescaling = set(restored["rescaling"])
            self.weights = _restore_masks(restored["layers"], plans, type(self).__name__)
            self.steps = int(restored["steps"])
        else:
            self.weights = self._make_masks(plans, known)
            self.steps = self.steps if trainer.global_step else 0
        self._members.try_masks(known, restored)
        self._ranks = Ranks(trainer.world_size, self.weights)
        self._intruders = Intruders(self._ranks)
        clocks = restored.get("clocks", []) if restored else [followed.clock() for followed in self._followed]
        self._follow(trainer, holders, clocks if self.steps else [])
        self.start(restored)
        self._averages = Averages(trainer.callbacks, self.weights)  # type: ignore[attr-defined]
        # What a step costs is counted anew: layers may have been unfrozen, and batches changed.
        booked = restored.get("flops") if restored else self.books.state_dict() if self.steps else None
        densities = {sparse.name: sparse.pattern.density for sparse in self.weights}
        self.books = Bookkeeper(densities, transposable=self.transposable, restored=booked)
        rank_zero_info(f"{type(self).__name__}({self.pattern})\n{layer_table(plans)}")
        if trainer.is_global_zero:
            record_config(trainer.loggers, type(self).__name__, str(self.pattern), plans)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.ckpt_path:
            # Not earlier: to tell the length of the run, Lightning sets up the data loader, whose place is not restored yet.
            self.plan(trainer)
        if not self._started or self._restored:
            self._start(trainer, pl_module)
        if trainer.ckpt_path and not self.steps:
            self.steps = trainer.global_step  # masks were rebuilt in the middle of a run
            self._follow(trainer, [followed.optimizer for followed in self._followed], [])
        self._attach(trainer, pl_module)

    def _follow(self, trainer: L.Trainer, holders: Sequence[Optimizer], clocks: Sequence[Mapping[str, Any]]) -> None:
        """Give each optimizer that holds sparse weights a clock, which goes on from those given."""
        for followed in self._followed:
            followed.detach()
        self._optimizers = list(trainer.optimizers)
        self._followed = [Followed(optimizer, self.weights) for optimizer in holders]
        for followed in self._followed:
            followed.steps = self.steps // len(self._followed)  # unless a clock tells
            followed.take_over(clocks)
        self._now = next(iter(self._followed), None)

    def refollow(self, trainer: L.Trainer) -> None:
        """Follow the optimizers that hold the weights now: other weights may be sparse, or others may hold them."""
        module = trainer.lightning_module
        clocks, known = [f.clock() for f in self._followed], {id(f.optimizer): f for f in self._followed}
        # Steps are booked even if nothing is sparse any more.
        holders = [f.optimizer for f in self._followed]
        if self.weights:
            holders = find_holders(trainer, module, {id(sparse.weight) for sparse in self.weights})
        for followed in self._followed:
            if all(followed.optimizer is not optimizer for optimizer in holders):
                followed.detach()
        self._optimizers, self._followed = list(trainer.optimizers), []
        for optimizer in holders:
            followed = known.get(id(optimizer)) or Followed(optimizer, self.weights)
            self._followed.append(followed)
            followed.hold(self.weights)
            if id(optimizer) not in known:
                followed.take_over(clocks)
                if self._following:
                    self._attach_one(trainer, module, followed)
        self._now = next((f for f in self._followed if f is self._now), next(iter(self._followed), None))

    def _attach(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """See the steps of the optimizers that hold the weights."""
        self._following = True
        for followed in self._followed:
            self._attach_one(trainer, pl_module, followed)

    def _attach_one(self, trainer: L.Trainer, pl_module: L.LightningModule, followed: Followed) -> None:
        def before_inner(followed: Followed) -> None:
            self._before_step(pl_module, followed)

        self._now = followed
        self.enforce(followed.optimizer)
        # No hook of Lightning follows the update before validation and checkpoints see the weights.
        followed.attach(before_inner, functools.partial(self._after_any_step, trainer, pl_module, followed))
        self._keep_pace(trainer, pl_module, followed)

    def _after_any_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, followed: Followed, optimizer: Optimizer, *call: Any
    ) -> None:
        before = followed.steps
        self._after_step(optimizer, *call)
        if followed.steps > before and not pl_module.automatic_optimization:
            followed.pace.follow(before, progress(trainer))
            self._keep_pace(trainer, pl_module, followed)

    def _keep_pace(self, trainer: L.Trainer, pl_module: L.LightningModule, followed: Followed) -> None:
        # Under automatic optimization the Trainer knows how many steps there will be.
        if self.schedule is not None and not pl_module.automatic_optimization:
            followed.window = window_at_pace(trainer, self.schedule, followed.pace)

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._restored:
            # Put back in the middle of training, as by a learning-rate finder.
            self._start(trainer, pl_module)
            self._attach(trainer, pl_module)
        for followed in self._followed:
            followed.start_batch()
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    @override
    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        super().on_before_backward(trainer, pl_module, loss)
        if not pl_module.automatic_optimization:
            self._refuse_local_gradients(trainer)
            for followed in self._followed:
                self._now = followed
                self.before_backward()
                followed.before_backward()

    @override
    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Under manual optimization users clip before `on_before_optimizer_step`, so this is the last moment. Under
        # automatic optimization gradients may still be scaled here, or local to a rank.
        if not pl_module.automatic_optimization:
            for followed in self._followed:
                self._now = followed
                followed.after_backward()
                self.after_backward()
        else:
            self._members.settle(trainer, pl_module)

    @override
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        self._members.settle(trainer, pl_module, optimizer)
        self._members.join(trainer, pl_module, optimizer)
        if self._optimizers != list(trainer.optimizers):
            self.refollow(trainer)  # somebody has made new optimizers in the middle of training
        for followed in self._followed:
            if optimizer is followed.optimizer:
                self._before_step(pl_module, followed)

    def _before_step(self, pl_module: L.LightningModule, followed: Followed) -> None:
        self._now = followed
        self._intruders.look(followed.weights)
        if self.verify:
            self.check()
        if pl_module.automatic_optimization:
            self.handle_gradients()
        else:
            self._check_backward(followed)
            self.mask_gradients()
        self.before_update()
        followed.stepping = True

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        followed = next((followed for followed in self._followed if followed.optimizer is optimizer), None)
        if followed is None:
            return  # nothing that it holds is sparse any more
        self._now = followed
        if not followed.stepping:
            self._raw = True  # it comes from nowhere
            self.enforce(optimizer)
            return
        followed.stepping = followed.backward = False
        self.after_update(optimizer)
        self._intruders.trust(followed.weights)
        followed.steps += 1
        self.steps += 1
        self._book(followed)
        self._compare(every=1 if self.verify else COMPARE_EVERY)

    def _book(self, followed: Followed) -> None:
        """Book a step: of the network, or of the layers that the optimizer holds where several hold sparse ones."""
        if len(self._followed) == 1:
            self.books.book(self.shares(), self._ranks.count)
        else:
            sparse = {weight.name for weight in self.weights}
            self.books.book_part(self.shares(), self._ranks.count, followed.batches, sparse)
        followed.batches = 0

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self.after_batch()
        self._members.settle(trainer, pl_module)
        if (
            self._raw
            and not self.steps
            and not self._told
            and self.books.unbooked >= FEW * trainer.accumulate_grad_batches
        ):
            self._tell_of_no_step()
        self._averages.follow()
        if self.verify:
            self.check()
        if trainer._logger_connector.should_update_logs:
            masks = {**self._mask_statistics(), **self.method_statistics()} if self.weights else {}
            metrics = self._mean({**masks, **self.books.metrics()})
            for name, value in metrics.items():
                pl_module.log(name, value, on_step=True, on_epoch=False, prog_bar=name in ON_THE_BAR)

    def _tell_of_no_step(self) -> None:
        self._told = True
        rank_zero_warn(
            f"{type(self).__name__} has seen no optimizer step in {self.books.unbooked} batches, so masks do not evolve and no "
            "cost is booked. Call `step` of the optimizer that Lightning hands out, not of the one inside it "
            "(`optimizer.optimizer`); or a loss scaler has skipped all steps."
        )

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_validation_start(trainer, pl_module)
        self._intruders.tell(_FORWARD)

    @override
    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if trainer.state.fn == "fit" and batch_idx == 0:
            self._intruders.look(self.weights)  # others may swap weights for validation, and back

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._intruders.tell("validation has judged a network that is not sparse")

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        self._intruders.tell(_FORWARD)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._remove_hooks()
        if self.books.unbooked and not self.steps and not self._told:
            self._tell_of_no_step()
        self._compare(every=1)
        try:
            invariants.check_weights(self.weights, self.steps)
        except invariants.InvariantError as error:
            rank_zero_warn(f"The trained network is not sparse. {error}")
        else:
            self._sound = True

    @override
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._sound and not self._ranks.sharded:
            # Callbacks that come later may have changed the weights when training ended.
            self._intruders.look(self.weights)
            self._intruders.tell("the trained network is not sparse")
        if self.weights:
            self._home.send({"state": self.state_dict(), "summary": self.summary()}, first=trainer.is_global_zero)

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self.after_batch()
        self._remove_hooks()

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._restored:
            return self._restored  # loaded, and not yet taken up
        self._come_home()
        if self._brought is not None:
            state: dict[str, Any] = self._brought["state"]
            return state
        state = {
            VERSION_KEY: STATE_VERSION,
            "steps": self.steps,
            "clocks": [followed.clock() for followed in self._followed],
            "layers": {sparse.name: sparse.state_dict() for sparse in self.weights},
            "rescaling": sorted(self._rescaling),
            **self._members.state_dict(),
            "flops": {name: float(booked) for name, booked in self._mean(self.books.state_dict()).items()},
        }
        self.save(state)
        return state

    def summary(self) -> dict[str, Any]:
        """What the run did, in plain types.

        Returns:
            Pattern, pattern by layer, share of non-zeros, survival of the initial masks, optimizer steps, training FLOPs
            (counted, not executed).

        Raises:
            RuntimeError: Before the first fit.
        """
        self._come_home()
        if self._brought is not None:
            summary: dict[str, Any] = self._brought["summary"]
            return summary
        if not self.weights and not self.steps:
            raise RuntimeError(f"{type(self).__name__} has not been fitted, so there is nothing to sum up.")
        return self._summary()

    def _summary(self) -> dict[str, Any]:
        """What `summary` returns, of the fit that ended here; a method adds what it counts."""
        masks = self._mean(self._mask_statistics()) if self.weights else {"bame/density": 1.0, "bame/survival": 1.0}
        return {
            "pattern": str(self.pattern),
            "layers": {sparse.label: str(sparse.pattern) for sparse in self.weights},
            "density": float(masks["bame/density"]),
            "survival": float(masks["bame/survival"]),
            "steps": self.steps,
            "flops": {name: float(value) for name, value in self._mean(self.books.metrics()).items()},
        }

    def _mask_statistics(self) -> dict[str, Tensor]:
        return {
            "bame/density": statistics.nonzero_share(sparse.values for sparse in self.weights),
            "bame/survival": statistics.survival((sparse.kept, sparse.initial) for sparse in self.weights),
        }

    def _mean(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Metrics over all rows, where ranks hold different ones."""
        return self._ranks.mean(metrics, self.weights[0].kept.device) if self.weights else dict(metrics)

    def _compare(self, every: int) -> None:
        self._ranks.compare(self.copies(), self.steps, every=every)

    def _make_masks(self, plans: list[LayerPlan], keep: Iterable[SparseWeight] = ()) -> list[SparseWeight]:
        known = {id(sparse.weight): sparse for sparse in keep}
        make = {
            "magnitude": lambda blocks, n: top_n_mask(blocks.abs(), n),
            "random": random_mask,
            "nonzero": nonzero_mask,
        }
        fresh = {}
        for plan in plans:
            if plan.pattern and id(plan.weight) not in known:
                # Of all rows, wherever they lie: the mask is that of a single process.
                blocks = to_blocks(plan.rows.gather(plan.values), plan.pattern.m)
                try:
                    fresh[plan.name] = SparseWeight.of(plan, make[self.init](blocks, plan.pattern.n))
                except ValueError as error:
                    label = plan.name.removesuffix(".weight")
                    raise ValueError(f"`{label}`: {error} Or keep it dense: layers={{'{label}': 'dense'}}.") from None
        if self.rescale and self.init != "nonzero":  # those were trained already
            self._rescaling |= fresh.keys()
        return [fresh.get(plan.name) or known[id(plan.weight)] for plan in plans if plan.pattern]

    def _refuse_local_gradients(self, trainer: L.Trainer) -> None:
        # What DistributedDataParallel's `no_sync` switches off.
        if not getattr(trainer.strategy.model, "require_backward_grad_sync", True):
            raise ValueError(
                "`manual_backward` under `no_sync` of DDP makes gradients of this rank only, and masks that follow them would "
                "differ between ranks. Let every backward pass synchronise, or accumulate by automatic optimization with "
                "`accumulate_grad_batches`."
            )

    def _check_backward(self, followed: Followed) -> None:
        if not followed.backward and any(sparse.weight.grad is not None for sparse in followed.weights):
            raise RuntimeError(
                "`training_step` steps the optimizer of sparse weights on gradients that no `self.manual_backward` has made, "
                f"so {type(self).__name__} could not see them before they are clipped. Call `self.manual_backward(loss)` "
                "where it calls `loss.backward()` or writes gradients."
            )

    def _remove_hooks(self) -> None:
        for followed in self._followed:
            followed.detach()
        self._following = False


def _restore_masks(saved: Mapping[str, Any], plans: list[LayerPlan], method: str) -> list[SparseWeight]:
    """Build masks from a checkpoint's state, or say which layers do not fit."""
    wanted = {
        plan.name: (str(plan.pattern), list(plan.weight.shape), plan.transposed) for plan in plans if plan.pattern
    }
    # States of earlier releases do not know transposed weights.
    found = {
        name: (layer["pattern"], list(layer["shape"]), layer.get("transposed", False)) for name, layer in saved.items()
    }
    differing = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if differing:
        name = differing[0]
        raise ValueError(
            f"The masks of {method} in the checkpoint do not fit this model: {len(differing)} layers differ, the first is "
            f"`{name}`, which is {_describe(found.get(name))} in the checkpoint and {_describe(wanted.get(name))} here. Resume "
            "with the model, `pattern` and `layers` that wrote it, or load the weights and start a new run."
        )
    masks = []
    for plan in plans:
        if plan.pattern:
            mask, initial = (
                oriented(unpack_mask(saved[plan.name][key].to(plan.weight.device), plan.weight.shape), plan.transposed)
                for key in ("mask", "initial")
            )
            sparse = SparseWeight.of(plan, to_blocks(mask, plan.pattern.m))
            sparse.set_initial(sparse.rows.own(initial))
            masks.append(sparse)
    return masks


def _describe(layer: tuple[str, list[int], bool] | None) -> str:
    if layer is None:
        return "not sparse"
    pattern, shape, transposed = layer
    return f"{pattern} of shape {tuple(shape)}{' (in, out)' * transposed}"
