"""Supervised classification."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from jaxtyping import Float
from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import ParamsT
from torchmetrics import MeanMetric
from typing_extensions import override

Batch = Sequence[Tensor]
"""Inputs, and the class of each input or of each of its positions: a tuple, or a list from torch's default collation."""


class Classifier(LightningModule):
    """Train a model with cross entropy; log the mean loss and the accuracy of every epoch.

    Nothing is saved as hyper-parameters, so checkpoints hold tensors and plain types only. Parameters are called
    `model.*`.

    Args:
        model: Maps inputs to one logit per class.
        optimizer: Makes the optimizer from parameters, or groups of them.
        scheduler: Makes a learning-rate schedule from the optimizer and the number of its steps; stepped after each
            optimizer step. None keeps the learning rate.
        label_smoothing: Share of the target spread evenly over all classes, in training.
        decay_vectors: Whether weight decay also applies to parameters of one dimension: biases, and the scales and shifts
            of normalisation.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Callable[[ParamsT], Optimizer],
        scheduler: Callable[[Optimizer, int], LRScheduler] | None = None,
        *,
        label_smoothing: float = 0.0,
        decay_vectors: bool = True,
    ) -> None:
        super().__init__()
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"`label_smoothing` is a share in [0, 1]; got {label_smoothing}.")
        self.model = model
        self.train_accuracy, self.val_accuracy, self.test_accuracy = MeanMetric(), MeanMetric(), MeanMetric()
        self._make_optimizer, self._make_scheduler = optimizer, scheduler
        self._label_smoothing, self._decay_vectors = label_smoothing, decay_vectors

    @override
    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        logits: Tensor = self.model(images)
        return logits

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Float[Tensor, ""]:
        return self._step(batch, "train", self.train_accuracy, self._label_smoothing)

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._step(batch, "val", self.val_accuracy)

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._step(batch, "test", self.test_accuracy)

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = self._make_optimizer(self.parameters() if self._decay_vectors else self._groups())
        if self._make_scheduler is None:
            return optimizer
        total_steps = self.trainer.estimated_stepping_batches
        if math.isinf(total_steps):
            raise ValueError("A `scheduler` needs the length of the run; give the Trainer `max_epochs` or `max_steps`.")
        scheduler = self._make_scheduler(optimizer, int(total_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def training_loss(self, batch: Batch) -> Float[Tensor, ""]:
        """What training minimises for a batch, in double precision; logs nothing."""
        inputs, labels = batch
        return _cross_entropy(self(inputs).double(), labels, self._label_smoothing)

    def _groups(self) -> list[dict[str, Any]]:
        matrices = [parameter for parameter in self.parameters() if parameter.dim() > 1]
        vectors = [parameter for parameter in self.parameters() if parameter.dim() <= 1]
        return [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]

    def _step(self, batch: Batch, stage: str, accuracy: MeanMetric, label_smoothing: float = 0.0) -> Float[Tensor, ""]:
        inputs, labels = batch
        logits = self(inputs)
        loss = _cross_entropy(logits, labels, label_smoothing)
        accuracy.update(logits.detach().argmax(-1) == labels)
        self._log_mean(stage, "loss", loss, batch)
        self._log_mean(stage, "accuracy", accuracy, batch)
        return loss

    def _log_mean(self, stage: str, name: str, value: Tensor | MeanMetric, batch: Batch) -> None:
        shown, samples = stage != "test", len(batch[1])
        self.log(f"{stage}/{name}", value, on_step=False, on_epoch=True, prog_bar=shown, batch_size=samples)


def _cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float) -> Float[Tensor, ""]:
    return functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), label_smoothing=label_smoothing)
