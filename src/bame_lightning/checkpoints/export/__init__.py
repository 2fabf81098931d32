"""Export a trained N:M model: the contents of the files that `bame-export` writes."""

from typing import TYPE_CHECKING

from bame_lightning.lazy import on_demand

if TYPE_CHECKING:
    from bame_lightning.checkpoints.export.errors import ExportError
    from bame_lightning.checkpoints.export.packed import pack_weight, packed_tensors, read_packed, unpack_weight
    from bame_lightning.checkpoints.export.semi_structured import semi_structured_tensors
    from bame_lightning.checkpoints.export.trained import Trained, load_trained

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

_MODULES = {
    **{"ExportError": "errors", "Trained": "trained", "load_trained": "trained"},
    **{"pack_weight": "packed", "packed_tensors": "packed", "read_packed": "packed", "unpack_weight": "packed"},
    "semi_structured_tensors": "semi_structured",
}

# `ExportError` reports a wrong argument of bame-export before torch is imported.
__getattr__ = on_demand(__name__, _MODULES)
