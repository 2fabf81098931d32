"""Compare the loss reduction that adaptations predict with the one that comes true."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import lightning as L
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torchmetrics.functional import spearman_corrcoef
from typing_extensions import override

from bame_lightning.callbacks.bame import BAMECallback

RECENT = 100
"""Number of adaptations over which the rank correlation is taken."""
_FEWEST = 3


class PredictionCheck(L.Callback):
    """Log what adaptations of `BAMECallback` really gain, and how well their predictions rank them.

    At every `every`-th adaptation the batches of the step are evaluated just before and just after the masks change. The
    difference of their losses is the realised reduction. Training is not changed: the model keeps its mode, both evaluations
    draw the same random numbers, and the random state and the model's buffers are put back. It logs
    `bame/realised_loss_reduction` of the last such adaptation, and `bame/prediction_rank_correlation`, which is Spearman's over
    the last 100 adaptations in which masks changed.

    Args:
        loss: Maps the LightningModule and a batch to the loss that training minimises; it should log nothing, and return
            double precision, because the difference of two losses is small.
        every: Adaptations between two checks, each of which costs two forward passes.

    Raises:
        ValueError: If `every` is less than 1.
    """

    def __init__(self, loss: Callable[[Any, Any], Tensor], *, every: int = 10) -> None:
        if every < 1:
            raise ValueError(f"`every` must be a number of adaptations, at least 1; got {every}.")
        self.loss, self.every = loss, every
        self.predicted: list[float] = []
        self.realised: list[float] = []
        self._method: BAMECallback | None = None
        self._batches: list[Any] = []
        self._step = -1

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit" and not trainer.global_step:
            self.predicted, self.realised = [], []  # those of another run; this run's own are loaded later

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        self._method = next((found for found in callbacks if isinstance(found, BAMECallback)), None)
        if self._method is not None:
            self._method.training.run.observers.append(partial(self._check, trainer, pl_module))

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._step != trainer.global_step:
            # Batches of a step that a loss scaler skipped belong to no adaptation.
            self._step, self._batches = trainer.global_step, []
        if self._method is not None and self._method.adapts and self._method.adaptations % self.every == 0:
            self._batches.append(batch)

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.realised and trainer._logger_connector.should_update_logs:
            metrics: dict[str, Any] = {"bame/realised_loss_reduction": self.realised[-1]}
            if len(self.realised) >= _FEWEST:
                metrics["bame/prediction_rank_correlation"] = rank_correlation(self.predicted, self.realised)
            pl_module.log_dict(metrics, on_step=True, on_epoch=False)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._let_go()

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._let_go()

    def _let_go(self) -> None:
        self._batches = []

    @override
    def state_dict(self) -> dict[str, Any]:
        pairs = {"predicted": self.predicted, "realised": self.realised}
        return {name: torch.tensor(values, dtype=torch.float64) for name, values in pairs.items()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.predicted, self.realised = (state_dict[name].tolist() for name in ("predicted", "realised"))

    @contextmanager
    def _check(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Iterator[None]:
        batches, self._batches = self._batches, []
        if not batches:
            yield
            return
        assert self._method is not None
        self._method.method.enforce()  # the optimizer may have moved pruned weights
        before = self._evaluate(trainer, pl_module, batches)
        yield
        after = self._evaluate(trainer, pl_module, batches)
        layers = self._method.evolving
        if any(int(layer.sparse.rows.total(layer.last_flips)) for layer in layers):
            predicted = sum(float(layer.sparse.rows.total(layer.predicted)) for layer in layers)
            self.predicted = [*self.predicted, predicted][-RECENT:]
            self.realised = [*self.realised, float(before - after)][-RECENT:]

    def _evaluate(self, trainer: L.Trainer, pl_module: L.LightningModule, batches: Sequence[Any]) -> Tensor:
        """Mean loss over the batches of a step, on all ranks."""
        devices = [pl_module.device] if pl_module.device.type == "cuda" else []
        with torch.random.fork_rng(devices), unchanged_buffers(pl_module), torch.no_grad():
            torch.manual_seed(trainer.global_step)
            with trainer.precision_plugin.train_step_context():
                losses = [self.loss(pl_module, batch).double() for batch in batches]
        return trainer.strategy.reduce(torch.stack(losses).mean(), reduce_op="mean")


@contextmanager
def unchanged_buffers(module: nn.Module) -> Iterator[None]:
    """Put back the buffers that forward passes change, such as a batch norm's running statistics."""
    saved = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        for buffer, value in saved:
            buffer.copy_(value)


def rank_correlation(predicted: Sequence[float], realised: Sequence[float]) -> Float[Tensor, ""]:
    """Spearman's rank correlation.

    Args:
        predicted: At least two numbers.
        realised: As many.

    Returns:
        A number in [-1, 1]; NaN if all numbers of one kind are the same.

    Example:
        >>> round(rank_correlation([1.0, 2.0, 30.0], [-5.0, 0.1, 0.2]).item(), 4)
        1.0
    """
    return spearman_corrcoef(*(torch.tensor(values, dtype=torch.float64) for values in (predicted, realised)))
