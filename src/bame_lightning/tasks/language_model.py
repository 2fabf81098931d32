"""Language modelling with bytes as tokens."""

from __future__ import annotations

import math

from jaxtyping import Float, Int64
from torch import Tensor
from torchmetrics import MeanMetric
from typing_extensions import override

from bame_lightning.tasks.classifier import Batch, Classifier


class LanguageModel(Classifier):
    """Train a model to predict the next byte: a classification of every position.

    It logs the loss in bits, too, as `bits_per_byte`: loss / ln 2, which an ideal compressor would need for a byte. With label
    smoothing this is not true of the training loss. The arguments are those of `Classifier`; the model maps bytes to logits
    of the byte that follows each.
    """

    @override
    def forward(self, tokens: Int64[Tensor, "batch context"]) -> Float[Tensor, "batch context vocabulary"]:
        logits: Tensor = self.model(tokens)
        return logits

    @override
    def _step(self, batch: Batch, stage: str, accuracy: MeanMetric, label_smoothing: float = 0.0) -> Float[Tensor, ""]:
        loss = super()._step(batch, stage, accuracy, label_smoothing)
        self._log_mean(stage, "bits_per_byte", loss.detach() / math.log(2), batch)
        return loss
