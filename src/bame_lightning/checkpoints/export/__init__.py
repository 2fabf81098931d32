"""Export a trained N:M model: the contents of the files that `bame-export` writes."""

from bame_lightning.checkpoints.export.packed import pack_weight, packed_tensors, read_packed, unpack_weight
from bame_lightning.checkpoints.export.semi_structured import semi_structured_tensors
from bame_lightning.checkpoints.export.trained import ExportError, Trained, load_trained

__all__ = [
    "ExportError",
    "Trained",
    "load_trained",
    "pack_weight",
    "packed_tensors",
    "read_packed",
    "semi_structured_tensors",
    "unpack_weight",
]
