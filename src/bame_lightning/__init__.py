"""Train N:M sparse networks by Block-Aware Mask Evolution, as a Lightning callback."""

from typing import TYPE_CHECKING

from bame_lightning.lazy import on_demand

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

# Lightning takes seconds to import, and nothing of the core, nor commands such as bame-audit, needs it.
__getattr__ = on_demand(__name__, {name: _CORE.get(name, "callbacks") for name in __all__})


def __dir__() -> list[str]:
    return [*globals(), *__all__]
