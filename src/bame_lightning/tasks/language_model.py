"""Language modelling with bytes as tokens."""

from __future__ import annotations

import math
from collections.abc import Callable

from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import ParamsT
from torchmetrics import MeanMetric
from typing_extensions import override

from bame_lightning.tasks.classifier import Batch, Classifier


class LanguageModel(Classifier):
    """Train a model to predict the next byte: a classification of every position.

    Logs the loss in bits, too, as `bits_per_byte`: loss / ln 2, what an ideal compressor would need for a byte.

    Args:
        model: Maps bytes to logits of the byte that follows each.
        optimizer: Makes the optimizer from parameters, or groups of them.
        scheduler: Makes a learning-rate schedule from the optimizer and the number of its steps; stepped after each
            optimizer step. None keeps the learning rate.
        decay_vectors: Whether weight decay is for parameters of one dimension, too: biases and what normalisation
            scales and shifts by.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Callable[[ParamsT], Optimizer],
        scheduler: Callable[[Optimizer, int], LRScheduler] | None = None,
        *,
        decay_vectors: bool = True,
    ) -> None:
        # No label smoothing: the loss of training would not be in bits.
        super().__init__(model, optimizer, scheduler, decay_vectors=decay_vectors)

    @override
    def forward(self, tokens: Int64[Tensor, "batch context"]) -> Float[Tensor, "batch context vocabulary"]:
        logits: Tensor = self.model(tokens)
        return logits

    @override
    def _step(self, batch: Batch, stage: str, accuracy: MeanMetric, label_smoothing: float = 0.0) -> Float[Tensor, ""]:
        loss = super()._step(batch, stage, accuracy, label_smoothing)
        self._log_mean(stage, "bits_per_byte", loss.detach() / math.log(2), batch)
        return loss
