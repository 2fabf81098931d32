"""Train N:M sparse networks by Block-Aware Mask Evolution, as a Lightning callback."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bame_lightning.bame.evidence import Evidence, OneBatch
    from bame_lightning.bame.schedule import Schedule
    from bame_lightning.blocks.pattern import NMPattern
    from bame_lightning.callbacks import (
        SRSTE,
        BAMECallback,
        Dense,
        OneShotMagnitude,
        RigL,
        StaticMask,
        TopKAST,
        TransposableSTE,
    )
    from bame_lightning.callbacks.images import MaskImages
    from bame_lightning.callbacks.prediction import PredictionCheck
    from bame_lightning.callbacks.snapshots import MaskSnapshots

__version__ = "0.1.0"

__all__ = [
    "SRSTE",
    "BAMECallback",
    "Dense",
    "Evidence",
    "MaskImages",
    "MaskSnapshots",
    "NMPattern",
    "OneBatch",
    "OneShotMagnitude",
    "PredictionCheck",
    "RigL",
    "Schedule",
    "StaticMask",
    "TopKAST",
    "TransposableSTE",
]

_ELSEWHERE = {
    "Evidence": "bame.evidence",
    "MaskImages": "callbacks.images",
    "MaskSnapshots": "callbacks.snapshots",
    "NMPattern": "blocks.pattern",
    "OneBatch": "bame.evidence",
    "PredictionCheck": "callbacks.prediction",
    "Schedule": "bame.schedule",
}


def __getattr__(name: str) -> Any:
    # Lightning takes seconds to import. Neither the core nor commands such as bame-audit need it.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_ELSEWHERE.get(name, 'callbacks')}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
