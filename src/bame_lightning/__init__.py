"""Train N:M sparse networks by Block-Aware Mask Evolution, as a Lightning callback."""

from bame_lightning.callbacks import (
    SRSTE,
    BAMECallback,
    Dense,
    OneShotMagnitude,
    RigL,
    StaticMask,
    TransposableSTE,
)
from bame_lightning.evidence import Evidence, OneBatch
from bame_lightning.pattern import NMPattern
from bame_lightning.schedule import Schedule

__version__ = "0.1.0"

__all__ = [
    "SRSTE",
    "BAMECallback",
    "Dense",
    "Evidence",
    "NMPattern",
    "OneBatch",
    "OneShotMagnitude",
    "RigL",
    "Schedule",
    "StaticMask",
    "TransposableSTE",
]
