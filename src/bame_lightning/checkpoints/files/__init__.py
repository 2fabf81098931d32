"""Files of weights as anybody writes them: found, read without running their code, and said which of it was read."""

from bame_lightning.checkpoints.files.read import Weights, load_weights, read_weights

__all__ = ["Weights", "load_weights", "read_weights"]
