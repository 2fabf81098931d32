"""Hand a trained N:M model on: what goes into the files that `bame-export` writes."""

from bame_lightning.export.errors import ExportError
from bame_lightning.export.packed import pack_weight, packed_tensors, read_packed, unpack_weight
from bame_lightning.export.semi_structured import semi_structured_tensors
from bame_lightning.export.trained import Trained, load_trained

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
