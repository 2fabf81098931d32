"""Data, models and LightningModules that the configurations name; none of them knows about sparsity."""

from bame_lightning.tasks.cifar import CIFAR10, CIFAR100
from bame_lightning.tasks.classifier import Classifier
from bame_lightning.tasks.data import Digits, FashionMNIST
from bame_lightning.tasks.imagenet import ImageNet
from bame_lightning.tasks.language_model import LanguageModel
from bame_lightning.tasks.python_source import PythonSource

__all__ = ["CIFAR10", "CIFAR100", "Classifier", "Digits", "FashionMNIST", "ImageNet", "LanguageModel", "PythonSource"]
