"""Data, models and the classifier that the configurations name; none of them knows about sparsity."""

from bame_lightning.tasks.cifar import CIFAR10, CIFAR100
from bame_lightning.tasks.classifier import Classifier
from bame_lightning.tasks.data import Digits, FashionMNIST
from bame_lightning.tasks.imagenet import ImageNet

__all__ = ["CIFAR10", "CIFAR100", "Classifier", "Digits", "FashionMNIST", "ImageNet"]
