"""Train N:M sparse networks by Block-Aware Mask Evolution, as a Lightning callback."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_CORE = {"Evidence": "evidence", "OneBatch": "evidence", "NMPattern": "pattern", "Schedule": "schedule"}


def __getattr__(name: str) -> Any:
    # Lightning takes seconds to import, and nothing of the core, nor commands such as bame-audit, needs it.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_CORE.get(name, 'callbacks')}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
