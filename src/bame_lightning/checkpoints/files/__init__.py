"""Files of weights from anywhere: find them, read them without running their code, and say what was read."""

from bame_lightning.checkpoints.files.read import Weights, load_weights, read_weights

__all__ = ["Weights", "load_weights", "read_weights"]
