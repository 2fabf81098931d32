"""Lightning callbacks: one per method, over a common base."""

from bame_lightning.callbacks.bame import BAMECallback
from bame_lightning.callbacks.masked import StaticMask
from bame_lightning.callbacks.rigl import RigL
from bame_lightning.callbacks.straight_through import SRSTE

__all__ = ["SRSTE", "BAMECallback", "RigL", "StaticMask"]
