"""Which weights are under masks: the first backward pass decides; weights that are trained later join later."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from bame_lightning.callbacks.averaging import Averages
from bame_lightning.callbacks.extra_logs import record_config
from bame_lightning.callbacks.refusals import find_holders, refuse_replaced
from bame_lightning.callbacks.table import layer_table
from bame_lightning.weights.layers import LayerPlan, SparseWeight, plan_layers
from bame_lightning.weights.nested_optimizers import held_by
from bame_lightning.weights.reasons import CLASSIFIER, COMPUTED, UNHELD, UNREACHED, advice
from bame_lightning.weights.saved_state import restore_masks, saved_masks
from bame_lightning.weights.sharding import reshard

if TYPE_CHECKING:
    from bame_lightning.callbacks.driver import SparseCallback


class Membership:
    """Decide which weights a method keeps sparse, from what training shows.

    Masks are made at the start, so that training is sparse from its first step. But at the start nobody knows which weights
    the loss reaches: an optimizer may hold a teacher under `no_grad`, or an average of the model. Nor is it known whether a
    layer multiplies its parameter itself. So masks are on trial, and the dense values are kept, until the first backward pass
    has shown both. Where a weight is not trained, or not multiplied itself, they are put back bit for bit. A weight may be
    trained only later, because it is unfrozen, handed to an optimizer, or reached by the loss for the first time. It is pruned
    just before its first update.

    Args:
        callback: The callback that holds these weights.
    """

    def __init__(self, callback: SparseCallback) -> None:
        self._callback = callback
        self._plans: list[LayerPlan] = []
        self._found: dict[str, str] = {}
        self._open: list[LayerPlan] = []
        self._trial: dict[SparseWeight, Tensor] = {}
        self._held: set[int] = set()
        self._optimizers: list[Optimizer] = []

    def plan(self, trainer: L.Trainer, pl_module: L.LightningModule, masked: Iterable[int]) -> list[LayerPlan]:
        """Decide for all layers by what is known now.

        Args:
            trainer: Its optimizers hold the weights that may be trained.
            pl_module: The model.
            masked: `id`s of the weights whose masks are not on trial.
        """
        reshard(pl_module)
        self._held = held = held_by(*trainer.optimizers)
        callback = self._callback
        self._plans = plan_layers(
            pl_module, callback.pattern, callback.rules, held, found=self._found, masked=set(masked)
        )
        return self._plans

    def begin(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        restored: Mapping[str, Any] | None,
        brought: Mapping[str, Any] | None,
    ) -> None:
        """Put weights under masks, on trial unless they are restored; the weights stay dense for now.

        Args:
            trainer: The Trainer.
            pl_module: The model.
            restored: The state of a checkpoint, if there is one. Otherwise a second fit of the same model keeps its masks.
            brought: What a fit in a child process has reported.
        """
        run, method = self._callback.training.run, type(self._callback).__name__
        weights = [*run.weights, *(saved_masks(brought["state"]["layers"], pl_module) if brought else ())]
        # A revived weight may be zero, and prune itself otherwise. Unless somebody has loaded other weights since.
        known = [sparse for sparse in weights if sparse.obeys] if not restored else []
        run.weights = weights
        saved, trial = (restored["layers"], restored.get("trial", {})) if restored else ({}, {})
        masked = [id(weight) for name, weight in pl_module.named_parameters(remove_duplicate=False) if name in saved]
        self._found = dict(restored.get("dense", {})) if restored else {}
        self.plan(trainer, pl_module, masked)
        if restored:
            run.weights, run.steps = restore_masks(saved, self._plans, method), int(restored["steps"])
            self._callback.method.rescaling = set(restored["rescaling"])
            self._trial = {s: s.rows.own(trial[s.name].to(s.values)) for s in run.weights if s.name in trial}
        else:
            run.weights = self._callback.training.make_masks(self._plans, known)
            run.steps = run.steps if trainer.global_step else 0
            fresh = {sparse: sparse.values.clone() for sparse in run.weights if sparse not in known}
            self._trial = {sparse: dense for sparse, dense in self._trial.items() if sparse in run.weights} | fresh
        clocks = restored.get("clocks", []) if restored else [holder.clock() for holder in run.holders]
        holders = find_holders(trainer, pl_module, {id(sparse.weight) for sparse in run.weights})
        self._callback.training.follow(holders, clocks if run.steps else [])
        self._optimizers = list(trainer.optimizers)
        # It matters of dense weights, too, whether they are trained: one of them may be taken for the classifier.
        self._open = [] if restored and not trial else [plan for plan in self._plans if not plan.untrained]

    def settle(
        self, trainer: L.Trainer, pl_module: L.LightningModule, stepping: Optimizer | None = None, *, last: bool = False
    ) -> None:
        """Decide about the masks on trial by the gradients; waits for the device once, then costs nothing.

        Args:
            trainer: The Trainer.
            pl_module: The model.
            stepping: The optimizer that is about to step; others wait until a gradient reaches some weight of theirs.
            last: Whether to decide now even about weights without a gradient.
        """
        if not self._open:
            return
        verdicts = self._verdicts(trainer.optimizers, stepping, last)
        self._found |= {plan.name: why for plan, why in verdicts if why}
        judged = {plan.name for plan, _ in verdicts}
        self._open = [plan for plan in self._open if plan.name not in judged]
        if any(why for _, why in verdicts):
            settled = {id(sparse.weight) for sparse in self._callback.weights if sparse not in self._trial}
            wanted = {id(plan.weight) for plan in self.plan(trainer, pl_module, settled) if plan.pattern}
            self._leave(trainer, [sparse for sparse in self._trial if id(sparse.weight) not in wanted])
        if not self._open:
            # It stays the classifier, whatever joins behind it.
            self._found |= {plan.name: CLASSIFIER for plan in self._plans if plan.reason == CLASSIFIER}
        waiting = {id(plan.weight) for plan in self._open}
        self._trial = {sparse: dense for sparse, dense in self._trial.items() if id(sparse.weight) in waiting}

    def before_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Call before each step of an optimizer: decide about masks on trial, and follow what training has changed."""
        self.settle(trainer, pl_module, optimizer)
        self._join(trainer, pl_module, optimizer)
        if self._optimizers != list(trainer.optimizers):
            refuse_replaced(trainer, optimizer)
            self._refollow(trainer)  # new optimizers were made in the middle of training

    def _join(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Put weights under masks that an optimizer is about to train for the first time."""
        if self._held != held_by(*trainer.optimizers):
            self._replan(trainer, pl_module)
        settled = {id(sparse.weight) for sparse in self._callback.weights}
        outside = [plan for plan in self._plans if plan.untrained or (plan.pattern and id(plan.weight) not in settled)]
        reached = [plan for plan in outside if plan.weight.requires_grad and plan.weight.grad is not None]
        mine = held_by(optimizer) if reached else set()
        late = {id(plan.weight): plan for plan in reached if id(plan.weight) in mine}
        if not late:
            return
        for plan in late.values():
            self._found.pop(plan.name, None)
        plans = self.plan(trainer, pl_module, settled)
        fresh = self._callback.training.make_masks([plan for plan in plans if id(plan.weight) in late])
        if fresh:
            self._trial |= {sparse: sparse.values.clone() for sparse in fresh}
            self._open += [plan for plan in plans if id(plan.weight) in late]
            order = {plan.name: place for place, plan in enumerate(plans)}
            self._regroup(trainer, sorted([*self._callback.weights, *fresh], key=lambda sparse: order[sparse.name]))
            self._callback.method.enforce()
            self._warn(late, fresh)
            self.report(trainer, f": {len(fresh)} weights have joined.")

    def _replan(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Follow a change of the parameters that optimizers hold, perhaps because layers were replaced."""
        weights = self._callback.weights
        here = {id(plan.weight) for plan in self.plan(trainer, pl_module, {id(sparse.weight) for sparse in weights})}
        staying = [sparse for sparse in weights if id(sparse.weight) in here]
        if len(staying) < len(weights):
            self._trial = {sparse: dense for sparse, dense in self._trial.items() if sparse in staying}
            self._open = [plan for plan in self._open if id(plan.weight) in here]
            self._regroup(trainer, staying)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs beside the masks: why weights are not sparse, and dense values of masks on trial."""
        shown = {plan.name: plan.reason for plan in self._plans if plan.untrained or plan.name in self._found}
        trial = {sparse.name: sparse.rows.gather(dense).cpu().clone() for sparse, dense in self._trial.items()}
        # A weight that was not trained joins when it is, whatever the reason was.
        return {
            "dense": {name: why if why in (COMPUTED, CLASSIFIER) else UNREACHED for name, why in shown.items()},
            "trial": trial,
        }

    def _verdicts(
        self, optimizers: list[Optimizer], stepping: Optimizer | None, last: bool
    ) -> list[tuple[LayerPlan, str]]:
        """Say why a weight cannot be sparse, empty if it can; weights that are undecided are left out."""
        plans, computed = self._open, self._callback.books.computed
        params = [[p for group in each.param_groups for p in group["params"]] for each in optimizers]
        owner = {id(p): place for place, held in enumerate(params) for p in held}
        begun = [last or each is stepping for each in optimizers]
        begun = [sure or any(p.grad is not None for p in held) for sure, held in zip(begun, params, strict=True)]
        flags = [plan.weight.grad is not None for plan in plans] + [plan.name in computed for plan in plans] + begun
        # A weight that one process reaches counts as reached in all.
        found = iter(self._callback.ranks.any(torch.tensor(flags, device=plans[0].weight.device)).tolist())
        reached, computing, begun = ([next(found) for _ in group] for group in (plans, plans, optimizers))
        verdicts = []
        for plan, is_reached, is_computed in zip(plans, reached, computing, strict=True):
            place = owner.get(id(plan.weight))
            if is_reached:
                verdicts.append((plan, COMPUTED if is_computed else ""))
            elif place is None or begun[place]:
                verdicts.append((plan, UNREACHED))
        return verdicts

    @torch.no_grad()
    def _leave(self, trainer: L.Trainer, gone: list[SparseWeight]) -> None:
        callback = self._callback
        early = {id(sparse) for holder in callback.training.run.holders for sparse in holder.moved}
        written = [sparse.name for sparse in gone if id(sparse) in early and self._found.get(sparse.name) == UNREACHED]
        for sparse in gone:
            # Kept weights may have been averaged in the meantime.
            sparse.values.copy_(torch.where(sparse.kept, sparse.values, self._trial[sparse]))
            callback.averages.put_back(sparse, self._trial[sparse])
        self._regroup(trainer, [sparse for sparse in callback.weights if sparse not in gone])
        if gone:
            self.report(
                trainer, f": {len(gone)} weights that were pruned when fit started are as they were, bit for bit."
            )
        if written:
            more = f" (and {len(written) - 1} more)" if len(written) > 1 else ""
            rank_zero_warn(
                f"`{written[0]}`{more} was written to before the first backward pass has shown that it is not trained, so by "
                "values that were pruned. If it is an average, it is wrong until it has forgotten its start. Switch its "
                "gradients off (`requires_grad_(False)`), leave it out of the optimizer, or average in `on_train_batch_end`."
            )
        if not callback.weights:
            rank_zero_warn(
                f"{type(callback).__name__} keeps no layer sparse: the first batch has shown that none is both trained and "
                f"multiplied as it is, so training goes on dense. {advice(plan.reason for plan in self._plans)}"
            )

    def _regroup(self, trainer: L.Trainer, weights: list[SparseWeight]) -> None:
        """Go on with other sparse weights; the new ones among them are still dense."""
        callback = self._callback
        joined, idle = set(weights) - set(callback.weights), {plan.name for plan in self._plans if plan.untrained}
        callback.training.run.weights = weights
        self._refollow(trainer)
        callback.training.execution.bind(trainer.lightning_module, weights)
        callback.averages = Averages(trainer.callbacks, weights)  # type: ignore[attr-defined]
        callback.books.follow({s.name: s.pattern.density for s in weights}, idle, recount=bool(joined))

    def _refollow(self, trainer: L.Trainer) -> None:
        """Follow the optimizers that hold the sparse weights now; weights and optimizers may have changed."""
        training = self._callback.training
        # Steps are booked even if nothing is sparse any more.
        holders = [holder.optimizer for holder in training.run.holders]
        if training.run.weights:
            sparse = {id(weight.weight) for weight in training.run.weights}
            holders = find_holders(trainer, trainer.lightning_module, sparse)
        self._optimizers = list(trainer.optimizers)
        training.refollow(holders)
        self._callback.method.regroup()

    def report(self, trainer: L.Trainer, news: str = "") -> None:
        """Show the table of layers to the user, and enter it into the configuration of loggers."""
        callback = self._callback
        rank_zero_info(f"{type(callback).__name__}({callback.pattern}){news}\n{layer_table(self._plans)}")
        if trainer.is_global_zero:
            record_config(trainer.loggers, type(callback).__name__, str(callback.pattern), self._plans)

    def _warn(self, late: Mapping[int, LayerPlan], fresh: list[SparseWeight]) -> None:
        first, more = fresh[0], f" (and {len(fresh) - 1} more)" * (len(fresh) > 1)
        rank_zero_warn(
            f"`{first.name}`{more}, {late[id(first.weight)].reason or UNHELD} until now, is trained from optimizer step "
            f"{self._callback.steps + 1} on: it is pruned now, to {first.pattern}. To train it dense, say "
            f"layers={{'{first.label}': 'dense'}}; to have it sparse from the first step, train it from there."
        )
