"""Lightning callbacks: one per method, over a common base."""

from bame_lightning.callbacks.bame import BAMECallback
from bame_lightning.callbacks.static import StaticMask

__all__ = ["BAMECallback", "StaticMask"]
