"""Data, models and the classifier that the configurations name; none of them knows about sparsity."""

from bame_lightning.tasks.classifier import Classifier
from bame_lightning.tasks.data import Digits, FashionMNIST

__all__ = ["Classifier", "Digits", "FashionMNIST"]
